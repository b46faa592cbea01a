# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One torch_dist checkpoint: checked when it is opened, and read tensor by tensor in one plain process."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from nemo_ee.checkpoint.torch_dist import layout, pickles, zip_records
from nemo_ee.errors import CheckpointError

METADATA = ".metadata"
FORMAT = "metadata.json"
COMMON = "common.pt"
MODELOPT = "modelopt_state"
"""A folder that NeMo would unpickle where ModelOpt is installed."""

_REMEDY = "copy or download the checkpoint again"
_VERSIONS = {"sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
_SMALL = 2**20
"""Bytes that a small file may have in any case; ``.metadata`` has beyond it as many as the data, at most."""
_MOST_COMMON = 2**26


class TorchDistCheckpoint:
    """One torch_dist checkpoint directory, checked on opening: all but the elements of its tensors.

    What is read when it is opened is kept, and not read again.

    Args:
        directory: holds ``metadata.json``, ``.metadata``, ``common.pt`` and ``*.distcp``.
        name: what errors call it, for a directory that was extracted from a file; None: the directory.
        remedy: what errors say to do about damage.

    Attributes:
        metadata: what ``.metadata`` says, made anew of nothing but what was checked.
        common: the common state.

    Raises:
        CheckpointError: the directory is no torch_dist checkpoint, its pickles name classes that honest ones do not
            consist of, a data file is missing or too short, or what is said of a tensor cannot be true.
    """

    def __init__(
        self, directory: str | os.PathLike, name: str | os.PathLike | None = None, remedy: str = _REMEDY
    ):
        self.directory, self.name, self._remedy = Path(directory), str(name or directory), remedy
        self._sizes = self._list_files()
        self._check_format()
        self.metadata: Metadata = self._load_metadata()
        self.common: dict = self._load_common()

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Global shape, dtype and chunks of every tensor, by key."""
        found = self.metadata.state_dict_metadata.items()
        return {key: value for key, value in found if isinstance(value, TensorStorageMetadata)}

    @property
    def objects(self) -> set[str]:
        """Keys of the pickled objects (Transformer Engine's ``_extra_state``), without their shard suffix."""
        return {key.split("/shard_")[0] for key in self.object_keys}

    @property
    def object_keys(self) -> list[str]:
        """Keys of the pickled objects as they are."""
        found = self.metadata.state_dict_metadata.items()
        return [key for key, value in found if isinstance(value, BytesStorageMetadata)]

    def read(self, key: str, first: int | None = None) -> torch.Tensor:
        """Assembles one tensor from its chunks, on the CPU.

        Args:
            key: a key of :attr:`tensors`.
            first: reads only ``tensor[first]``, e.g. one layer of stacked layers.

        Returns:
            The global tensor, or its slice, whatever the sharding it was written with.
        """
        entry = self.tensors[key]
        shape = tuple(entry.size) if first is None else tuple(entry.size[1:])
        whole = torch.empty(shape, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            start, size = tuple(chunk.offsets), tuple(chunk.sizes)
            if first is not None and not start[0] <= first < start[0] + size[0]:
                continue
            data = self._load_chunk(key, start)
            if data.dtype != whole.dtype or tuple(data.shape) != size:
                raise self.fault(
                    f"{key} has parts of {data.dtype} {list(data.shape)} where {METADATA} says "
                    f"{whole.dtype} {list(size)}"
                )
            if first is not None:
                data, start, size = data[first - start[0]], start[1:], size[1:]
            whole[tuple(slice(o, o + n) for o, n in zip(start, size, strict=True))].copy_(data)
        return whole

    def read_object(self, key: str) -> bytes:
        """The pickle under one of `object_keys`, which names nothing but what common state may.

        Raises:
            CheckpointError: it is damaged, or does.
        """
        data = self._read_place(self.metadata.storage_data[MetadataIndex(key)])
        try:
            zip_records.check_archive(data)
            pickles.load_state(data)
        except Exception as error:  # damaged pickles raise almost anything
            raise self.fault(f"{key} cannot be trusted or read ({_brief(error)})") from error
        return data

    def check_stored_sizes(self, want: Callable[[str], bool] = lambda key: True) -> None:
        """Checks that as many elements are stored as the metadata says; reads some kilobytes of each part.

        Args:
            want: keys of the tensors to look at.

        Raises:
            CheckpointError: naming the first tensor where it is not so.
        """
        files: dict[str, io.BufferedReader] = {}
        try:
            for key, tensor in self.tensors.items():
                for chunk in tensor.chunks if want(key) else ():
                    place = self.metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                    if place.relative_path not in files:
                        files[place.relative_path] = open(self.directory / place.relative_path, "rb", 0)
                    descriptor = files[place.relative_path].fileno()

                    def read(
                        start: int, count: int, descriptor: int = descriptor, at: int = place.offset
                    ) -> bytes:
                        return os.pread(descriptor, count, at + start)

                    zip_records.check_tensor(read, place.length, layout.stored_bytes(tensor, chunk))
        except zip_records.ZipRecordsError as error:
            raise self.fault(f"data of {key} cannot be true to {METADATA}: {error}") from error
        except OSError as error:
            raise self.fault(f"data of {key} cannot be read ({error})") from error
        finally:
            for file in files.values():
                file.close()

    def fault(self, what: str, remedy: str | None = None) -> CheckpointError:
        """An error that names this checkpoint."""
        what = " ".join(what.splitlines())  # it may quote the checkpoint
        return CheckpointError(f"{self.name}: {what}; {remedy or self._remedy}")

    def _load_chunk(self, key: str, offsets: tuple[int, ...]) -> torch.Tensor:
        try:
            data = self._read_place(self.metadata.storage_data[MetadataIndex(key, offsets)])
            zip_records.check_archive(data)
            pickles.dry_run(io.BytesIO(data))
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # damaged pickles and zip files raise almost anything
            raise self.fault(f"data of {key} cannot be read ({_brief(error)})") from error
        if not isinstance(found, torch.Tensor) or found.untyped_storage().nbytes() > len(data):
            raise self.fault(f"data of {key} is no tensor of its size")
        return found

    def _read_place(self, place: _StorageInfo) -> bytes:
        with open(self.directory / place.relative_path, "rb") as file:
            file.seek(place.offset)
            return file.read(place.length)

    def _list_files(self) -> dict[str, int]:
        try:
            with os.scandir(self.directory) as entries:
                kinds = {entry.name: entry for entry in entries}
                sizes = {name: entry.stat().st_size for name, entry in kinds.items() if entry.is_file()}
        except OSError as error:
            raise self.fault(f"cannot be read ({error.strerror})", "check the path") from error
        for name in (FORMAT, METADATA, COMMON):
            if name not in sizes:
                raise self.fault(f"holds no {name}, so it is no complete torch_dist checkpoint")
        if MODELOPT in kinds:
            remedy = "give a checkpoint of a model that was not quantised or pruned"
            raise self.fault(f"holds {MODELOPT}/, ModelOpt's state, which is not supported", remedy)
        return sizes

    def _read_small(self, name: str, most: int) -> bytes:
        if self._sizes[name] > most:
            raise self.fault(f"{name} has {self._sizes[name]} bytes, more than the {most} that one has")
        try:
            with open(self.directory / name, "rb") as file:
                return file.read(most)
        except OSError as error:
            raise self.fault(f"{name} cannot be read ({error.strerror})") from error

    def _check_format(self) -> None:
        try:
            said = json.loads(self._read_small(FORMAT, _SMALL))
            backend = said["sharded_backend"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.fault(f"{FORMAT} cannot be read ({type(error).__name__})") from error
        if backend != "torch_dist":
            raise self.fault(
                f"sharded_backend={str(backend)[:80]}: only torch_dist is supported",
                "save the model again with dist_ckpt_format=torch_dist",
            )
        for key, value in said.items():
            if key != "sharded_backend" and (key not in _VERSIONS or value != _VERSIONS[key]):
                shown = f"{key}={value}"[:80]
                raise self.fault(
                    f"{FORMAT} says {shown}, which is not supported", "save the model again with NeMo 2.4"
                )

    def _load_metadata(self) -> Metadata:
        most = _SMALL + sum(size for name, size in self._sizes.items() if name.endswith(".distcp"))
        data = self._read_small(METADATA, most)
        try:
            found = pickles.load_metadata(data)
        except Exception as error:  # damaged pickles raise almost anything
            raise self.fault(f"{METADATA} cannot be trusted or read ({_brief(error)})") from error
        try:
            return layout.checked(found, self._sizes)
        except layout.LayoutError as error:
            raise self.fault(f"{METADATA} {error}") from error
        except (OverflowError, TypeError, ValueError, RecursionError) as error:
            raise self.fault(f"{METADATA} describes no checkpoint ({_brief(error)})") from error

    def _load_common(self) -> dict:
        data = self._read_small(COMMON, _MOST_COMMON)
        try:
            zip_records.check_archive(data)
            found: Any = pickles.load_state(data)
        except Exception as error:
            raise self.fault(f"{COMMON} cannot be trusted or read ({_brief(error)})") from error
        if not isinstance(found, dict):
            raise self.fault(f"{COMMON} holds no state by name")
        return found


def _brief(error: BaseException) -> str:
    """An error's first line, without torch's pages of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = next((line for line in lines if "Unsupported" in line or "Trying to" in line), lines[0])
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
