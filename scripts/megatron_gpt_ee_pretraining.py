# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Pre-training: a GPT and its early exits are trained together, from scratch or from a `.nemo`.

    python scripts/megatron_gpt_ee_pretraining.py 'model.early_exit.layers=[3,6,9]' \\
        model.tokenizer.type=tokenizer_directory \\
        'model.data.data_prefix={train:[text_train],validation:[text_validation],test:[text_validation]}'

On a GPU cluster start it with torchrun or srun; without a GPU, `trainer.devices=4` starts four processes.
"""

from omegaconf import DictConfig

from nemo_ee.models.checks.command_line import check_command_line
from nemo_ee.runtime.script import script, user_errors


@script("megatron_gpt_ee_pretraining", check=check_command_line)
def main(cfg: DictConfig) -> None:
    """Builds or restores the model, trains it and saves it with its exits."""
    in_a_file = cfg.model.restore_from_path or cfg.model.tokenizer.model  # a .nemo, or SentencePiece's
    with user_errors(cfg, optional=["model.tokenizer.type"] if in_a_file else []):
        from nemo_ee.models.megatron_gpt_ee_pretraining_model import MegatronGPTEEPretrainingModel
        from nemo_ee.models.runs.experiment import experiment, fit
        from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder

        trainer = EarlyExitTrainerBuilder(cfg).create_trainer()
        with experiment(trainer, cfg.exp_manager):
            model = MegatronGPTEEPretrainingModel.start(cfg, trainer)
            fit(trainer, model)


if __name__ == "__main__":
    main()
