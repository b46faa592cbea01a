# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks of decoding as a user runs them, on a tiny Llama: complete pages, no figures that mean anything."""

import json
from pathlib import Path

import pytest

from tests.support import tiny_llama
from tests.support.script import run_script

EARLY_EXIT = {"layers": [1, 2], "head": {"projection": "shortlist", "shortlist_size": 50}}
FILES = ("--model", "base.nemo", "--adapter", "exits.nemo", "--data", "text")


def write_inputs(directory: str) -> None:
    """Hugging Face's files and the same as a .nemo, exits for it, and text; in a process of their own."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from nemo_ee.checkpoint.convert import convert_to_nemo
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model
    from tests.support.tiny_gpt import tiny_trainer

    source, base = tiny_llama.write(Path(directory, "hf")), f"{directory}/base.nemo"
    convert_to_nemo(str(source), base)
    config = Model.restore_from(base, return_config=True, trainer=tiny_trainer())
    model = Model.restore_from(
        base, override_config_path=Model.add_exits(config, EARLY_EXIT), trainer=tiny_trainer()
    )
    torch.manual_seed(0)
    for parameter in model.gpt.exits.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_adapters(f"{directory}/exits.nemo")
    builder = IndexedDatasetBuilder(f"{directory}/text.bin", dtype=np.uint16)
    for row in np.random.default_rng(0).integers(3, 100, (12, 40)):
        builder.add_document(row, [len(row)])
    builder.finalize(f"{directory}/text.idx")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, workers):
    directory = tmp_path_factory.mktemp("decoding")
    workers(1).run(write_inputs, str(directory))
    return directory


def run(directory: Path, script: str, *arguments: str) -> str:
    done = run_script(directory, f"benchmarks/{script}", *FILES, "--output", "out", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_all_ways_side_by_side(workspace):
    run(workspace, "decoding.py", "--hf", "hf", "--quick")
    (row,) = json.loads((workspace / "out/decoding.json").read_text())
    kinds = {way["kind"] for way in row["ways"]}
    assert {"full depth", "early exit", "lossless", "int8", "NeMo", "Hugging Face"} <= kinds
    assert all(call["seconds"] > 0 for way in row["ways"] for call in way["calls"])
    page = (workspace / "out/decoding.md").read_text()
    assert "| full depth x Hugging Face, batch 1, prompt 8 |" in page and str(workspace) not in page
    assert (workspace / "out/decoding.png").stat().st_size > 10_000


def test_lossless_in_pairs_goes_on_where_it_was_stopped(workspace):
    small = ("--batches", "1,2", "--prompts", "8", "--pairs", "3", "--seconds", "0", "--new-tokens", "6")
    printed = run(workspace, "lossless_pairs.py", *small, "--thresholds", "0.1")
    assert "batch 2, prompt 8, threshold 0.1: …" in printed
    cases = json.loads((workspace / "out/lossless_pairs.json").read_text())
    assert [case["equal"] for case in cases] == [3, 3]
    for case in cases:  # exits of random weights are seldom right
        assert case["forecast"]["speed"] >= 1 and 0 <= case["forecast"]["right"] < 0.5
    assert all(len(times) == 3 for case in cases for times in case["decoding_seconds"].values())
    printed = run(workspace, "lossless_pairs.py", *small, "--thresholds", "0.1,0.2")
    assert "threshold 0.1: …" not in printed and "threshold 0.2: …" in printed
    page = (workspace / "out/lossless_pairs.md").read_text()
    assert page.count("| 3 of 3 |") == 4 and (workspace / "out/lossless_pairs.png").stat().st_size > 10_000
