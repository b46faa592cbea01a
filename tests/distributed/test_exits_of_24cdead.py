# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Files written by the code of commit 24cdead, when `head.mlp` was a truth value: they compute what they did then.

`checkpoints.tar.xz` has a base of 24 tokens, exits tuned on it and whole models, one head of each kind; `said.json`
what that code said of them: logits [S, B, rows] of the first positions, greedy texts, and `sections` of `early_exit`
with the head that was read from each.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from nemo_ee.checkpoint import archive
from nemo_ee.checkpoint.exits import adapter
from nemo_ee.config import parse_early_exit

FOLDER = Path(__file__).parents[1] / "fixtures" / "exits_24cdead"
SAID = json.loads((FOLDER / "said.json").read_text())
FILES = ["residual_whole", "residual_exits", "beside_whole", "beside_exits", "beside_block_exits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    there = tmp_path_factory.mktemp("files")
    with tarfile.open(FOLDER / "checkpoints.tar.xz") as files:
        files.extractall(there, filter="data")
    return there


def word(kind: str) -> str:
    return kind.partition("_")[0]


def words_of(path: Path) -> str:
    return archive.read_config(path).early_exit.head.mlp


def says(folder: Path, files: list[str]) -> dict[str, dict]:
    """What models of these files say now, by file; writes each again, as `new_…`."""
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model
    from tests.support.tiny_gpt import tiny_trainer

    found = {}
    for file in files:
        kind, _, form = file.rpartition("_")
        path, then = folder / f"{file}.nemo", SAID["models"][kind]
        if form == "whole":
            model = Model.restore_from(str(path), trainer=tiny_trainer()).eval()
        else:
            model = Model.restore_with_exits(folder / "base.nemo", path, tiny_trainer()).eval()
        ids = torch.tensor(then["tokens"])
        with torch.no_grad():
            states = model.gpt.forward_states(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
            weight = model.gpt.output_weight()
            logits = {"final": torch.nn.functional.linear(states.output, weight)}
            for n, head in model.gpt.exits.items():
                state = head(states.exits[int(n)], None, states.rotary_pos_emb)
                logits[n] = head.projection.local_logits(state, weight)
        lengths, length = torch.tensor([len(row) for row in then["tokens"]]), 6
        answer = model.generate(
            (ids, lengths),
            dict(max_length=length),
            dict(use_greedy=True),
            early_exit=dict(threshold=then["threshold"], always=True),
        )
        found[file] = dict(logits={n: value[:3] for n, value in logits.items()}, answer=answer)
        save = model.save_to if form == "whole" else model.save_adapters
        save(str(folder / f"new_{file}.nemo"))
    return found


def test_they_compute_what_they_did(folder, workers):
    (found,) = workers(1).run(says, folder, FILES)
    for file, now in found.items():
        kind = file.rpartition("_")[0]
        then = SAID["models"][kind]
        assert now["logits"].keys() == then["logits"].keys()
        for n, logits in then["logits"].items():
            # Summed in other orders on other machines.
            torch.testing.assert_close(now["logits"][n], torch.tensor(logits), rtol=1e-5, atol=1e-5)
        assert [list(row) for row in now["answer"]["token_ids"]] == then["token_ids"]
        for mine, other in zip(now["answer"]["early_exit"], then["early_exit"], strict=True):
            assert mine["exit_layers"] == other["exit_layers"]
            assert mine["confidences"] == pytest.approx(other["confidences"], rel=1e-4)
        assert any(n < 3 for one in then["early_exit"] for n in one["exit_layers"]), "exits were used"
        assert words_of(folder / f"{file}.nemo") is True
        assert words_of(folder / f"new_{file}.nemo") == word(kind), "and is written in today's words"


@pytest.mark.parametrize("kind", SAID["models"])
def test_merged_they_have_todays_words(kind, folder):
    path = adapter.merge(folder / "base.nemo", folder / f"{kind}_exits.nemo", folder / f"merged_{kind}.nemo")
    assert words_of(path) == word(kind)


@pytest.mark.parametrize("section, then", SAID["sections"])
def test_sections_mean_what_they_did(section, then):
    read = parse_early_exit(section, 3)
    kind = ("beside" if then["linear"] else "residual") if then["mlp"] else "none"
    assert read.to_dict()["head"] == {**then, "mlp": kind}
    stored = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(read.to_dict())))
    assert parse_early_exit(stored, 3) == parse_early_exit({**section, "head": then}, 3) == read
