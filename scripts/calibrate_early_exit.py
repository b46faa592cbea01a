# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Chooses the fastest thresholds that keep an agreement with the final exit, with a finite-sample guarantee.

    python scripts/calibrate_early_exit.py gpt_model_file=model.nemo adapter_file=exits.nemo \\
        data.prefix=text_validation target_agreement=0.95 output_file=calibrated.nemo

The exit status is 2 where nothing could be certified, or no exit pays: the thresholds written are then 1.0, nothing
leaves early.
"""

import sys

from omegaconf import DictConfig, OmegaConf

from nemo_ee.calibration.settings import CalibrationConfig
from nemo_ee.runtime.script import script, user_errors

NOTHING_CHOSEN = 2
"""Exit status; 1 is an error."""


@script("calibrate_early_exit")
def main(cfg: DictConfig) -> None:
    """Restores, scores, chooses, writes, and says what is promised."""
    with user_errors(cfg, nemo=False):
        values = OmegaConf.to_container(cfg, resolve=True)
        trainer = values.pop("trainer")
        config = CalibrationConfig.from_dict({**values, "precision": trainer["precision"]})
    with user_errors():
        from nemo_ee.calibration.calibrate import calibrate
        from nemo_ee.calibration.markdown import summary
        from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder

        settings = OmegaConf.create({"trainer": trainer, "model": {"precision": trainer["precision"]}})
        report, written = calibrate(config, EarlyExitTrainerBuilder(settings).create_trainer())
        print(summary(report))
        for path in written:
            print(f"wrote {path}")
        if report.chosen is None:
            print("nothing chosen: the thresholds written let no token leave early", file=sys.stderr)
            sys.exit(NOTHING_CHOSEN)


if __name__ == "__main__":
    main()
