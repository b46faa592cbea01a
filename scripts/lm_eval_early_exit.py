# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Runs lm-evaluation-harness on a model with early exits: in one way, or over a sweep of thresholds.

    python scripts/lm_eval_early_exit.py gpt_model_file=model.nemo adapter_file=exits.nemo 'tasks=[boolq_local]' \\
        early_exit.threshold=0.8

Run a sweep again to go on where it was stopped.
"""

import sys

from omegaconf import DictConfig, OmegaConf

from nemo_ee.runtime.script import script, user_errors

EXTRA = ("lm_eval", "datasets", "evaluate", None)
"""What an import that fails names where the extra is missing; pyarrow names nothing where NumPy is too old for it."""


@script("lm_eval_early_exit")
def main(cfg: DictConfig) -> None:
    """Writes tasks, evaluates, writes results, and says where they lie."""
    with user_errors(cfg):
        from nemo_ee.evaluation.harness.settings import LmEvalConfig

        values = OmegaConf.to_container(cfg, resolve=True)
        trainer = values.pop("trainer")
        config = LmEvalConfig.from_dict({**values, "precision": trainer["precision"]})

        from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder

        try:
            from nemo_ee.evaluation.harness.run import run
        except ImportError as error:
            if error.name not in EXTRA:
                raise
            sys.exit(
                f"error: lm-evaluation-harness cannot be imported ({error}); it comes with an extra: "
                "pip install 'nemo_ee[lm-eval]'"
            )

        settings = OmegaConf.create({"trainer": trainer, "model": {"precision": config.precision}})
        for path in run(config, EarlyExitTrainerBuilder(settings).create_trainer()):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
