# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Indexed datasets written under temporary names and published together, so that none is ever half there."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from nemo_ee.data.index_cache import cache_folder
from nemo_ee.errors import DataError
from nemo_ee.files.output import replaced_files


def output_files(prefixes: Mapping[str, Path], summary: Path) -> list[Path]:
    """All that is published, in this order: of each dataset ``.bin`` and ``.idx``, and at last the summary."""
    return [*(Path(f"{prefix}{end}") for prefix in prefixes.values() for end in (".bin", ".idx")), summary]


@contextmanager
def staged_datasets(
    prefixes: Mapping[str, Path], summary: Path, vocab_size: int
) -> Iterator["StagedDatasets"]:
    """Datasets that appear when the body ends, if it called `StagedDatasets.finish`, and vanish on an error.

    Files of earlier datasets of these names are replaced, see `replaced_files`. So is the cache of sample indices that
    Megatron keeps under the prefix: it is keyed by the path, not the content.

    Args:
        prefixes: a name for each dataset to the path prefix it is published under.
        summary: the JSON file that appears last.
        vocab_size: one more than the largest token id; below 65500 ids take two bytes, else four.

    Raises:
        OutputError: they cannot be written, or another process is writing them.
    """
    with replaced_files(output_files(prefixes, summary)) as parts:
        pairs = zip(parts[:-1:2], parts[1::2], strict=True)
        datasets = StagedDatasets(dict(zip(prefixes, pairs, strict=True)), parts[-1], vocab_size)
        try:
            yield datasets
        finally:
            datasets.close()
        assert datasets.finished
        for prefix in prefixes.values():
            _drop_index_cache(prefix)
    for prefix in prefixes.values():
        _drop_index_cache(prefix)  # of the old data, which a run may have begun to read meanwhile


class StagedDatasets:
    """Datasets that are being written, see `staged_datasets`.

    Args:
        parts: a name for each dataset to the files that become its ``.bin`` and ``.idx``.
        summary: the file that becomes the summary.
        vocab_size: as of `staged_datasets`.

    Attributes:
        dtype: of the token ids.
        finished: whether `finish` was called.
    """

    def __init__(self, parts: Mapping[str, tuple[Path, Path]], summary: Path, vocab_size: int):
        self.dtype = np.dtype(DType.optimal_dtype(vocab_size))
        self.finished = False
        self._vocab_size, self._parts, self._summary = vocab_size, parts, summary
        self._builders = {
            name: IndexedDatasetBuilder(str(data), dtype=self.dtype.type) for name, (data, _) in parts.items()
        }

    def close(self) -> None:
        """Closes the files."""
        for builder in self._builders.values():
            with suppress(OSError):  # a full disk once more: what was to be said has been raised
                builder.data_file.close()

    def add(self, name: str, token_ids: list[int]) -> None:
        """Appends one document to the dataset ``name``.

        Raises:
            DataError: a token id does not lie within the vocabulary.
        """
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            raise DataError(
                f"tokenizer: must give ids from 0 to {self._vocab_size - 1}, it gave {min(token_ids)} to "
                f"{max(token_ids)}; its vocabulary and its files do not belong together"
            )
        self._builders[name].add_document(token_ids, [len(token_ids)])

    def counts(self) -> dict[str, dict[str, int]]:
        """Documents and tokens of each dataset so far."""
        lengths = {name: builder.sequence_lengths for name, builder in self._builders.items()}
        return {name: {"documents": len(each), "tokens": sum(each)} for name, each in lengths.items()}

    def finish(self, summary: Mapping) -> None:
        """Completes the datasets and writes ``summary`` as JSON."""
        for name, builder in self._builders.items():
            builder.finalize(str(self._parts[name][1]))
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        # The names of files may be no UTF-8; what Python makes of them has a spelling in JSON.
        self._summary.write_text(text, encoding="utf-8", errors="backslashreplace")
        self.finished = True


def _drop_index_cache(prefix: Path) -> None:
    """Deletes the files that megatron-core's GPTDataset caches."""
    for suffix in ("description.txt", "document_index.npy", "sample_index.npy", "shuffle_index.npy"):
        for file in cache_folder(prefix).glob(f"*-{suffix}"):
            file.unlink(missing_ok=True)
