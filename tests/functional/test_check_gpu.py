# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""check_gpu.sh, rehearsed on a pretend GPU: it passes, and it finds and names what is planted.

What a pretend GPU cannot have, it stands in for: a tape of operations for CUDA graphs. What it cannot show is in
`tests.support.pretend_gpu`.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.functional.test_decoding_benchmarks import write_inputs
from tests.support import planted_faults
from tests.support.planted_faults import FAULTS, WAIT, WRONG_DEVICE, WRONG_TOKEN

ROOT = Path(__file__).resolve().parents[2]
PARTS = ROOT / "scripts" / "gpu_check"
NAMED = {
    WRONG_DEVICE: "Expected all tensors to be on the same device",
    WRONG_TOKEN: "instead of the CPU's",
    WAIT: "operation not permitted when stream is capturing",
}


def import_parts():
    """Makes the script's modules importable, as they are for it."""
    sys.path[:0] = [str(PARTS), str(PARTS.parent / "benchmarks")]


def expected_tokens() -> dict:
    """On the CPU, in a process without GPUs."""
    import_parts()
    import tokens
    from part import Settings

    return tokens.reference(Settings(Path(), quick=True))


def tokens_with(fault: str | None, expected: dict) -> tuple[list, list]:
    """Rows and faults of the part that compares tokens, with a fault planted."""
    import_parts()
    import tokens
    from part import Settings
    from result import Result

    if fault is not None:
        planted_faults.plant(fault)
    result = Result()
    try:
        tokens.compare(tokens.generate(Settings(Path(), quick=True)), expected, result)
    except RuntimeError as error:
        result.faults.append(str(error))
    return result.lines, result.faults


@pytest.fixture(scope="module")
def expected(workers):
    return workers(1).run(expected_tokens)[0]


def test_tokens_are_the_cpus(pretend_gpus, expected):
    ((lines, faults),) = pretend_gpus(1).run(tokens_with, None, expected)
    assert not faults
    assert len(lines) == 13 and all("tokens as on the CPU" in found for _, found in lines[:12])
    assert lines[12][0] == "CUDA graphs" and lines[12][1] != "replayed 0 times"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(pretend_gpus, expected, fault):
    ((_, faults),) = pretend_gpus(1).run(tokens_with, fault, expected)
    assert any(NAMED[fault] in each for each in faults), faults
    if fault == WAIT:  # and decoding without graphs is right all the same
        assert len(faults) == 1


def judged(prompts: int, differing: int) -> list[str]:
    """Faults of a comparison with transformers, whose texts of some prompts begin otherwise."""
    import_parts()
    from result import Result
    from speed import TRANSFORMERS, Speed, judge

    ways = [("full depth", False), (TRANSFORMERS, None)]
    speeds = [Speed("some", prompts, way, graphs, [1.0], 1.0) for way, graphs in ways]
    plain = [[1, 2]] * prompts
    texts = {speeds[0].name: plain, speeds[1].name: [[3, 2]] * differing + plain[differing:]}
    result = Result()
    judge(speeds, texts, result)
    return result.faults


def test_other_weights_than_transformers_are_a_fault_and_a_near_tie_is_none(workers):
    assert not workers(1).run(judged, 1, 1)[0] and not workers(1).run(judged, 16, 8)[0]
    (fault,) = workers(1).run(judged, 16, 9)[0]
    assert "7 of 16 texts begin as ours do" in fault


