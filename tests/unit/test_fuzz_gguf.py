# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""GGUF files made at random: read as the package gguf reads them, or refused by errors with their name."""

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize

from nemo_ee.checkpoint import gguf
from nemo_ee.checkpoint.gguf import header
from nemo_ee.errors import CheckpointError
from tests.support import hostile_weights, tiny_gguf
from tests.support.fuzz import EXAMPLES, fuzz, refusal_of
from tests.support.gguf_examples import check_against_package, files, models, packed

KNOWN = [data for data, _ in hostile_weights.GGUFS.values()]


@pytest.fixture(scope="module")
def model() -> tuple[dict, dict]:
    """Keys and tensors of a model of one layer."""
    config = tiny_gguf.config(num_hidden_layers=1)
    network = tiny_gguf.tiny_llama.model(config)
    tensors = {
        name: {"shape": list(reversed(value.shape)), "kind": 0}
        for name, value in tiny_gguf._tensors(network).items()
    }
    keys = {"general.architecture": "llama", **tiny_gguf._keys(config), **tiny_gguf.byte_vocabulary()}
    return keys, tensors


@pytest.mark.parametrize("examples", EXAMPLES)
def test_headers(examples, model, tmp_path):
    """What is accepted has the values and the tensors that the package finds."""
    path = tmp_path / "m.gguf"

    def check(data: bytes) -> bool:
        path.write_bytes(data)
        found, refused = refusal_of(lambda: header.read(path), CheckpointError, path)
        if refused:
            return False
        check_against_package(found, GGUFReader(path))
        return True

    honest = [
        packed({"general.alignment": 64, "b": [1.5, 2.0], "c": ["x", "yz"], "d": True}, {}),
        packed(*model),
    ]
    assert fuzz(files(honest), check, examples, KNOWN) > examples / 20


@pytest.mark.parametrize("examples", EXAMPLES)
def test_models(examples, model, tmp_path):
    """What is accepted becomes a model and a tokenizer of what the file says."""
    path = tmp_path / "m.gguf"

    def check(example: tuple | bytes) -> bool:
        path.write_bytes(example if isinstance(example, bytes) else packed(*example))
        file, refused = refusal_of(lambda: gguf.inspect(path), CheckpointError, path, 40)
        if refused:
            return False
        reader = GGUFReader(path)
        weights = file.load_weights()
        embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
        expected = torch.from_numpy(dequantize(embedding.data, embedding.tensor_type).astype(np.float32))
        assert torch.equal(weights["model.embed_tokens.weight"], expected)
        assert file.config.vocab_size == len(expected)
        assert sum(value.numel() for value in weights.values()) == sum(
            tensor.n_elements for tensor in reader.tensors if tensor.name != "rope_freqs.weight"
        )
        tokens = reader.fields["tokenizer.ggml.tokens"].contents()
        tokenizer = file.load_tokenizer()
        ids = [number for number in (0, 5, 99) if number < len(file.vocabulary.tokens) and tokens[number]]
        assert tokenizer.convert_ids_to_tokens(ids) == [tokens[number] for number in ids]
        return True

    assert fuzz(models(*model), check, examples, [model, *KNOWN]) > examples / 20
