# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""scripts/megatron_gpt_ee_tuning.py as a user runs it: what it writes, resumes and refuses."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from nemo_ee.checkpoint import archive
from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint
from tests.support import tiny_llama
from tests.support.distributed import DEFAULT_TIMEOUT
from tests.support.script import run_script
from tests.support.tuning import write_text

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "megatron_gpt_ee_tuning.py"
NAME = "megatron_gpt_ee_tuning.nemo"
STEPS, EVERY = 24, 4


def write_base(source: str, path: str) -> None:
    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

    convert_to_nemo(source, path)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, workers) -> Path:
    """base.nemo and train/validation text of its 100 tokens."""
    folder = tmp_path_factory.mktemp("workspace")
    source = tiny_llama.write(folder / "hf")
    workers(1).run(write_base, str(source), str(folder / "base.nemo"))
    write_text(folder, vocabulary=100)
    return folder


def arguments(workspace: Path, **changes: str) -> list[str]:
    """The command line; changes are dotted keys with ``__`` for the dot, None takes one away."""
    text = f"train:[{workspace}/train],validation:[{workspace}/validation],test:null"
    values = {
        "model.restore_from_path": str(workspace / "base.nemo"),
        "model.early_exit.layers": "[1,3]",
        "model.early_exit.head.shortlist_size": "60",
        "model.early_exit.ridge.tokens": "256",
        "model.data.data_prefix": "{" + text + "}",
        "model.data.seq_length": "16",
        "trainer.max_steps": "4",
        "trainer.val_check_interval": "2",
        "trainer.limit_val_batches": "2",
        "trainer.log_every_n_steps": "1",
        "trainer.precision": "32",
        "model.optim.sched.warmup_steps": "2",
        "exp_manager.explicit_log_dir": str(workspace / "run"),
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in values.items() if value is not None]


def start(folder: Path, given: list[str]) -> subprocess.Popen:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": os.environ.get("HOME", "/"),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *given],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_tuning(folder: Path, given: list[str]) -> tuple[int, str]:
    """Its status, and what it wrote."""
    done = run_script(folder, SCRIPT.name, *given, timeout=DEFAULT_TIMEOUT)
    return done.returncode, done.stdout + done.stderr


def succeed(folder: Path, given: list[str]) -> str:
    status, output = run_tuning(folder, given)
    assert status == 0, output[-3000:]
    return output


def exits_of(path: Path) -> dict[str, torch.Tensor]:
    root = archive.extract(path, f"{path}.content")
    checkpoint = TorchDistCheckpoint(root / archive.WEIGHTS_DIRECTORY)
    return {key: checkpoint.read(key) for key in checkpoint.tensors}


def restored(base: str, exits: str) -> tuple[list[int], bool, dict[str, torch.Tensor]]:
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model
    from tests.support.tiny_nemo import tiny_trainer

    model = Model.restore_with_exits(base, exits, tiny_trainer())
    ids = torch.randint(3, 100, (2, 12))
    with torch.no_grad():
        logits = model.gpt(ids, torch.arange(12).expand(2, 12), None)
    state = {key: value for key, value in model.get_peft_state_dict().items() if value is not None}
    return list(model.early_exit.layers), bool(torch.isfinite(logits).all()), state


@pytest.fixture(scope="module")
def uninterrupted(workspace) -> Path:
    """The exits of a run of STEPS steps, from the command line."""
    run = workspace / "whole"
    process = start(workspace, long_run(workspace, run))
    output, _ = process.communicate(timeout=DEFAULT_TIMEOUT)
    assert process.returncode == 0, output[-3000:]
    return run / "checkpoints" / NAME


def long_run(workspace: Path, run: Path, **changes: str) -> list[str]:
    steps = dict(trainer__max_steps=str(STEPS), trainer__val_check_interval=str(EVERY))
    return arguments(workspace, exp_manager__explicit_log_dir=str(run), **steps, **changes)


def test_it_writes_exits_that_load_onto_their_base(workspace, uninterrupted, workers):
    config = archive.read_config(uninterrupted)
    assert config.base.name == "base.nemo" and list(config.early_exit.layers) == [1, 3]
    assert config.early_exit.tuning.kl_weight == 0.5, "defaults are stored too"
    stored = exits_of(uninterrupted)
    assert all(key.startswith("model.exits.") for key in stored)
    layers, finite, state = workers(1).run(restored, str(workspace / "base.nemo"), str(uninterrupted))[0]
    assert layers == [1, 3] and finite
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[key], value) for key, value in stored.items())
    assert uninterrupted.stat().st_size < (workspace / "base.nemo").stat().st_size


