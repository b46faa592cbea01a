# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""scripts/megatron_gpt_ee_generate.py on tiny checkpoints: base and exits, merged, in parallel, bad input."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from nemo_ee.files.output import claim
from tests.support.script import ROOT, run_script

HEAD = dict(block=True, mlp=True, linear=True, projection="shortlist", shortlist_size=100)
PROMPTS = ["w1 w2 w3", "w9 w10 w11 w12 w13", "w40"]
ARGUMENTS = ["inference.tokens_to_generate=8", "early_exit.threshold=0.6", "early_exit.always=true"]


def write_checkpoints(directory):
    """A full model, its base and its exits alone; returns what the model itself generates."""
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel
    from tests.support.tiny_gpt import fill, tiny_model, tiny_model_config, tiny_trainer

    config = tiny_model_config(head=HEAD, share_embeddings_and_output_weights=False)
    full = tiny_model(config)
    full.save_to(f"{directory}/full.nemo")
    plain = tiny_model_config(share_embeddings_and_output_weights=False)
    del plain.early_exit
    tiny_model(plain).save_to(f"{directory}/base.nemo")
    with_exits = MegatronGPTEarlyExitModel.add_exits(
        MegatronGPTEarlyExitModel.restore_from(
            f"{directory}/base.nemo", return_config=True, trainer=tiny_trainer()
        ),
        config.early_exit,
    )
    model = MegatronGPTEarlyExitModel.restore_from(
        f"{directory}/base.nemo", override_config_path=with_exits, trainer=tiny_trainer()
    )
    fill(model)
    model.save_adapters(f"{directory}/exits.nemo")
    full.prepare_decoding()  # as the script does
    return full.generate(
        PROMPTS, dict(max_length=8), dict(add_BOS=False), early_exit=dict(threshold=0.6, always=True)
    )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, workers):
    directory = tmp_path_factory.mktemp("generate")
    (expected,) = workers(1).run(write_checkpoints, str(directory))
    return directory, expected


def run(directory, *overrides):
    return run_script(directory, "megatron_gpt_ee_generate.py", *overrides)


