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

    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo
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


def rows_of(directory: Path, subject: str) -> list[dict]:
    return [json.loads(line) for line in (directory / "out" / f"{subject}.jsonl").read_text().splitlines()]


SMALL = ("--prompts", "8", "--new-tokens", "6", "--thresholds", "0.1")


def test_all_ways_side_by_side(workspace):
    small = (*SMALL[:-1], "0", "--batches", "1", "--repeats", "2", "--samplings", "greedy,top-p 0.9")
    run(workspace, "decoding.py", "--hf", "hf", *small)
    (row,) = rows_of(workspace, "decoding")
    ways = row["ways"]
    assert {"full depth", "early exit, 0", "lossless, 0", "int8", "NeMo", "Hugging Face"} <= set(ways)
    assert {"full depth, top-p 0.9", "Hugging Face, top-p 0.9"} <= set(ways)
    assert all(len(way["tokens/s"]) == 2 and min(way["tokens/s"]) > 0 for way in ways.values())
    for name in ("full depth", "lossless, 0", "NeMo", "Hugging Face"):
        assert ways[name]["agreement"] == 1.0 and ways[name]["left"] == 0, name
    assert ways["early exit, 0"]["agreement"] < 1, "exits of random weights are seldom right"
    page = (workspace / "out/decoding.md").read_text()
    assert "### Batch 1, prompt 8" in page and "| Hugging Face |" in page and str(workspace) not in page
    assert (workspace / "out/decoding.png").stat().st_size > 10_000


def test_lossless_in_pairs(workspace):
    small = (*SMALL, "--batches", "1,2", "--pairs", "3", "--seconds", "0")
    printed = run(workspace, "lossless_pairs.py", *small)
    assert "batch 2, prompt 8, threshold 0.1: …" in printed
    rows = rows_of(workspace, "lossless_pairs")
    assert [row["ways"]["lossless"]["equal"] for row in rows] == ["3 of 3"] * 2
    assert all(len(way["tokens/s"]) == 3 for row in rows for way in row["ways"].values())
    page = (workspace / "out/lossless_pairs.md").read_text()
    assert page.startswith("# Lossless against full depth in pairs") and page.count("| 3 of 3 |") == 2


def test_calibrated_thresholds_in_pairs(workspace):
    """Of reports with one threshold per exit; agreement is teacher-forced, and sinks with the target."""
    names = []
    for target, thresholds in ((0.9, [1.0, 0.05]), (0.5, [0.0, 0.0])):
        names.append(f"calibrated_{target}.json")
        report = {"target_agreement": target, "thresholds": thresholds}
        (workspace / names[-1]).write_text(json.dumps(report))
    small = ("--prompts", "8", "--new-tokens", "6", "--batches", "1", "--pairs", "3", "--seconds", "0")
    for way in ("early exit, always", "early exit, bf16"):
        output = ("--way", way, "--calibrated", *names, "--output", way)
        done = run_script(workspace, "benchmarks/lossless_pairs.py", *FILES, *small, *output)
        assert done.returncode == 0, done.stderr[-3000:]
        rows = [
            json.loads(line) for line in (workspace / way / "lossless_pairs.jsonl").read_text().splitlines()
        ]
        assert [(row["case"]["target"], row["case"]["threshold"]) for row in rows] == [
            (0.9, [1.0, 0.05]),
            (0.5, [0.0, 0.0]),
        ]
        strict, lenient = (row["ways"][way] for row in rows)
        assert strict["judged"] == lenient["judged"] == 3 * 5
        assert 0.0 <= lenient["agreement"]["low"] <= lenient["agreement"]["value"] < 1.0
        page = (workspace / way / "lossless_pairs.md").read_text()
        assert (
            page.startswith(f"# {way.capitalize()} against full depth in pairs") and "| agreement |" in page
        )
