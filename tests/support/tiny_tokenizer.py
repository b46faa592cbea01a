# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A byte-level BPE tokenizer of a few hundred tokens, saved as a Hugging Face directory."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS = "<|end|>"


def save_tiny_tokenizer(directory: Path, eos: bool = True) -> Path:
    """Trains a tokenizer of at most 300 tokens on a few words and saves it; any text can be encoded.

    Args:
        directory: created if missing.
        eos: give it an end-of-sequence token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ran after the cat"] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS if eos else None)
    wrapped.save_pretrained(directory)
    return Path(directory)