def in_process(directory, overrides):
    """The script's own steps in this rank, without paying for imports; returns the records written."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder
    from nemo_ee.running.generate import run as generate
    from nemo_ee.running.settings import GenerateConfig

    os.chdir(directory)
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        values = OmegaConf.to_container(compose("megatron_gpt_ee_generate", overrides), resolve=True)
    trainer = values.pop("trainer")
    config = GenerateConfig.from_dict({**values, "precision": trainer["precision"]})
    settings = OmegaConf.create({"trainer": trainer, "model": {"precision": config.precision}})
    generate(config, EarlyExitTrainerBuilder(settings).create_trainer())
    torch.distributed.barrier()  # rank 0 writes the file
    return read(Path(config.output_file)) if config.output_file else None


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expect(records, expected, off=1e-4):
    assert [record["prompt"] for record in records] == PROMPTS
    for record, ids, exits in zip(records, expected["token_ids"], expected["early_exit"], strict=True):
        assert record["token_ids"] == ids[-8:]
        assert record["exit_layers"] == exits["exit_layers"] and record["finish_reason"] == "length"
        assert record["confidences"] == pytest.approx(exits["confidences"], rel=off)
        shown = "".join(record["tokens"]).replace(
            "<bos>", ""
        )  # special tokens are shown, though not in the text
        assert shown.split() == record["text"].split()


def test_base_and_exits_from_the_command_line(workspace):
    directory, expected = workspace
    prompts = f"prompts={json.dumps(PROMPTS)}"
    result = run(
        directory,
        "gpt_model_file=base.nemo",
        "adapter_file=exits.nemo",
        prompts,
        *ARGUMENTS,
        "output_file=out.jsonl",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    records = read(directory / "out.jsonl")
    expect(records, expected)
    layers = records[0]["exit_layers"]
    first_line = "".join(
        f"{piece}[{layer}]" for piece, layer in zip(records[0]["tokens"], layers, strict=True)
    )
    assert first_line in result.stdout and "wrote out.jsonl" in result.stdout
    assert len({layer for record in records for layer in record["exit_layers"]}) > 1


def test_merged_checkpoint_prompts_file_and_batches_of_one(workspace, workers):
    directory, expected = workspace
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in PROMPTS))
    overrides = [
        "gpt_model_file=full.nemo",
        "prompts_file=prompts.jsonl",
        "batch_size=1",
        "output_file=merged.jsonl",
    ]
    (records,) = workers(1).run(in_process, directory, overrides + ARGUMENTS)
    expect(records, expected)


def test_two_processes(workspace, workers):
    directory, expected = workspace
    overrides = ["gpt_model_file=base.nemo", "adapter_file=exits.nemo", f"prompts={json.dumps(PROMPTS)}"]
    overrides += ["trainer.devices=2", "tensor_model_parallel_size=2", "output_file=tp2.jsonl"]
    records, _ = workers(2).run(in_process, directory, overrides + ARGUMENTS)
    expect(
        records, expected, 0.05
    )  # each rank rounds its columns of an MLP's rows to 8 bits by their own largest


def test_chat_wraps_prompts_in_the_template(workspace, workers):
    directory, _ = workspace
    base = ["gpt_model_file=full.nemo", "inference.logprobs=2", "inference.prompt_logprobs=0", *ARGUMENTS]
    chat = [*base, 'prompts=["w5 w6"]', "chat=true", "output_file=chat.jsonl"]
    plain = [*base, 'prompts=["user w5 w6 <eos> assistant"]', "output_file=plain.jsonl"]
    (one,), (other,) = (
        workers(1).run(in_process, directory, chat),
        workers(1).run(in_process, directory, plain),
    )
    assert one[0]["token_ids"] == other[0]["token_ids"]
    said, prompt = one[0]["logprobs"], one[0]["prompt_logprobs"]
    assert [each["token_id"] for each in said] == one[0]["token_ids"]
    assert all(len(each["top_logprobs"]) == 2 for each in said) and prompt[0] is None and len(prompt) == 5
    assert [math.exp(each["logprob"]) for each in said] == pytest.approx(one[0]["confidences"], rel=1e-4)


def test_bad_input_ends_in_one_clear_error(workspace):
    directory, _ = workspace
    result = run(
        directory,
        "gpt_model_file=full.nemo",
        "prompts=[w1]",
        "early_exit.threshold=1.5",
        "output_file=no.jsonl",
    )
    assert result.returncode == 1
    assert "error: early_exit.threshold=1.5" in result.stderr and "Traceback" not in result.stderr
    assert not list(directory.glob("no.jsonl*"))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["prompts=null"], "exactly one of prompts and prompts_file"),
        (["prompts=[]"], "at least one prompt"),
        (["prompts=null", "prompts_file=none.txt"], "prompts_file=none.txt: there is no such file"),
        (["color=red"], "color=red: not one of auto, always, never"),
        (["early_exit.exits=[5]"], r"early_exit.exits=\[5\]|not all of the model's exits"),
        (["inference.greedy=false", "inference.temperature=0"], "inference.temperature=0.0"),
        (["+inference.topk=3"], "inference.topk=3: unknown key; did you mean top_k"),
        (["output_file=missing/out.jsonl"], "output_file=missing/out.jsonl: its directory does not exist"),
        (["tensor_model_parallel_size=2"], "trainer.devices=1"),
        (["adapter_file=full.nemo"], "is a full checkpoint, not exits alone"),
        (["gpt_model_file=exits.nemo"], "exits only"),
        (["gpt_model_file=none.nemo"], "none.nemo"),
        (["prompts=['w1','']"], "prompt 1: it has no tokens"),
    ],
)
def test_refused_before_anything_is_written(workspace, workers, overrides, message):
    from tests.support.distributed import WorkerError

    directory, _ = workspace
    usual = ["gpt_model_file=full.nemo", "prompts=[w1]", "output_file=no.jsonl"]
    with pytest.raises(WorkerError, match=message):
        workers(1).run(in_process, directory, usual + overrides)
    assert not list(directory.glob("no.jsonl*"))


def on_a_full_disk(directory, overrides):
    """What is said where the disk turns out to be full when the output is flushed to it."""
    import errno

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = full
    try:
        in_process(directory, overrides)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_a_full_disk_or_another_run_leaves_the_old_output(workspace, workers):
    directory = workspace[0]
    (directory / "old.jsonl").write_text("old")
    before = sorted(path.name for path in directory.iterdir())
    given = ["gpt_model_file=full.nemo", "prompts=[w1]", "output_file=old.jsonl", *ARGUMENTS]
    (said,) = workers(1).run(on_a_full_disk, directory, given)
    assert (
        said
        == "OutputError: old.jsonl: cannot be written: the disk is full; make room, or write to another disk"
    )
    with claim(directory / "old.jsonl"):
        (said,) = workers(1).run(on_a_full_disk, directory, given)
    assert said.startswith(f"OutputError: old.jsonl: process {os.getpid()} on ")
    assert (directory / "old.jsonl").read_text() == "old"
    assert sorted(path.name for path in directory.iterdir()) == before
