# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Makes megatron-core's GPT datasets tell padding from ends of documents."""

from collections.abc import Iterator
from typing import Any

PADDING = -1
"""What megatron-core (0.13, `gpt_dataset._PAD_TOKEN_ID`) itself takes where a tokenizer has no padding token."""


def separate_padding(dataset: Any) -> None:
    """Lets no token of the text pass for padding, in place.

    megatron-core 0.13.1 asks the tokenizer for its padding token, replaces that token in every sample by token
    0, and takes its label out of the loss mask. Many tokenizers have one token for padding and for the end of a
    document. Worse, the mask that it edits is cached and shared by all samples, so that the masked positions
    add up until hardly a token counts. Padding that the dataset adds is still masked afterwards.

    Args:
        dataset: a GPTDataset, a BlendedDataset, or None.
    """
    for part in _gpt_datasets(dataset):
        part._pad_token_id = PADDING
        part.masks_and_position_ids_are_cacheable = False


def _gpt_datasets(dataset: Any) -> Iterator[Any]:
    if dataset is None:
        return
    if hasattr(dataset, "datasets"):
        for part in dataset.datasets:
            yield from _gpt_datasets(part)
    else:
        assert hasattr(dataset, "masks_and_position_ids_are_cacheable"), "megatron-core renamed its attribute"
        yield dataset
