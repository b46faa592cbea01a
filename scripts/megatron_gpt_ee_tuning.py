# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""EE-Tuning: tunes early exits of a pre-trained NeMo GPT whose backbone is frozen.

    python scripts/megatron_gpt_ee_tuning.py model.restore_from_path=model.nemo \\
        'model.early_exit.layers=[10,20]' \\
        'model.data.data_prefix={train:[text_train],validation:[text_validation],test:[text_validation]}'

On a GPU cluster start it with torchrun or srun; without a GPU, `trainer.devices=2` starts two processes.
"""

from omegaconf import DictConfig

from nemo_ee.models.checks.command_line import check_command_line
from nemo_ee.runtime.script import script, user_errors


@script("megatron_gpt_ee_tuning", check=check_command_line)
def main(cfg: DictConfig) -> None:
    """Restores the base, adds exits, tunes them and saves them alone."""
    with user_errors(cfg):
        from nemo_ee.models.megatron_gpt_ee_tuning_model import MegatronGPTEETuningModel
        from nemo_ee.models.runs.experiment import experiment, fit
        from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder

        trainer = EarlyExitTrainerBuilder(cfg).create_trainer()
        with experiment(trainer, cfg.exp_manager):
            model = MegatronGPTEETuningModel.restore_base(cfg, trainer)
            fit(trainer, model)


if __name__ == "__main__":
    main()
