# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Generates text with early exits and shows the exit of every token.

    python scripts/megatron_gpt_ee_generate.py gpt_model_file=model.nemo adapter_file=exits.nemo \\
        'prompts=["Once upon a time"]' early_exit.threshold=0.7
"""

from omegaconf import DictConfig, OmegaConf

from nemo_ee.runtime.script import script, user_errors


@script("megatron_gpt_ee_generate")
def main(cfg: DictConfig) -> None:
    """Restores, generates, prints, and writes the output file."""
    with user_errors(cfg):
        from nemo_ee.running.settings import GenerateConfig

        values = OmegaConf.to_container(cfg, resolve=True)
        trainer = values.pop("trainer")
        config = GenerateConfig.from_dict({**values, "precision": trainer["precision"]})

        from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder
        from nemo_ee.running.generate import run

        model = {"precision": config.precision, "megatron_amp_O2": config.megatron_amp_O2}
        settings = OmegaConf.create({"trainer": trainer, "model": model})
        run(config, EarlyExitTrainerBuilder(settings).create_trainer())


if __name__ == "__main__":
    main()
