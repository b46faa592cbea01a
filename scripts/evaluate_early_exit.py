# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Evaluates a model with early exits: quality per exit, and speed against agreement over thresholds.

    python scripts/evaluate_early_exit.py gpt_model_file=model.nemo adapter_file=exits.nemo \\
        data.prefix=text_validation
"""

from omegaconf import DictConfig, OmegaConf

from nemo_ee.evaluation.settings import EvaluationConfig
from nemo_ee.runtime.script import script, user_errors


@script("evaluate_early_exit")
def main(cfg: DictConfig) -> None:
    """Restores, measures, writes the report, and says where it lies."""
    with user_errors(cfg, nemo=False):
        values = OmegaConf.to_container(cfg, resolve=True)
        trainer = values.pop("trainer")
        config = EvaluationConfig.from_dict({**values, "precision": trainer["precision"]})
    with user_errors():
        from nemo_ee.evaluation.evaluate import evaluate
        from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder

        settings = OmegaConf.create({"trainer": trainer, "model": {"precision": trainer["precision"]}})
        for path in evaluate(config, EarlyExitTrainerBuilder(settings).create_trainer()):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
