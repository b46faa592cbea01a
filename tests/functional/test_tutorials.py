# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The tutorials' cells run, one after the other, in small; and what is saved of their output is of whole runs."""

import io
import json
import os
import stat
import sys
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support import tiny_llama
from tests.support.script import ROOT, TORCHRUN

NOTEBOOKS = {path.name[:2]: path for path in sorted((ROOT / "tutorials").glob("*.ipynb"))}
COMMAND = f'#!/usr/bin/env bash\nunset {" ".join(TORCHRUN)}\nexec "{sys.executable}" -m nemo_ee.runtime.commands "$@"\n'
"""What an installation has; the variables are those of the process that cells run in."""
CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ' ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant ' }}{% endif %}"
)


def cells(number: str) -> list[dict]:
    return json.loads(NOTEBOOKS[number].read_text())["cells"]


def run_cells(number: str, work: str) -> str:
    """What a notebook's cells print, in a shell of IPython's, as Jupyter has one; the first error is raised."""
    from IPython.core.interactiveshell import InteractiveShell

    folder = Path(work, "bin")
    folder.mkdir(exist_ok=True)
    command = folder / "nemo-ee"
    command.write_text(COMMAND)
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    os.environ |= {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    os.environ |= {"NEMO_EE_TUTORIAL": "tiny", "NEMO_EE_TUTORIAL_WORK": work}
    printed, shell = io.StringIO(), InteractiveShell.instance()
    sys.ps1 = "In : "  # by which Lightning knows notebooks
    with redirect_stdout(printed):
        for cell in cells(number):
            if cell["cell_type"] == "code":
                shell.run_cell("".join(cell["source"])).raise_error()
    return printed.getvalue()


def write_base(work: str) -> None:
    """A tiny chat model where 01 would put the one that it downloads."""
    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

    tiny_llama.CHAT_TEMPLATE = CHATML
    source = tiny_llama.write(Path(work) / "hf", max_position_embeddings=256)
    convert_to_nemo(str(source), f"{work}/smollm2.nemo")


def tuned(work: str) -> str:
    write_base(work)
    return run_cells("01", work)


@pytest.fixture(scope="module")
def after_01(workers, tmp_path_factory):
    """Where 01 has run, and what it printed."""
    folder = tmp_path_factory.mktemp("tutorials")
    (printed,) = workers(1).run(tuned, str(folder))
    return folder, printed


def test_primer(workers, tmp_path):
    (printed,) = workers(1).run(run_cells, "00", str(tmp_path))
    lines = printed.splitlines()
    assert any(line.split()[:2] == ["1.0", "1.000"] and line.endswith(" 6.00") for line in lines)
    assert sum(line.startswith("result ") for line in lines) == 4
    assert sum("  confidence " in line for line in lines) == 8


def test_tuning_on_chats(after_01):
    folder, printed = after_01
    assert "threshold 1.0: 0 of" in printed and "content_hash" in printed
    assert printed.count("agreement with the final exit") == 2
    assert (folder / "01" / "checkpoints" / "exits.nemo").exists()


@pytest.mark.slow
def test_three_dimensions(workers, tmp_path):
    (printed,) = workers(1).run(run_cells, "02", str(tmp_path))
    assert "largest difference of any step" in printed  # and the notebook itself says how much it may be
    assert "(12 tokens:" in printed


@pytest.mark.slow
def test_calibration(workers, after_01):
    (printed,) = workers(1).run(run_cells, "03", str(after_01[0]))
    assert "Point estimate, no guarantee" in printed and "speed-up: median" in printed


@pytest.mark.slow
def test_lm_evaluation_harness(workers, after_01):
    (printed,) = workers(1).run(run_cells, "04", str(after_01[0]))
    assert printed.count("|boolq_local|") == 2 and printed.count("   exits ") == 2, "tables and questions"
    assert printed.count("   speed-up ") == 4 and printed.count(" acc 0.") + printed.count(" acc 1.") == 4
    assert "wrote sweep/lm_eval.md" in printed


@pytest.mark.slow
def test_export(workers, after_01):
    (printed,) = workers(1).run(run_cells, "05", str(after_01[0]))
    assert printed.count("wrote ") == 3 and "modeling_early_exit.py" in printed
    assert "all texts are the base's" in printed, "and the notebook itself compares them"
    assert printed.count("tokens left early") == 2


def test_moving_from_ee_llm(workers, tmp_path):
    (printed,) = workers(1).run(run_cells, "06", str(tmp_path))
    said = "model.early_exit.layers=[6,12]' 'model.early_exit.training.loss_weights=[0.25,0.5]'"
    assert said in printed and "model.early_exit.training.pre_exit=true" in printed
    assert printed.splitlines()[-1].startswith("(6, 12) (0.25, 0.5) True HeadConfig(")


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_output_is_of_one_whole_run(number):
    """From the first cell to the last, without an error."""
    code = [cell for cell in cells(number) if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)] and outputs
    assert "error" not in {output["output_type"] for output in outputs}
    assert "stderr" not in {output.get("name") for output in outputs}, "what libraries print is left out"
    for cell in code:
        kinds = [output["output_type"] for output in cell["outputs"]]
        assert ("stream", "stream") not in [*pairwise(kinds)], "jupyter nbconvert --coalesce-streams"
