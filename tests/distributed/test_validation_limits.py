# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Validations have as many global batches, and come as often, as the command line of both scripts asks."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import tiny_llama
from tests.support.tuning import write_text

ROOT = Path(__file__).resolve().parents[2]
STEPS, SEQUENCE, BATCH = 4, 16, 4

NONE = "{train:[T],validation:null,test:null}"
ONE = "{train:[T],validation:[V],test:null}"
TWO = "{train:[T],validation:[V,T],test:null}"
WEIGHTED = "{train:[T],validation:[0.3,T,0.7,V],test:null}"

CASES = {
    # data_prefix, further overrides, steps between validations (None: there are none), their batches
    "no validation data": (NONE, {}, None, 0),
    "none by share": ("[T]", {"model.data.splits_string": "'1000,0,0'"}, None, 0),
    "test data alone": ("[T]", {"model.data.splits_string": "'900,0,100'"}, None, 0),
    "no validations of a blend": (WEIGHTED, {"trainer.limit_val_batches": "0"}, None, 0),
    "0.0": (WEIGHTED, {"trainer.limit_val_batches": "0.0"}, None, 0),
    "a blend, split": ("[0.3,T,0.7,V]", {"model.data.splits_string": "'700,200,100'"}, 2, 3),
    "a blend": (WEIGHTED, {}, 2, 3),
    "half": (ONE, {"trainer.limit_val_batches": "0.5"}, 2, (0.5, "V")),
    "nine tenths of two": (TWO, {"trainer.limit_val_batches": "0.9"}, 2, (0.9, "VT")),
    "all": (ONE, {"trainer.limit_val_batches": "1.0"}, 2, (1.0, "V")),
    "all of two, and no more": (TWO, {"trainer.limit_val_batches": "999"}, 2, (1.0, "VT")),
    "more than one reads as often as needed": (ONE, {"trainer.limit_val_batches": "50"}, 2, 50),
    "a quarter of the steps": (ONE, {"trainer.val_check_interval": "0.25"}, 1, 3),
    "at the end": (ONE, {"trainer.val_check_interval": "1.0"}, 4, 3),
}
ERRORS = {
    "a share of a weighted blend": (
        WEIGHTED,
        {"trainer.limit_val_batches": "0.5"},
        "trainer.limit_val_batches=0.5: a weighted blend has no end that this could be a share of; use a number "
        "of global batches, e.g. trainer.limit_val_batches=50",
    ),
    "less than a batch": (
        ONE,
        {"trainer.limit_val_batches": "0.01"},
        "trainer.limit_val_batches=0.01: is less than one of the ",
    ),
    "no number": (
        ONE,
        {"trainer.limit_val_batches": "1.5"},
        "trainer.limit_val_batches=1.5: must be a number",
    ),
    "below none": (
        ONE,
        {"trainer.limit_val_batches": "-1"},
        "trainer.limit_val_batches=-1: must be a number",
    ),
    "no interval": (
        ONE,
        {"trainer.val_check_interval": "0"},
        "trainer.val_check_interval=0: must be a number",
    ),
    "no end": (ONE, {"trainer.max_steps": "-1"}, "trainer.max_steps=-1: datasets are built for"),
    "no time": (
        ONE,
        {"exp_manager.max_time_per_run": "3h"},
        "exp_manager.max_time_per_run=3h: must be a time as days:hours:minutes:seconds; write e.g. 00:03:50:00",
    ),
    "no time for others": (
        ONE,
        {"model.distributed_timeout_minutes": "0"},
        "model.distributed_timeout_minutes=0: must be a number of minutes above 0; use e.g. 30, or null",
    ),
    "no steps between": (
        ONE,
        {"exp_manager.checkpoint_callback_params.every_n_train_steps": "-5"},
        "every_n_train_steps=-5: must be a number of steps; use 1 or more, or null",
    ),
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, workers) -> Path:
    """base.nemo, its tokenizer, and text of its 100 tokens."""
    folder = tmp_path_factory.mktemp("workspace")
    tiny_llama.write(folder / "hf")
    workers(1).run(write_base, str(folder))
    write_text(folder, vocabulary=100)
    return folder


def write_base(folder: str) -> None:
    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

    convert_to_nemo(f"{folder}/hf", f"{folder}/base.nemo")


