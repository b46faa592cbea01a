# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Lets a model answer prompts, and writes its answers as chats that its exits can be tuned on.

    python scripts/generate_tuning_text.py gpt_model_file=model.nemo output_prefix=data/chats

Run it again to go on where it was stopped.
"""

from omegaconf import DictConfig, OmegaConf

from nemo_ee.runtime.script import script, user_errors


@script("generate_tuning_text")
def main(cfg: DictConfig) -> None:
    """Asks, answers, writes, and says what was written."""
    with user_errors(cfg):
        from nemo_ee.tuning_text.settings import TuningTextConfig

        values = OmegaConf.to_container(cfg, resolve=True)
        trainer = values.pop("trainer")
        config = TuningTextConfig.from_dict({**values, "precision": trainer["precision"]})

        from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder
        from nemo_ee.tuning_text.generate import generate_tuning_text

        model = {"precision": config.precision, "megatron_amp_O2": config.megatron_amp_O2}
        settings = OmegaConf.create({"trainer": trainer, "model": model})
        loader = EarlyExitTrainerBuilder(settings).create_trainer()
        files = generate_tuning_text(config, loader)
        if loader.global_rank == 0:
            print(files.description())


if __name__ == "__main__":
    main()
