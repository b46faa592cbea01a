# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""scripts/megatron_gpt_ee_server.py, whose lossless sequences draft whether it pays or not (with a tiny model it
never does)."""

import runpy
from pathlib import Path

from nemo_ee.runtime import stand_ins

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "megatron_gpt_ee_server.py"

if __name__ == "__main__":
    stand_ins.enable()
    from tests.support.drafting import drafting_eagerly

    with drafting_eagerly():
        runpy.run_path(str(SCRIPT), run_name="__main__")
