# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Indexed datasets written under temporary names and published together, so that none is ever half there."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from nemo_ee.errors import DataError


class StagedDatasets:
    """A context manager: on leaving it, whatever was not published is deleted.

    Args:
        prefixes: a name for each dataset to the path prefix it is published under.
        vocab_size: one more than the largest token id; below 65500 ids take two bytes, else four.
    """

    def __init__(self, prefixes: Mapping[str, Path], vocab_size: int):
        self.dtype = np.dtype(DType.optimal_dtype(vocab_size))
        self._vocab_size = vocab_size
        self._prefixes = dict(prefixes)
        self._staged = {
            name: path.with_name(f".{path.name}.{os.getpid()}") for name, path in prefixes.items()
        }
        self._builders: dict[str, IndexedDatasetBuilder] = {}
        self._staged_summary: Path | None = None

    def __enter__(self) -> "StagedDatasets":
        for name, path in self._staged.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._builders[name] = IndexedDatasetBuilder(f"{path}.bin", dtype=self.dtype.type)
        return self

    def __exit__(self, *_: object) -> None:
        for name, path in self._staged.items():
            self._builders[name].data_file.close()
            for suffix in (".bin", ".idx"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
        if self._staged_summary is not None:
            self._staged_summary.unlink(missing_ok=True)

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

    def publish(self, summary_path: Path, summary: Mapping) -> None:
        """Moves everything to its final name and writes ``summary`` as JSON, the last file to appear.

        Files of an earlier dataset of the same name are replaced. Its ``.idx`` goes first, so that an
        interruption leaves a dataset that is visibly incomplete rather than one whose index belongs to other
        data. So does the cache of sample indices that Megatron keeps under the prefix: it is keyed by the
        path, not the content.
        """
        for name, builder in self._builders.items():
            builder.finalize(f"{self._staged[name]}.idx")
        staged_summary = summary_path.with_name(f".{summary_path.name}.{os.getpid()}")
        self._staged_summary = staged_summary
        staged_summary.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        summary_path.unlink(missing_ok=True)
        for name, path in self._prefixes.items():
            Path(f"{path}.idx").unlink(missing_ok=True)
            _drop_index_cache(path)
            os.replace(f"{self._staged[name]}.bin", f"{path}.bin")
            os.replace(f"{self._staged[name]}.idx", f"{path}.idx")
        os.replace(staged_summary, summary_path)


def _drop_index_cache(prefix: Path) -> None:
    """Deletes the files that megatron-core's GPTDataset caches in ``<prefix>/cache/GPTDataset_indices``."""
    for suffix in ("description.txt", "document_index.npy", "sample_index.npy", "shuffle_index.npy"):
        for file in (prefix / "cache" / "GPTDataset_indices").glob(f"*-{suffix}"):
            file.unlink()
