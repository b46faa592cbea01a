# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A small random base and random text, for benchmarks that must run anywhere."""

import atexit
import functools
import multiprocessing
from pathlib import Path

import numpy as np

from nemo_ee.files.scratch import ScratchFolder
from nemo_ee.runtime import stand_ins


@functools.cache
def small_files() -> tuple[str, str]:
    """A small base and text, in a folder that lives with this process."""
    folder = ScratchFolder("small_base")
    atexit.register(folder.close)
    return str(write_small_base(folder.path)), str(write_small_text(folder.path))


def write_small_base(directory: Path) -> Path:
    """A random Llama of 8 layers, hidden size 256, 16,384 tokens, converted to a `.nemo`; returns its path.

    Another process converts: Megatron's batch calculator can be set up only once per process.
    """
    process = multiprocessing.get_context("spawn").Process(target=_write_base, args=(directory,))
    process.start()
    process.join()
    assert process.exitcode == 0, "see the messages above"
    return directory / "small.nemo"


def _write_base(directory: Path) -> None:
    stand_ins.enable()
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

    words = {"<eos>": 0, **{f"w{index}": index for index in range(1, 16384)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    source = directory / "small"
    LlamaForCausalLM(config).save_pretrained(source)
    tokenizer.save_pretrained(source)
    convert_to_nemo(str(source), str(directory / "small.nemo"))


def write_small_text(directory: Path, documents: int = 64, length: int = 512) -> Path:
    """Random documents of 16,384 tokens as an indexed dataset; returns its prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = directory / "text"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for row in np.random.default_rng(0).integers(1, 16384, (documents, length)):
        builder.add_document(row, [length])
    builder.finalize(f"{prefix}.idx")
    return prefix
