# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A byte-level BPE tokenizer is learned from the training documents alone and loads as any other."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from nemo_ee.data.split import assign_splits
from nemo_ee.data.tokenizer import TokenizerConfig
from nemo_ee.errors import ConfigError, DataError
from nemo_ee.preprocessing.document_tokenizer import DocumentTokenizer
from nemo_ee.preprocessing.preprocess import preprocess
from nemo_ee.preprocessing.preprocess_config import PreprocessConfig
from nemo_ee.preprocessing.tokenizer_training import TokenizerTrainingConfig, train_tokenizer

SPLIT = {"train": 0.75, "validation": 0.25, "test": 0.0}
COUNT = 40
LABELS = assign_splits(COUNT, {"train": 0.75, "validation": 0.25}, 7)
WORDS = {"train": "xylophone", "validation": "quagmire"}
TEXTS = [f"{number} {' '.join([WORDS[label]] * 5)}" for number, label in enumerate(LABELS)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    records = ["", *TEXTS[:20], TEXTS[3], *TEXTS[20:]]  # an empty one and a repeated one, which do not count
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
    return path


def config(source, **overrides):
    values = dict(input=str(source), output=str(source.parent / "tokenizer"), vocabulary_size=300, seed=7)
    return TokenizerTrainingConfig.from_dict({**values, "split": SPLIT, **overrides})


def test_learns_from_the_documents_that_preprocessing_trains_on(source):
    trained = train_tokenizer(config(source))
    out = str(source.parent / "data")
    counts = preprocess(
        PreprocessConfig.from_dict(
            dict(
                input=str(source),
                output_prefix=out,
                tokenizer={"type": str(source.parent / "tokenizer")},
                split=SPLIT,
                seed=7,
                workers=1,
            )
        )
    )
    assert trained.documents == counts["splits"]["train"]["documents"] == LABELS.count("train")
    vocabulary = AutoTokenizer.from_pretrained(source.parent / "tokenizer").get_vocab()
    assert "Ġxylophone" in vocabulary
    assert not any("qu" in token for token in vocabulary), "a word of held-out documents"
    assert trained.vocabulary_size == len(vocabulary) == counts["vocabulary_size"] <= 300
    assert trained.bytes_per_token > 2


def test_any_text_survives_and_documents_end(source):
    train_tokenizer(config(source))
    folder = str(source.parent / "tokenizer")
    tokenizer, theirs = DocumentTokenizer(TokenizerConfig(type=folder)), AutoTokenizer.from_pretrained(folder)
    text = " Grüße,\n\n  \u4f60\u597d \U0001f600 ."
    ids = tokenizer.encode(text)
    assert theirs.decode(ids) == text and tokenizer.eod not in ids
    assert theirs.convert_ids_to_tokens(tokenizer.eod) == "<|endoftext|>"


def test_without_a_split_all_documents_count(source):
    assert train_tokenizer(config(source, split=None)).documents == COUNT


def test_an_existing_directory_is_replaced_on_request_only(source):
    train_tokenizer(config(source))
    with pytest.raises(DataError, match="^output=.*overwrite=true"):
        train_tokenizer(config(source))
    train_tokenizer(config(source, overwrite=True, end_of_text="<end>"))
    assert AutoTokenizer.from_pretrained(source.parent / "tokenizer").eos_token == "<end>"
    assert sorted(path.name for path in source.parent.iterdir()) == ["in.jsonl", "tokenizer"]


def test_a_file_in_the_way_is_never_replaced(source):
    with pytest.raises(DataError, match="must not exist yet; choose another"):
        train_tokenizer(config(source, output=str(source), overwrite=True))


def test_the_shipped_settings_are_the_defaults_of_the_class():
    file = Path(__file__).resolve().parents[2] / "conf" / "train_tokenizer.yaml"
    values = OmegaConf.to_container(OmegaConf.load(file))
    del values["defaults"], values["hydra"]
    shipped = TokenizerTrainingConfig.from_dict({**values, "input": "in", "output": "out"})
    split = {"train": 0.9, "validation": 0.1}
    assert shipped == TokenizerTrainingConfig(input="in", output="out", split=split)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"vocabulary_size": 257}, "vocabulary_size=257"),
        ({"vocab_size": 4096}, "did you mean vocabulary_size"),
        ({"input": "???"}, "set input"),
        ({"input": []}, "set input=PATH"),
        ({"output": ""}, "set output=DIRECTORY"),
        ({"end_of_text": " "}, "end_of_text"),
        ({"document": "lines"}, "did you mean line"),
        ({"seed": -1}, "seed=-1"),
        ({"split": {"train": 0.0, "validation": 1.0}}, "has no share for train"),
        ({"split": {"trian": 1.0}}, "did you mean split.train"),
    ],
)
def test_faults_are_named_with_a_remedy(source, overrides, words):
    with pytest.raises(ConfigError) as error:
        config(source, **overrides)
    assert words in str(error.value)