def arguments(kind: str, workspace: Path, run: str, data: str, changes: dict[str, str], world: int) -> list:
    text = data.replace("T", str(workspace / "train")).replace("V", str(workspace / "validation"))
    values = {
        "model.early_exit.layers": "[1,3]",
        "model.data.data_prefix": text,
        "model.micro_batch_size": "2",
        "model.global_batch_size": str(BATCH),
        "model.optim.sched.warmup_steps": "2",
        "model.pipeline_model_parallel_size": str(world),
        "trainer.devices": str(world),
        "trainer.max_steps": str(STEPS),
        "trainer.val_check_interval": "2",
        "trainer.limit_val_batches": "3",
        "trainer.precision": "32",
        "+trainer.enable_progress_bar": "false",
        "exp_manager.explicit_log_dir": f"{workspace}/{run}",
        "exp_manager.create_tensorboard_logger": "false",
        "+exp_manager.seconds_to_sleep": "0",
    }
    if kind == "pretraining":
        values |= {
            "model.tokenizer.type": str(workspace / "hf"),
            "model.encoder_seq_length": str(SEQUENCE),
            "model.num_layers": "4",
            "model.hidden_size": "32",
            "model.ffn_hidden_size": "64",
            "model.num_attention_heads": "4",
        }
    else:
        values |= {
            "model.restore_from_path": str(workspace / "base.nemo"),
            "model.data.seq_length": str(SEQUENCE),
            "model.early_exit.head.shortlist_size": "60",
            "model.early_exit.init": "random",
            "model.validate_at_start": "false",
        }
    return [f"{key}={value}" for key, value in {**values, **changes}.items()]


def run_script(kind: str, given: list[list[str]]) -> list[tuple]:
    """Runs a script in this rank once per command line; what it exits with, and (step, batches) of validations."""
    from nemo_ee.models.megatron_gpt_ee_pretraining_model import MegatronGPTEEPretrainingModel
    from nemo_ee.models.megatron_gpt_ee_tuning_model import MegatronGPTEETuningModel

    model = MegatronGPTEEPretrainingModel if kind == "pretraining" else MegatronGPTEETuningModel
    step, end, seen, batches = model.validation_step, model.on_validation_epoch_end, [], []

    def validation_step(self, dataloader_iter, dataloader_idx=0):
        batches.append(1)
        return step(self, dataloader_iter, dataloader_idx)

    def on_validation_epoch_end(self):
        seen.append((self.trainer.global_step, len(batches)))
        batches.clear()
        return end(self)

    model.validation_step, model.on_validation_epoch_end = validation_step, on_validation_epoch_end
    script, results = ROOT / "scripts" / f"megatron_gpt_ee_{kind}.py", []
    for arguments in given:
        sys.argv, left = [str(script), *arguments], 0
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as raised:
            left = raised.code
        results.append((left, tuple(seen)))
        seen.clear()
    return results


def global_batches(workspace: Path, names: str) -> int:
    """Whole global batches of validation text, each dataset cut into sequences by itself."""
    files = {"T": "train", "V": "validation"}
    tokens = [len(np.fromfile(workspace / f"{files[name]}.bin", np.uint16)) for name in names]
    return sum((count - 1) // SEQUENCE for count in tokens) // BATCH


def written(workspace: Path, run: str) -> list[str]:
    """What is there of a run's last step."""
    names = [path.name for path in (workspace / run / "checkpoints").iterdir()]
    return sorted(name for name in names if name.endswith(".nemo") or f"-step={STEPS}-" in name)


@pytest.mark.parametrize("kind", ["pretraining", pytest.param("tuning", marks=pytest.mark.slow)])
def test_as_many_batches_as_asked(kind, workspace, workers):
    given = [
        arguments(kind, workspace, f"{kind}{i}", data, changes, 1)
        for i, (data, changes, _, _) in enumerate(CASES.values())
    ]
    for (_, _, interval, _), line in zip(CASES.values(), given, strict=True):
        if interval is not None:
            line.append("exp_manager.checkpoint_callback_params.save_top_k=0")  # saves the tests' time
    (results,) = workers(1).run(run_script, kind, given)
    for i, (name, (_, _, interval, wanted)) in enumerate(CASES.items()):
        left, seen = results[i]
        if isinstance(wanted, tuple):
            wanted = int(wanted[0] * global_batches(workspace, wanted[1]))
        steps = [] if interval is None else range(interval, STEPS + 1, interval)
        assert left == 0 and list(seen) == [(step, wanted) for step in steps], name
        files = written(workspace, f"{kind}{i}")
        assert [file for file in files if file.endswith("-last")] and files[-1].endswith(".nemo"), name


@pytest.mark.parametrize("kind", ["pretraining", "tuning"])
def test_what_cannot_be_is_one_error(kind, workspace, workers):
    given = [arguments(kind, workspace, "error", data, changes, 1) for data, changes, _ in ERRORS.values()]
    (results,) = workers(1).run(run_script, kind, given)
    for (name, (_, _, message)), (left, seen) in zip(ERRORS.items(), results, strict=True):
        assert str(left).startswith("error: ") and message in left and "\n" not in left and not seen, name


@pytest.mark.parametrize("kind", ["pretraining", "tuning"])
def test_two_stages_need_no_validation(kind, workspace, workers):
    given = [arguments(kind, workspace, f"{kind}_stages", NONE, {}, 2)]
    assert workers(2).run(run_script, kind, given) == [[(0, ())]] * 2
    files = written(workspace, f"{kind}_stages")
    assert len(files) == 2 and files[0].endswith("-last") and files[1].endswith(".nemo")