def test_it_logs_every_exit(uninterrupted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(uninterrupted.parents[1]))
    log.Reload()
    tags = log.Tags()["scalars"]
    for n in (1, 3):
        for tag in (f"train_loss/exit_{n}", f"val_loss/exit_{n}", f"val_agreement/exit_{n}"):
            assert tag in tags
        losses = [event.value for event in log.Scalars(f"train_loss/exit_{n}")]
        assert len(losses) == STEPS and all(np.isfinite(losses))
        # One validation before the first step, one every so many steps.
        assert len(log.Scalars(f"val_confidence/exit_{n}")) == 1 + STEPS // EVERY
    objective = [event.value for event in log.Scalars("val_loss")]
    assert objective[-1] < objective[0]


def finished_checkpoints(run: Path) -> list[Path]:
    """Those that a resumed run may start from."""
    return [path for path in run.rglob("*-last") if not Path(f"{path}-unfinished").exists()]


def test_killed_and_resumed_is_uninterrupted(workspace, uninterrupted):
    run = workspace / "killed"
    process = start(workspace, long_run(workspace, run))
    deadline = time.monotonic() + 240
    while not finished_checkpoints(run) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, "it was to be killed at work"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while (left := processes_in(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, "what it started ends with it"
    process.communicate()
    assert not (run / "checkpoints" / NAME).exists()
    output = succeed(workspace, long_run(workspace, run))
    assert "Restored all states" in output or "Restoring states" in output
    expected, found = exits_of(uninterrupted), exits_of(run / "checkpoints" / NAME)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def processes_in(session: int) -> list[list[str]]:
    """Command lines of the processes in a session that still run."""
    found = []
    for each in psutil.process_iter():
        try:
            if os.getsid(each.pid) == session and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each.cmdline())
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def copy_of_run(uninterrupted: Path, folder: Path) -> Path:
    """A finished run without its exits; returns where they were."""
    shutil.copytree(uninterrupted.parents[1], folder)
    exits = folder / "checkpoints" / NAME
    exits.unlink()
    return exits


def test_a_finished_run_writes_the_exits_that_are_missing(workspace, uninterrupted):
    """Killed behind its last checkpoint, or the file deleted: the next start writes what was to be there."""
    exits = copy_of_run(uninterrupted, workspace / "finished")
    given = long_run(workspace, workspace / "finished")
    output = succeed(workspace, given)
    expected = exits_of(uninterrupted)
    assert f"an earlier start did all {STEPS} steps" in output and "was missing" in output
    found = exits_of(exits)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    written = exits.stat().st_mtime_ns
    output = succeed(workspace, [*given, "model.optim.lr=1"])
    assert "nothing was trained now" in output and "was missing" not in output
    assert exits.stat().st_mtime_ns == written


def test_resuming_on_another_base_is_refused(workspace, uninterrupted, tmp_path):
    """One weight differs, and neither shapes nor names do; an adapter given besides changes nothing."""
    exits = copy_of_run(uninterrupted, tmp_path / "run")
    given = long_run(workspace, tmp_path / "run")
    other = tmp_path / "other.nemo"
    changed_base(workspace / "base.nemo", other)
    status, output = run_tuning(workspace, [*given, f"model.restore_from_path={other}"])
    assert status == 1 and "Traceback" not in output, output[-3000:]
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert f"model.restore_from_path={other}: has content hash" in line
    assert "was started on base.nemo" in line and "resume_if_exists=false" in line
    assert not exits.exists()


def changed_base(base: Path, path: Path) -> None:
    """Writes a base that differs by one bit of one tensor."""
    root = archive.extract(base, f"{path}.content")
    checkpoint = TorchDistCheckpoint(root / archive.WEIGHTS_DIRECTORY)
    (place,) = [
        info
        for index, info in checkpoint.metadata.storage_data.items()
        if index.fqn == "model.decoder.final_layernorm.weight"
    ]
    value = checkpoint.read("model.decoder.final_layernorm.weight")
    file = root / archive.WEIGHTS_DIRECTORY / place.relative_path
    content = bytearray(file.read_bytes())
    start = content.index(value.numpy().tobytes(), place.offset)
    content[start] ^= 1
    file.write_bytes(content)
    archive.write_archive(root, path)


def test_a_checkpoint_that_was_being_written_is_no_obstacle(workspace):
    """Killed in the middle of its first checkpoint, a run starts anew; NeMo alone refuses to."""
    run = workspace / "torn"
    torn = run / "checkpoints" / "megatron_gpt_ee_tuning--val_loss=1.000-step=2-consumed_samples=4.0-last"
    torn.mkdir(parents=True)
    Path(f"{torn}-unfinished").touch()
    succeed(workspace, arguments(workspace, exp_manager__explicit_log_dir=str(run)))
    assert (run / "checkpoints" / NAME).exists()
    assert not torn.exists() and not list(run.rglob("*-unfinished"))


def test_two_processes_it_starts_itself(workspace, uninterrupted):
    """TP2 in float32: sums over two halves round differently, and AdamW's first steps are of size lr whatever
    the gradient's, so weights whose gradient is nothing but rounding may differ by some steps' length."""
    run = workspace / "two"
    parallel = dict(trainer__devices="2", model__tensor_model_parallel_size="2")
    succeed(workspace, long_run(workspace, run, **parallel))
    expected, found = exits_of(uninterrupted), exits_of(run / "checkpoints" / NAME)
    for key, value in expected.items():
        rows = min(len(value), len(found[key])) if value.dim() else None
        gap = (found[key][:rows] - value[:rows]).abs().float()
        assert gap.mean() < 1e-4 and gap.max() < 1e-2, key
    (run / "checkpoints" / NAME).unlink()
    assert "was missing" in succeed(workspace, long_run(workspace, run, **parallel))
    again = exits_of(run / "checkpoints" / NAME)
    assert again.keys() == found.keys() and all(torch.equal(again[key], found[key]) for key in found)


def test_bf16(workspace):
    """The default precision; the exits are stored in float32."""
    run = workspace / "bf16"
    succeed(
        workspace, arguments(workspace, exp_manager__explicit_log_dir=str(run), trainer__precision="bf16")
    )
    stored = exits_of(run / "checkpoints" / NAME)
    floats = [value for value in stored.values() if value.is_floating_point()]
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in floats)


