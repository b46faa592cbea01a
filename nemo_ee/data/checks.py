# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Checks of indexed datasets before training: what Megatron would answer with a hang or an error deep inside.

BlendedMegatronDatasetBuilder (megatron-core 0.13) loops for ever on a split that has no tokens.
"""

from collections.abc import Collection, Iterator, Mapping

from nemo_ee.data.data_config import PREFIX_KEY, DatasetPart, dataset_parts
from nemo_ee.data.index_cache import cache_folder, check_index_cache
from nemo_ee.data.index_file import IndexedFile, open_indexed_file
from nemo_ee.errors import DataError, Fault

LENGTH_KEY = "model.data.seq_length"
MAX_SCANNED_TOKENS = 100_000_000
"""Token ids that are read in all: a corpus of any size is checked in seconds."""
_REMEDY = "write it with scripts/preprocess_text.py"


def check_data_config(
    data: Mapping, sequence_length: int, vocab_size: int, length_key: str = LENGTH_KEY
) -> None:
    """Checks everything that ``model.data`` names. Reads files only; call it on one rank.

    Of more than `MAX_SCANNED_TOKENS` in all, token ids are read in blocks evenly spread over every dataset.

    Args:
        data: NeMo's ``model.data`` section.
        sequence_length: tokens per training sequence.
        vocab_size: the model's vocabulary without padding.
        length_key: what the user sets to ``sequence_length``.

    Raises:
        ConfigError: ``data_prefix`` or ``splits_string`` has no valid form.
        DataError: a dataset is missing, damaged, shorter than one sequence in some split, has token ids beyond
            the vocabulary, or what is cached of it is no index. The message lists every fault of every dataset.
    """
    if data.get("data_impl") == "mock":
        return
    extra = 0 if data.get("no_seqlen_plus_one_input_tokens") else 1
    faults: list[Fault] = []
    splits = dataset_parts(data.get("data_prefix"), data.get("splits_string"))
    budget = MAX_SCANNED_TOKENS // sum(len(parts) for parts in splits.values())
    faults += _cache_faults(data, {part.prefix for parts in splits.values() for part in parts})
    for split, parts in splits.items():
        key = (
            f"{PREFIX_KEY}.{split}" if isinstance(data["data_prefix"], Mapping) else f"{PREFIX_KEY} ({split})"
        )
        for part in parts:
            faults += _part_faults(part, sequence_length, vocab_size, split, key, extra, length_key, budget)
    if faults:
        raise DataError("\n".join(map(str, faults)))


def _cache_faults(data: Mapping, prefixes: Collection[str]) -> Iterator[Fault]:
    """Of indices that megatron-core has, or is said to have, made of the datasets before."""
    folder = data.get("index_mapping_dir")
    places = [("model.data.index_mapping_dir", folder, folder)] if folder else []
    places += [(PREFIX_KEY, prefix, cache_folder(prefix)) for prefix in sorted(prefixes)]
    for key, value, place in places:
        try:
            check_index_cache(place)
        except DataError as error:
            yield Fault(key, value, str(error), "delete that file: it is made anew")


def check_indexed_dataset(
    prefix: str,
    sequence_length: int,
    vocab_size: int,
    name: str,
    key: str = PREFIX_KEY,
    length_key: str = LENGTH_KEY,
) -> IndexedFile:
    """Checks one dataset that is used as a whole.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        sequence_length: tokens per training sequence.
        vocab_size: the model's vocabulary without padding.
        name: what it is to the user, e.g. ``train``.
        key: what the user sets to ``prefix``.
        length_key: what the user sets to ``sequence_length``.

    Returns:
        The opened dataset.

    Raises:
        DataError: as :func:`check_data_config`.
    """
    part = DatasetPart(prefix, None)
    faults = _part_faults(part, sequence_length, vocab_size, name, key, extra=1, length_key=length_key)
    if faults:
        raise DataError("\n".join(map(str, faults)))
    return open_indexed_file(prefix)


def _part_faults(
    part: DatasetPart,
    sequence_length: int,
    vocab_size: int,
    name: str,
    key: str,
    extra: int,
    length_key: str = LENGTH_KEY,
    budget: int = MAX_SCANNED_TOKENS,
) -> list[Fault]:
    try:
        file = open_indexed_file(part.prefix)
    except DataError as error:
        return [Fault(key, part.prefix, str(error), _REMEDY)]
    begin, end = part.sequences(len(file.sequence_lengths))
    covered = file.sequence_range(begin, end)
    tokens, needed = covered.stop - covered.start, sequence_length + extra
    if tokens < needed:
        what = "no tokens" if tokens == 0 else f"{tokens} tokens"
        rule = (
            f"{name} must have at least one sequence of {sequence_length} tokens (with targets {needed}), "
            f"has {what}"
        )
        remedy = f"give more text, a larger share of it, or a smaller {length_key}"
        return [Fault(key, part.prefix, rule, remedy)]
    low, high = _id_range(file, covered, budget)
    if low < 0 or high >= vocab_size:
        rule = f"{name} must have token ids from 0 to {vocab_size - 1}, has {low} to {high}"
        return [Fault(key, part.prefix, rule, "preprocess the text with the tokenizer of this model")]
    return []


def _id_range(file: IndexedFile, part: slice, budget: int) -> tuple[int, int]:
    """Least and largest token id, of `budget` tokens at most."""
    ranges = [(int(block.min()), int(block.max())) for block in file.spread_blocks(part, budget)]
    return min(low for low, _ in ranges), max(high for _, high in ranges)
