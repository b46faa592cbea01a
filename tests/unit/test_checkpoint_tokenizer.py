# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers travel inside archives, and come out of GGUF files as the file describes them."""

import shutil
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from nemo_ee.checkpoint import archive, gguf, tokenizer
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


def write_gguf(path, architecture="llama", add_bos=None):
    """A byte-level BPE vocabulary of single characters, with one tensor behind it."""
    import numpy
    from gguf import GGUFWriter
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    tokens = ["<unk>", "<s>", "</s>", *bytes_to_unicode().values(), "xy", "xyz"]
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_vocab_size(261)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["x y", "xy z"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tiny_llama.CHAT_TEMPLATE)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_tensor("token_embd.weight", numpy.zeros((64, 32), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("add_bos", [None, False, True])
def test_gguf_tokenizer_is_what_the_file_says(tmp_path, add_bos):
    loaded = gguf.load_tokenizer(write_gguf(tmp_path / "m.gguf", add_bos=add_bos))
    assert (loaded.eos_token, loaded.bos_token, loaded.pad_token) == ("</s>", "<s>", "</s>")
    ids = loaded("sat").input_ids
    assert ids == ([1] if add_bos else []) + loaded.convert_tokens_to_ids(["s", "a", "t"])
    assert loaded.apply_chat_template(CHAT, tokenize=False) == TEXT + "</s>"
    assert loaded.decode(loaded("a  b\n").input_ids, skip_special_tokens=True) == "a  b\n"


def test_bad_gguf_files_give_one_error(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    for size in (4, 20, 200, len(whole) // 2, len(whole) - 64):
        bad.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            gguf.inspect(bad)
    bad.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(CheckpointError, match="no GGUF file"):
        gguf.inspect(bad)
    with pytest.raises(CheckpointError, match="general.architecture=mamba"):
        gguf.inspect(write_gguf(tmp_path / "mamba.gguf", architecture="mamba"))
