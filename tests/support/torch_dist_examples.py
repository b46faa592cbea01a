# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Strategies of torch_dist checkpoints: metadata that says what is not so, and files with other bytes."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.support.hostile_weights import NORM
from tests.support.mutations import HUGE, spoilt, spoilt_bytes, values

DATA = "__0_0.distcp"
DTYPES = ("float32", "float64", "bfloat16", "int64", "bool", "complex64", "quint8", "float8_e5m2")


def plain(found: Metadata) -> dict[str, Any]:
    """Metadata as plain values, to be spoilt and `built` again."""
    tensors = {
        key: {
            "dtype": str(entry.properties.dtype).removeprefix("torch."),
            "size": list(entry.size),
            "chunks": [{"offsets": list(one.offsets), "sizes": list(one.sizes)} for one in entry.chunks],
        }
        for key, entry in found.state_dict_metadata.items()
    }
    places = [
        {
            "key": index.fqn,
            "offsets": None if index.offset is None else list(index.offset),
            "file": info.relative_path,
            "start": info.offset,
            "length": info.length,
        }
        for index, info in found.storage_data.items()
    ]
    return {"tensors": tensors, "places": places, "shapes": {}}


def built(said: Any) -> Any:
    """What `plain` gave, as the classes of the format; what does not fit into them stays as it is."""
    if not isinstance(said, dict):
        return said
    tensors, places = said.get("tensors"), said.get("places")
    if isinstance(tensors, dict):
        tensors = {key: _tensor(entry) for key, entry in tensors.items()}
    if isinstance(places, list):
        storage: Any = {}
        for number, place in enumerate(places):
            place = place if isinstance(place, dict) else {"key": place}
            index = MetadataIndex(f"placeholder{number}")
            object.__setattr__(index, "fqn", place.get("key"))
            object.__setattr__(index, "offset", _size(place.get("offsets")))
            info = _StorageInfo(*(place.get(each) for each in ("file", "start", "length")))
            try:
                storage[index] = info
            except TypeError:
                storage[str(index)] = info
        places = storage
    made = Metadata(state_dict_metadata=tensors, storage_data=places)
    made.mcore_data = said.get("shapes")
    return made


def _size(numbers: Any) -> Any:
    fits = isinstance(numbers, list) and all(type(n) is int and -(2**63) <= n < 2**63 for n in numbers)
    return torch.Size(numbers) if fits else numbers


def _tensor(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return BytesStorageMetadata() if entry is None else entry
    name, chunks = entry.get("dtype"), entry.get("chunks")
    properties = TensorProperties()
    properties.dtype = getattr(torch, name) if name in DTYPES else name
    if isinstance(chunks, list):
        chunks = [
            ChunkStorageMetadata(_size(one.get("offsets")), _size(one.get("sizes")))
            if isinstance(one, dict)
            else one
            for one in chunks
        ]
    return TensorStorageMetadata(properties, _size(entry.get("size")), chunks)


def saved(value: Any) -> bytes:
    """As torch.save writes it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def folders(honest: Path) -> st.SearchStrategy:
    """Names of files and their bytes that differ from those of an honest folder."""
    files = {file.name: file.read_bytes() for file in honest.iterdir()}
    found = pickle.loads(files[".metadata"])  # noqa: S301
    strange = (
        values
        | st.sampled_from((*DTYPES, DATA, "../x", NORM))
        | st.lists(st.sampled_from(HUGE[:8]), max_size=3)
    )
    opcodes = (
        b"cos\nsystem\n",
        b"\x8c\x02os",
        b"\x93",
        b"R",
        b"}",
        b"]",
        b"b",
        b"0",
        b".",
        b"\x94",
        b"h\x01",
    )
    zips = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"/data/", b"data.pkl", b"version")

    def metadata(said: Any) -> dict[str, bytes]:
        return {".metadata": pickle.dumps(built(said))}

    def part(data: bytes) -> dict[str, bytes]:
        changed = plain(found)
        for place in changed["places"]:
            if place["key"] == NORM:
                place |= {"file": "__1_0.distcp", "start": 0, "length": len(data)}
        return {"__1_0.distcp": data, **metadata(changed)}

    def bytes_of(name: str, *others: bytes, tokens: tuple[bytes, ...] = zips + opcodes) -> st.SearchStrategy:
        return spoilt_bytes([files[name], *others], tokens).map(lambda data: {name: data})

    norm = torch.arange(4.0)
    parts = [
        saved(each)
        for each in (norm, norm.expand(1, 4)[0], torch.arange(8.0)[::2], [norm], torch.zeros(2, 2))
    ]
    states = [saved(each) for each in ({"a": {"b": [1, 2.5, "x"]}, "t": norm}, [1], {"args": None})]
    said = st.fixed_dictionaries({"sharded_backend": st.sampled_from(("torch_dist", "zarr"))}) | values
    return st.one_of(
        spoilt(plain(found), strange, 1).map(metadata),
        spoilt(plain(found), strange).map(metadata),
        bytes_of(".metadata", tokens=opcodes),
        bytes_of("common.pt", *states),
        bytes_of(
            "metadata.json",
            b'{"sharded_backend": "torch_dist", "common_backend": "torch"}',
            tokens=(b"{", b'"'),
        ),
        spoilt({"sharded_backend": "torch_dist", "sharded_backend_version": 1}, said).map(
            lambda content: {"metadata.json": repr(content).replace("'", '"').encode("utf-8", "replace")}
        ),
        bytes_of(DATA),
        spoilt_bytes(parts, zips + opcodes, most=3).map(part),
    )
