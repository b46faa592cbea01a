# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers with gaps, with fewer tokens than the embedding has rows, and with more: Hugging Face's texts."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from nemo_ee.errors import ConfigError, GenerationError
from tests.support import tiny_llama

ROWS = {"spare": 300, "gap": 260, "far gap": 700, "rowless": 90}
"""Kind -> rows of the embedding; the tokenizer has 100 tokens."""
FAR = {"gap": 250, "far gap": 650}
"""The id of the last token, where there is a gap before it."""
LENGTH = 12


def write(kind: str, folder: Path) -> Path:
    tiny_llama.write(folder, vocab_size=ROWS[kind])
    tiny_llama.tokenizer(100).save_pretrained(folder)
    if kind in FAR:
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        content["model"]["vocab"]["w76"] = FAR[kind]
        file.write_text(json.dumps(content))
    return folder


def continuations(kind: str, folder: str) -> tuple[list, list, int, str]:
    """Greedy ids behind three prompts, Hugging Face's and ours; our vocabulary; the error for a bad prompt."""
    from nemo.utils import logging
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel
    from tests.support.tiny_nemo import tiny_trainer

    source = write(kind, Path(folder, "hf"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    network = AutoModelForCausalLM.from_pretrained(source)
    texts = ["the cat sat", "a dog ran to the layer", "w76 is on" if kind in FAR else "state is on"]
    theirs = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        theirs.append(network.generate(ids, max_new_tokens=LENGTH, do_sample=False)[0].tolist())
    with patch.object(logging, "warning") as warning:
        convert_to_nemo(source, f"{folder}/m.nemo")
    (told,) = [str(call.args[0]) for call in warning.call_args_list if "no row" in str(call.args[0])] or [""]
    assert told.startswith("10 tokens" if kind == "rowless" else ""), told
    model = MegatronGPTEarlyExitModel.restore_from(f"{folder}/m.nemo", trainer=tiny_trainer()).eval()
    lengths, sampling = dict(max_length=LENGTH, min_length=0), dict(use_greedy=True, compute_logprob=False)
    ours = model.generate(texts, lengths, sampling)["token_ids"]
    ids = torch.tensor([theirs[2]])
    again = model.generate((ids, torch.tensor([ids.shape[1]])), lengths, sampling)["token_ids"][0]
    assert again[: ids.shape[1]] == theirs[2]
    bad = "the w75 sat" if kind == "rowless" else None
    if bad is None:
        outside = torch.tensor([[3, ROWS[kind]]])
        bad = (outside, torch.tensor([2]))
    with pytest.raises(GenerationError) as error:
        model.generate([bad] if isinstance(bad, str) else bad, lengths, sampling)
    return theirs, ours, model.true_vocab_size, str(error.value)


@pytest.mark.parametrize("kind", ["spare", "gap", pytest.param("far gap", marks=pytest.mark.slow), "rowless"])
def test_texts_are_hugging_faces(kind, workers, tmp_path):
    theirs, ours, rows, message = workers(1).run(continuations, kind, str(tmp_path))[0]
    assert ours == theirs
    chosen = {token for ids in theirs for token in ids}
    if kind != "rowless":  # else the test would not tell
        assert max(chosen) >= 128
        assert f"token id {rows} is not in the vocabulary" in message
    else:
        assert "'w75' has the id 98" in message and "ids below 90" in message
    assert rows == ROWS[kind]


def rows_of_a_new_model(folder: str) -> tuple:
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from omegaconf import OmegaConf

    from nemo_ee.generation.text import TextTokenizer
    from nemo_ee.models.vocabulary import used_rows

    tokenizer = AutoTokenizer(str(write("far gap", Path(folder, "hf"))))
    with pytest.raises(ConfigError) as error:
        used_rows(OmegaConf.create({}), TextTokenizer(tokenizer), 128)
    (fault,) = error.value.faults
    key, divisor = fault.remedy.removeprefix("set ++model.").split("=")
    padded = -(-tokenizer.vocab_size // int(divisor)) * int(divisor)  # as NeMo pads at TP 1
    return fault.rule, used_rows(OmegaConf.create({key: int(divisor)}), TextTokenizer(tokenizer), padded)


def test_a_new_model_without_rows_for_all_ids_is_refused_with_what_works(workers, tmp_path):
    rule, rows = workers(1).run(rows_of_a_new_model, str(tmp_path))[0]
    assert rule == "makes 128 rows for 100 tokens, and 651 are needed" and rows == 651
