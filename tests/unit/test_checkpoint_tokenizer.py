# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers travel inside archives."""

import shutil
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from nemo_ee.checkpoint import archive, tokenizer
from nemo_ee.errors import CheckpointError
from tests.support import tiny_llama

TEXT = "the cat sat on the layer"
CHAT = [{"role": "user", "content": TEXT}]


def write_nemo(folder, settings, files=None):
    source = folder / "content"
    source.mkdir()
    OmegaConf.save(OmegaConf.create({"tokenizer": settings}), source / "model_config.yaml")
    if files is not None:
        tokenizer.copy_files(files, source / tokenizer.DIRECTORY)
    return archive.write_archive(source, folder / "m.nemo")


def test_the_tokenizer_outlives_everything_but_itself(tmp_path):
    original = tiny_llama.tokenizer()
    original.save_pretrained(tmp_path / "hf")
    path = write_nemo(tmp_path, {"library": "huggingface", "type": tokenizer.INSIDE}, tmp_path / "hf")
    shutil.rmtree(tmp_path / "hf")
    shutil.rmtree(tmp_path / "content")
    loaded = tokenizer.tokenizer_from_nemo(path)
    path.unlink()
    assert loaded(TEXT).input_ids == original(TEXT).input_ids
    assert loaded.decode(loaded(TEXT).input_ids) == TEXT
    assert (loaded.eos_token, loaded.bos_token) == ("</s>", "<s>")
    assert loaded.apply_chat_template(CHAT, tokenize=False) == TEXT + "</s>"


def test_weights_do_not_come_along(tmp_path):
    source = tiny_llama.write(tmp_path / "hf")
    copied = tokenizer.copy_files(source, tmp_path / "copy")
    names = {file.name for file in copied.iterdir()}
    assert "tokenizer.json" in names and not any("safetensors" in name for name in names)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"library": "sentencepiece", "model": "nemo:x.model"},
            "tokenizer.model=nemo:x.model but there is no x.model",
        ),
        ({"library": "sentencepiece", "model": "nemo:../x"}, "no ../x in the checkpoint"),
        ({"model": "x"}, "no tokenizer.library"),
        ({"library": "huggingface", "type": "/nowhere/tokenizer"}, "tokenizer.type=/nowhere/tokenizer"),
        ({"library": "huggingface", "type": tokenizer.INSIDE}, "there is no tokenizer/ in the checkpoint"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path, settings, words):
    with pytest.raises(CheckpointError) as error:
        tokenizer.tokenizer_from_nemo(write_nemo(tmp_path, settings))
    assert words in str(error.value)


def test_no_nemo_is_imported():
    code = (
        "import sys, nemo_ee.checkpoint.tokenizer\n"
        "sys.exit('nemo' in sys.modules or 'megatron' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