def test_an_error_is_one_line_and_a_status(workspace):
    process = start(workspace, arguments(workspace, model__early_exit__layers="[1,30]"))
    output, _ = process.communicate(timeout=DEFAULT_TIMEOUT)
    assert process.returncode == 1
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line == "error: model.early_exit.layers=[1, 30]: [30] not within 1..model.num_layers=4; use 1..4"


def call_script(given: list[str]) -> object:
    """Runs the script in this rank, which has NeMo loaded; returns what it exits with."""
    import runpy

    sys.argv = [str(SCRIPT), *given]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as left:
        return left.code
    return 0


def bad_files(folder: Path, workspace: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    whole = (workspace / "base.nemo").read_bytes()
    (folder / "truncated.nemo").write_bytes(whole[: len(whole) // 2])
    (folder / "text.nemo").write_text("not an archive")
    for name, ids in (("short", [5] * 9), ("foreign", [5, 150] * 40), ("empty", [])):
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
        if ids:
            builder.add_document(ids, [len(ids)])
        builder.finalize(str(folder / f"{name}.idx"))


def text_of(name: str) -> str:
    return "{train:[FOLDER/" + name + "],validation:[WORKSPACE/validation],test:null}"


BAD = {
    "layer out of range": (dict(model__early_exit__layers="[0]"), "model.early_exit.layers=[0]"),
    "no layers": (dict(model__early_exit__layers="[]"), "at least one exit layer"),
    "unknown key": (
        {"+model.early_exit.head.lineer": "true", "model__early_exit__layers": "[1]"},
        "did you mean linear?",
    ),
    "weights": (dict(model__early_exit__tuning__loss_weights="[1]"), "1 weights for 2 exit layers"),
    "a negative weight": (
        dict(model__early_exit__tuning__loss_weights="[1,-1]"),
        "loss_weights=-1.0: must not be negative",
    ),
    "threshold": (dict(model__early_exit__inference__threshold="1.5"), "within [0, 1]"),
    "shortlist above the vocabulary": (
        dict(model__early_exit__head__shortlist_size="101"),
        "model.early_exit.head.shortlist_size=101",
    ),
    "no base": (dict(model__restore_from_path="FOLDER/none.nemo"), "none.nemo"),
    "truncated base": (dict(model__restore_from_path="FOLDER/truncated.nemo"), "truncated.nemo"),
    "not a base": (dict(model__restore_from_path="FOLDER/text.nemo"), "text.nemo"),
    "short text": (dict(model__data__data_prefix=text_of("short")), "at least one sequence of 16 tokens"),
    "empty text": (dict(model__data__data_prefix=text_of("empty")), "empty"),
    "missing text": (dict(model__data__data_prefix=text_of("missing")), "missing"),
    "foreign text": (dict(model__data__data_prefix=text_of("foreign")), "has 5 to 150"),
    "TP above the processes": (dict(model__tensor_model_parallel_size="3"), "tensor_model_parallel_size=3"),
    "PP does not divide": (
        dict(model__num_layers_in_first_pipeline_stage="3"),
        "4 layers with num_layers_in_first_pipeline_stage=3",
    ),
    "sequence too long": (dict(model__data__seq_length="65"), "encoder_seq_length=64"),
    "no exit parameter": (
        {
            "model.early_exit.init": "copy",
            "model.early_exit.head": "{mlp: false, norm: false, linear: false, projection: tied}",
        },
        "no exit parameter would be tuned",
    ),
    "nothing given": (
        dict(model__restore_from_path=None, model__data__data_prefix=None),
        "error: model.restore_from_path=???: is required; set model.restore_from_path=…",
    ),
    "no steps": (dict(trainer__max_steps="0"), "trainer.max_steps=0: not one training step was made"),
    "half precision without a GPU": (dict(trainer__precision="16"), "needs a GPU"),
    "adapter of nothing": (dict(model__adapter_path="FOLDER/none.nemo"), "none.nemo"),
    "a full checkpoint as adapter": (dict(model__adapter_path="WORKSPACE/base.nemo"), "not exits alone"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, workspace, workers, tmp_path):
    changes, message = BAD[case]
    bad_files(tmp_path, workspace)
    changes = {
        key: value and value.replace("FOLDER", str(tmp_path)).replace("WORKSPACE", str(workspace))
        for key, value in changes.items()
    }
    run = tmp_path / "run"
    given = arguments(workspace, **{"exp_manager__explicit_log_dir": str(run), **changes})
    (left,) = workers(1).run(call_script, given)
    assert isinstance(left, str) and left.startswith("error: "), left
    assert message in left
    assert not run.exists(), "neither checkpoints nor logs"


def processes_of(run: Path) -> dict[int, tuple[int, list[str]]]:
    """Process -> parent and command line, of all that work for a run; writers of checkpoints among them."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            line = (folder / "cmdline").read_text().split("\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if f"exp_manager.explicit_log_dir={run}" in line:
            found[int(folder.name)] = parent, line
    return found


def at_work(process: subprocess.Popen, run: Path) -> None:
    """Waits for a run's first checkpoint."""
    deadline = time.monotonic() + 240
    while not finished_checkpoints(run) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0][-3000:]


@pytest.mark.slow
def test_asked_to_end_and_resumed_is_uninterrupted(workspace, uninterrupted):
    """As sbatch --signal=TERM@300 asks: a checkpoint, status 0, and no exits yet."""
    run = workspace / "asked"
    process = start(workspace, long_run(workspace, run))
    at_work(process, run)
    process.terminate()
    output, _ = process.communicate(timeout=DEFAULT_TIMEOUT)
    assert process.returncode == 0 and "SIGTERM was received" in output, output[-3000:]
    assert not (run / "checkpoints" / NAME).exists()
    succeed(workspace, long_run(workspace, run))
    expected, found = exits_of(uninterrupted), exits_of(run / "checkpoints" / NAME)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_gone_ends_the_run_by_name(number, workspace):
    """Two processes that the script starts itself; nothing of them is left behind."""
    run = workspace / f"lost_{number}"
    changes = dict(
        trainer__devices="2",
        model__pipeline_model_parallel_size="2",
        model__distributed_timeout_minutes="0.5",
        trainer__max_steps="100000",
    )
    process = start(workspace, [*long_run(workspace, run), *arguments_of(changes)])
    at_work(process, run)
    (second,) = (
        pid
        for pid, (parent, line) in processes_of(run).items()
        if parent == process.pid and any("train_ddp_process_1" in argument for argument in line)
    )
    os.kill(second, number)
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        for pid in processes_of(run):
            if process.poll() is None:
                os.kill(pid, signal.SIGKILL)
    assert process.returncode != 0 and "error: rank 1 (" in output, output[-3000:]
    deadline = time.monotonic() + 20
    while processes_of(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(run)


def arguments_of(changes: dict[str, str]) -> list[str]:
    return [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