def check_gpu(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts" / "check_gpu.sh"), "--output", str(tmp_path / "out"), *options]
    mine = {**os.environ, "NEMO_EE_VENV": sys.prefix, **environment}
    return subprocess.run(command, cwd=tmp_path, env=mine, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_the_script_passes_on_a_pretend_gpu(tmp_path, workers):
    workers(1).run(write_inputs, str(tmp_path))
    given = ("--model", str(tmp_path / "base.nemo"), "--adapter", str(tmp_path / "exits.nemo"))
    done = check_gpu(tmp_path, "--quick", "--seconds", "1500", *given, **planted_faults.environment())
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert "all of 6 parts passed" in done.stdout
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert "From a pretend GPU" in page and "Tiny shapes" in page and "source " in page
    assert page.count("| transformers |") == 4 and "FAILED" not in page and str(tmp_path) not in page
    assert (tmp_path / "out" / "gpu.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_script_fails_for_a_planted_fault(tmp_path, fault):
    only = ("--quick", "--seconds", "1500", "--only", "tokens")
    done = check_gpu(tmp_path, *only, **planted_faults.environment(fault))
    assert done.returncode == 1
    assert any(
        line.startswith("failed: tokens: ") and NAMED[fault] in line for line in done.stderr.splitlines()
    )
    assert not (tmp_path / "out").exists(), "a part alone is no page"


# The driver around its parts, for which scripts of a few lines stand.

STAND_INS = {
    "passes": "result()",
    "fails": "result(['exits: 3 instead of 4']); sys.exit(1)",
    "crashes": "print('about to', flush=True); os.kill(os.getpid(), 11)",
    "hangs": "print('began', flush=True); subprocess.run([sys.executable, '-c', SLEEP])",
    "says nothing": "pass",
    "finds no GPU": "result(['none'], {'no GPU': 'none'}); sys.exit(1)",
    "raises": "raise ValueError('no such thing')",
}
PRELUDE = """
import json, os, subprocess, sys
SLEEP = "import os, time; open(MARK, 'w').write(str(os.getpid())); time.sleep(60)".replace("MARK", repr(MARK))
def result(faults=(), facts={}):
    path = os.path.join(sys.argv[sys.argv.index("--work") + 1], sys.argv[1] + ".json")
    json.dump({"lines": [("what", "found")], "faults": list(faults), "speeds": [], "facts": facts}, open(path, "w"))
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """The driver's module, with parts that do what `STAND_INS` say."""
    monkeypatch.setattr(sys, "path", [str(PARTS), *sys.path])
    import check

    monkeypatch.setattr(check, "HERE", tmp_path)
    (tmp_path / "part.py").write_text(
        PRELUDE.replace("repr(MARK)", repr(repr(str(tmp_path / "sleeper"))))
        + "\n".join(f"if sys.argv[1] == {name!r}: {text}" for name, text in STAND_INS.items())
    )
    return check


@pytest.mark.parametrize(
    "name, said",
    [
        ("passes", None),
        ("fails", "exits: 3 instead of 4"),
        ("crashes", "died of SIGSEGV; the end of its output: about to"),
        ("says nothing", "ended without a result"),
        ("raises", "ended with 1; the end of its output: ValueError: no such thing"),
    ],
)
def test_whatever_a_part_does_is_one_line(driver, tmp_path, name, said):
    arguments = driver.argparse.Namespace(quick=True, model=None, adapter=None)
    outcome = driver.run(driver.Part(name, 9), arguments, tmp_path, 30)
    assert outcome.result.faults == ([] if said is None else [said])


def test_a_part_that_hangs_ends_with_all_its_processes(driver, tmp_path):
    arguments = driver.argparse.Namespace(quick=True, model=None, adapter=None)
    outcome = driver.run(driver.Part("hangs", 9), arguments, tmp_path, 2)
    assert outcome.result.faults == ["was not done after 2 s; the end of its output: began"]
    sleeper, deadline = int((tmp_path / "sleeper").read_text()), time.monotonic() + 10
    while runs(sleeper) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(sleeper)


def test_a_check_that_is_ended_ends_its_part(driver, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "PARTS", [driver.Part("hangs", 60)])
    monkeypatch.setattr(sys, "argv", ["check.py", "--quick", "--output", str(tmp_path / "out")])
    before, sleeper = signal.getsignal(signal.SIGTERM), tmp_path / "sleeper"

    def end() -> None:
        while not (sleeper.exists() and sleeper.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end).start()
    try:
        with pytest.raises(SystemExit) as ended:
            driver.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 128 + signal.SIGTERM
    deadline = time.monotonic() + 10
    while runs(int(sleeper.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(int(sleeper.read_text()))


def test_limits_leave_the_time_for_all(driver):
    assert sum(part.seconds for part in driver.PARTS) <= driver.SECONDS == 480


def runs(process: int) -> bool:
    """Whether it does, or waits; one that is only listed still, until its parent has asked for its end, does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_failed_part_stops_no_other(driver, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(driver, "PARTS", [driver.Part(name, 9) for name in ("fails", "crashes", "passes")])
    monkeypatch.setattr(sys, "argv", ["check.py", "--quick", "--output", str(tmp_path / "out")])
    assert driver.main() == 1
    told = capsys.readouterr()
    assert "passes: passed" in told.out and "failed: fails: exits: 3" in told.err
    assert "failed: crashes: died of SIGSEGV" in told.err
    assert "**Failed: fails, crashes.**" in (tmp_path / "out" / "gpu.md").read_text()


def test_a_machine_without_a_gpu_is_one_line(tmp_path):
    done = check_gpu(tmp_path, CUDA_VISIBLE_DEVICES="-1", PYTHONPATH="")
    assert done.returncode == 2 and "Traceback" not in done.stdout
    (line,) = done.stderr.splitlines()
    remedy = "built without CUDA" if torch.version.cuda is None else "nvidia-smi"
    assert line.startswith("error: torch ") and "sees no GPU" in line and remedy in line


def test_marked_tests_alone_without_a_gpu_are_an_error():
    """They would all be skipped, which looks like success."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, timeout=120)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "CUDA_VISIBLE_DEVICES=''; use CUDA_VISIBLE_DEVICES=0 bash scripts/test.sh -m gpu" in done.stderr


def test_a_failed_assertion_is_told_whole(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(PARTS), *sys.path])
    from xml.etree import ElementTree

    from marked_tests import reason

    outcome = ElementTree.fromstring(
        "<failure message='assert (a...b)'>>  assert x\nE  assert (a, kernel refused) == (a, ())\nE  first</failure>"
    )
    assert reason(outcome) == "assert (a, kernel refused) == (a, ()) first"
    assert reason(ElementTree.fromstring("<skipped message='no GPU' />")) == "no GPU"


def test_what_is_missing_is_one_line(tmp_path):
    """An environment without packages, and a directory that is none."""
    python = tmp_path / "bare" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(Path(sys.base_prefix, "bin", "python3"))
    done = check_gpu(tmp_path, NEMO_EE_VENV=str(tmp_path / "bare"), PYTHONPATH="")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "lacks torch, nemo, megatron" in line
    done = check_gpu(tmp_path, NEMO_EE_VENV=str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith(f"error: NEMO_EE_VENV={tmp_path}: holds no Python")


def test_figures_of_tiny_shapes_stay_out_of_the_docs(tmp_path):
    done = check_gpu(tmp_path, "--quick", "--output", str(ROOT / "docs" / "benchmarks"))
    assert done.returncode == 2 and "give another --output" in done.stderr


@pytest.mark.parametrize(
    "options, said",
    [
        (("--model", "none.nemo"), "no such file"),
        (("--adapter", __file__), "needs --model"),
        (("--seconds", "5"), "at least 60"),
    ],
)
def test_bad_options_are_one_error(tmp_path, options, said):
    done = check_gpu(tmp_path, *options)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1]


def test_without_a_gpu_there_is_nothing_to_check(driver, tmp_path, monkeypatch, capsys):
    import part

    found = part.run("found", part.Settings(tmp_path))
    assert "sees no GPU" in found.facts["no GPU"] and found.faults
    capsys.readouterr()
    monkeypatch.setattr(driver, "PARTS", [driver.Part(name, 9) for name in ("finds no GPU", "passes")])
    monkeypatch.setattr(sys, "argv", ["check.py", "--quick", "--output", str(tmp_path / "out")])
    assert driver.main() == 2
    assert capsys.readouterr().err == "error: none\n" and not (tmp_path / "out").exists()
