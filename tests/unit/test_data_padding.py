# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A token that ends documents and pads is text, in every sample, not only in the first."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

EOD, SEQUENCE = 2, 16


@pytest.fixture
def dataset(tmp_path):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    prefix = str(tmp_path / "text")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in range(60):
        builder.add_item(torch.tensor([*range(5 + document % 7, 10 + document % 9), EOD]))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    tokenizer = SimpleNamespace(eod=EOD, pad=EOD, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQUENCE,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=tokenizer,
        blend=([prefix], None),
        split="1,0,0",
    )
    indexed = IndexedDataset(prefix)
    return GPTDataset(indexed, prefix, np.arange(60, dtype=np.int32), None, Split.train, config)


def masks(dataset) -> torch.Tensor:
    return torch.stack([dataset[i]["loss_mask"].clone() for i in range(len(dataset))])


def test_upstream_still_lets_masks_add_up(dataset):
    """The reason for `separate_padding`; when this fails, megatron-core has changed and it may go."""
    found = masks(dataset)
    assert found[-1].sum() < found[0].sum() < SEQUENCE


def test_every_token_counts(dataset):
    from nemo_ee.runtime.upstream.padding import separate_padding

    separate_padding(dataset)
    assert masks(dataset).all()
    sample = next(dataset[i] for i in range(len(dataset)) if EOD in dataset[i]["labels"])
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])


def test_padding_of_the_dataset_itself_is_masked(dataset):
    from nemo_ee.runtime.upstream.padding import separate_padding

    separate_padding(dataset)
    assert not dataset[None]["loss_mask"].any()


def test_blends_are_entered():
    from nemo_ee.runtime.upstream.padding import separate_padding

    part = SimpleNamespace(_pad_token_id=EOD, masks_and_position_ids_are_cacheable=True)
    separate_padding(SimpleNamespace(datasets=[part]))
    separate_padding(None)
    assert part._pad_token_id == -1 and not part.masks_and_position_ids_are_cacheable
