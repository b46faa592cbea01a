# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What ``.metadata`` says of tensors and where they lie, held against the files: types, bounds, gaps, overlaps.

No number of it is used before it was compared with bytes that are there: each part of a tensor has bytes of its own, at
least as many as its elements need, and the parts make up the whole tensor, each element once.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

_MOST_AXES = 8
_LONGEST_NAME = 1024
_ORIGINAL_SHAPE = "nd_reformulated_orig_global_shape"
"""megatron-core's, of optimizer states that are stored flat."""

Offsets = tuple[int, ...]
Places = dict[tuple[str, Offsets | None], _StorageInfo]


class LayoutError(ValueError):
    """What is wrong, without the checkpoint's name."""


def checked(found: Metadata, sizes: Mapping[str, int]) -> Metadata:
    """The same metadata, made anew of nothing but what was checked.

    Args:
        found: as unpickled: each attribute may be of any type, or missing.
        sizes: bytes of the files in the checkpoint's folder, by name.

    Raises:
        LayoutError: the first thing that is wrong.
    """
    tensors = getattr(found, "state_dict_metadata", None)
    _require(type(tensors) is dict, "lists no tensors")
    places = _places(getattr(found, "storage_data", None), sizes)
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for key, entry in tensors.items():
        _require(_is_name(key), "has a tensor whose name is no text, or too long")
        if type(entry) is BytesStorageMetadata:
            entries[key] = BytesStorageMetadata()
            storage[MetadataIndex(key)] = _place(places, key, None)
            continue
        _require(
            type(entry) is TensorStorageMetadata, f"says of {key} neither that it is a tensor nor an object"
        )
        entries[key] = tensor = _tensor(key, entry)
        for chunk in tensor.chunks:
            place = _place(places, key, tuple(chunk.offsets))
            needed = stored_bytes(tensor, chunk)
            if place.length < needed:
                raise LayoutError(f"says that {key} has {needed} bytes where {place.length} are stored")
            storage[MetadataIndex(key, chunk.offsets)] = place
    made = Metadata(state_dict_metadata=entries, storage_data=storage)
    made.mcore_data = _original_shapes(getattr(found, "mcore_data", None), entries)
    return made


def stored_bytes(tensor: TensorStorageMetadata, chunk: ChunkStorageMetadata) -> int:
    """How many bytes the elements of one part need."""
    return math.prod(chunk.sizes) * tensor.properties.dtype.itemsize


def _require(fine: bool, what: str) -> None:
    if not fine:
        raise LayoutError(what)


def _is_name(value: Any) -> bool:
    return type(value) is str and 0 < len(value) <= _LONGEST_NAME


def _is_shape(value: Any) -> bool:
    return type(value) in (torch.Size, tuple, list) and all(type(n) is int and n >= 0 for n in value)


def _places(found: Any, sizes: Mapping[str, int]) -> Places:
    """Where the parts and objects lie; each within its file, and none on another."""
    _require(type(found) is dict, "does not say where tensors lie")
    places: Places = {}
    ranges: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for index, info in found.items():
        _require(
            type(index) is MetadataIndex and type(info) is _StorageInfo, "does not say where tensors lie"
        )
        key, offset = getattr(index, "fqn", None), getattr(index, "offset", None)
        _require(_is_name(key), "has a tensor whose name is no text, or too long")
        _require(offset is None or _is_shape(offset), f"does not say which part of {key} lies where")
        name, start, length = (getattr(info, each, None) for each in ("relative_path", "offset", "length"))
        _require(
            type(name) is str and type(start) is int and type(length) is int and start >= 0 and length > 0,
            f"does not say where {key} lies",
        )
        _require("/" not in name, f"names {name[:80]!r}, outside the checkpoint")
        _require(name.endswith(DEFAULT_SUFFIX), f"names {name[:80]!r}, which is no data file")
        _require(
            not getattr(info, "transform_descriptors", None),
            f"says that {key} is transformed, which is unknown",
        )
        if name not in sizes:
            raise LayoutError(f"names the data file {name[:80]}, which is missing")
        if start + length > sizes[name]:
            raise LayoutError(
                f"needs {start + length} bytes of the data file {name}, which has {sizes[name]}"
            )
        place = (key, None if offset is None else tuple(offset))
        _require(place not in places, f"has a part of {key} twice")
        places[place] = _StorageInfo(name, start, length)
        ranges[name].append((start, start + length, key))
    for name, parts in ranges.items():
        parts.sort()
        for (_, end, one), (start, _, other) in zip(parts, parts[1:], strict=False):
            _require(end <= start, f"says that {one} and {other} lie on each other in {name}")
    return places


def _place(places: Places, key: str, offsets: Offsets | None) -> _StorageInfo:
    if (found := places.get((key, offsets))) is None:
        raise LayoutError(f"has no data for {key}" + (f" at {offsets}" if offsets else ""))
    return found


def _tensor(key: str, entry: TensorStorageMetadata) -> TensorStorageMetadata:
    properties, size, chunks = (getattr(entry, each, None) for each in ("properties", "size", "chunks"))
    dtype = getattr(properties, "dtype", None)
    _require(type(properties) is TensorProperties and type(dtype) is torch.dtype, f"has no dtype for {key}")
    _require(_is_shape(size) and len(size) <= _MOST_AXES, f"has no shape for {key}")
    _require(type(chunks) is list, f"does not say of which parts {key} consists")
    made = []
    for chunk in chunks:
        offsets, extent = getattr(chunk, "offsets", None), getattr(chunk, "sizes", None)
        fits = type(chunk) is ChunkStorageMetadata and _is_shape(offsets) and _is_shape(extent)
        fits = fits and len(offsets) == len(extent) == len(size)
        _require(
            fits and all(o + n <= whole for o, n, whole in zip(offsets, extent, size, strict=True)),
            f"has a part of {key} outside its shape {list(size)}",
        )
        made.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(extent)))
    boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in made]
    _require(_makes_up(tuple(size), boxes), f"has parts of {key} that leave gaps in it or lie on each other")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), made)


def _makes_up(whole: Offsets, boxes: Iterable[tuple[Offsets, Offsets]]) -> bool:
    """Whether boxes within a whole cover each place of it once.

    A box is the sum of 2^d quarter spaces, one from each of its corners, with signs; these are linearly independent.
    So boxes add up to the whole exactly if all corners' signs do.
    """
    signs: dict[Offsets, int] = defaultdict(int)
    for sign, (start, extent) in [(-1, ((0,) * len(whole), whole)), *((1, box) for box in boxes)]:
        corners = [((), sign)]
        for first, length in zip(start, extent, strict=True):
            corners = [
                ((*corner, place), value * turn)
                for corner, value in corners
                for place, turn in ((first, 1), (first + length, -1))
            ]
        for corner, value in corners:
            signs[corner] += value
    return not any(signs.values())


def _original_shapes(found: Any, entries: Mapping[str, Any]) -> dict[str, dict[str, torch.Size]]:
    made: dict[str, dict[str, torch.Size]] = {key: {} for key in entries}
    for key, said in found.items() if type(found) is dict else ():
        shape = said.get(_ORIGINAL_SHAPE) if type(said) is dict and type(key) is str else None
        if key in made and shape is not None:
            _require(_is_shape(shape), f"has no original shape of {key}")
            made[key][_ORIGINAL_SHAPE] = torch.Size(shape)
    return made
