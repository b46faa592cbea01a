# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Imports all of the package, trains a tiny model and generates with it; prints who asked for Apex or Transformer
Engine meanwhile, a module a line behind `MARK`. One argument: an empty folder to work in."""

import importlib
import os
import pkgutil
import sys
from pathlib import Path

from tests.support.import_recorder import ImportRecorder

PACKAGES = (
    "amp_C",
    "apex",
    "fused_weight_gradient_mlp_cuda",
    "transformer_engine",
    "transformer_engine_torch",
)
"""Apex, Transformer Engine and their kernels."""

MARK = "asked: "


def main(folder: Path) -> None:
    recorder = ImportRecorder(*PACKAGES)
    sys.meta_path.insert(0, recorder)
    import nemo_ee
    from nemo_ee.runtime import stand_ins

    stand_ins.enable()
    early = {"lightning", "megatron", "nemo", "transformers"} & sys.modules.keys()
    assert not early and not recorder.asked, f"enable() imported {early}; {recorder.asked} asked"
    for module in pkgutil.walk_packages(nemo_ee.__path__, "nemo_ee."):
        importlib.import_module(module.name)

    from nemo_ee.models.megatron_gpt_ee_pretraining_model import MegatronGPTEEPretrainingModel
    from tests.support.pretraining import Case, Layout, pretraining_config
    from tests.support.tiny_gpt import HEADS
    from tests.support.tuning import tuning_trainer, write_text

    os.chdir(folder)
    case = Case({"layers": [2], "init": "random", "head": HEADS["block, MLP, linear, untied"]}, steps=1)
    layout = Layout()
    trainer = tuning_trainer(layout, case.steps)
    model = MegatronGPTEEPretrainingModel(pretraining_config(write_text(folder), case, layout), trainer)
    trainer.fit(model)
    model.eval()
    model.generate(
        ["the cat"], {"max_length": 4, "min_length": 0}, early_exit={"threshold": 0.5, "always": True}
    )
    print(*(MARK + module for module in sorted(recorder.asked)), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
