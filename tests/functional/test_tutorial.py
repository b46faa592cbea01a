# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The tutorial notebook's code runs, cell after cell, on tiny checkpoints in the quickstart's places."""

import json
import os
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from tests.functional.test_generate_script import write_checkpoints

NOTEBOOK = Path(__file__).resolve().parents[2] / "tutorials" / "early_exit_generation.ipynb"


def run_cells(folder: str) -> str:
    write_checkpoints(folder)
    work = Path(folder, "work")
    (work / "tuned" / "checkpoints").mkdir(parents=True)
    os.rename(f"{folder}/base.nemo", work / "smollm2.nemo")
    os.rename(f"{folder}/exits.nemo", work / "tuned" / "checkpoints" / "tuned.nemo")
    os.environ["NEMO_EE_TUTORIAL_WORK"] = str(work)
    printed, names = StringIO(), {}
    with redirect_stdout(printed):
        for cell in json.loads(NOTEBOOK.read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
    return printed.getvalue()


def test_notebook(tmp_path, workers):
    (printed,) = workers(1).run(run_cells, str(tmp_path))
    assert "threshold 1.0: 0 of" in printed
    assert "content_hash" in printed and printed.count("confidence ") >= 2
