# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Hostile and damaged weights: torch_dist folders, single files of weights, GGUF files; each with what refuses it.

A builder takes an honest file or folder and spoils it. What runs code touches `ran` in the folder that it is given.
"""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

Spoil = Callable[[Path], None]

WEIGHT = "model.decoder.layers.mlp.linear_fc1.weight"
NORM = "model.decoder.final_layernorm.weight"


class RunsCode:
    """Pickles as a call of `os.system`."""

    def __init__(self, folder: Path):
        self.command = f"touch {folder}/ran"

    def __reduce__(self) -> tuple:
        return (os.system, (self.command,))


def tensors() -> dict[str, torch.Tensor]:
    """Of an honest little checkpoint."""
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embedding.word_embeddings.weight": torch.randn(10, 4, generator=generator),
        WEIGHT: torch.randn(3, 8, 4, generator=generator),
        NORM: torch.randn(4, generator=generator),
    }


def write_torch_dist(directory: Path, content: dict[str, torch.Tensor]) -> Path:
    """An honest torch_dist checkpoint."""
    dcp.save(dict(content), checkpoint_id=directory, no_dist=True)
    (directory / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    torch.save({}, directory / "common.pt")
    return directory


def rewrite(change: Callable[[Any], Any]) -> Spoil:
    """Changes `.metadata`; what `change` returns, if anything, takes its place."""

    def spoil(directory: Path) -> None:
        found = pickle.loads((directory / ".metadata").read_bytes())  # noqa: S301
        changed = change(found)
        (directory / ".metadata").write_bytes(pickle.dumps(found if changed is None else changed))

    return spoil


def says(key: str, **attributes: Any) -> Spoil:
    """`.metadata` has other attributes for a tensor."""
    return rewrite(lambda found: vars(found.state_dict_metadata[key]).update(attributes))


def chunk(key: str, **attributes: Any) -> Spoil:
    """`.metadata` has other attributes for a tensor's only part."""
    return rewrite(lambda found: vars(found.state_dict_metadata[key].chunks[0]).update(attributes))


def place(key: str, **attributes: Any) -> Spoil:
    """`.metadata` says that a tensor lies elsewhere."""

    def change(found: Any) -> None:
        for index, info in found.storage_data.items():
            if index.fqn == key:
                vars(info).update(attributes)

    return rewrite(change)


def _shape(whole: tuple[int, ...], part: tuple[int, ...] | None = None) -> Spoil:
    def change(found: Any) -> None:
        entry = found.state_dict_metadata[NORM]
        entry.size = torch.Size(whole)
        entry.chunks[0].sizes = torch.Size(part or whole)
        entry.chunks[0].offsets = torch.Size([0] * len(whole))

    return rewrite(change)


def _dtype(found: Any) -> None:
    found.state_dict_metadata[NORM].properties.dtype = torch.float64


def _twice(found: Any) -> None:
    entry = found.state_dict_metadata[NORM]
    entry.chunks = entry.chunks * 2


def _on_each_other(found: Any) -> None:
    infos = list(found.storage_data.values())
    infos[1].relative_path, infos[1].offset = infos[0].relative_path, infos[0].offset


def _unplaced(found: Any) -> None:
    found.storage_data = {index: info for index, info in found.storage_data.items() if index.fqn != NORM}


def _transformed(found: Any) -> None:
    for info in found.storage_data.values():
        info.transform_descriptors = ["zstd"]


def _renamed(name: Any) -> Spoil:
    def change(found: Any) -> None:
        found.state_dict_metadata[name] = found.state_dict_metadata.pop(NORM)

    return rewrite(change)


def replaced_part(make: Callable[[Path, bytes], bytes]) -> Spoil:
    """Other bytes where a tensor lies, in a data file of its own; `.metadata` names that."""

    def spoil(directory: Path) -> None:
        found = pickle.loads((directory / ".metadata").read_bytes())  # noqa: S301
        (info,) = (info for index, info in found.storage_data.items() if index.fqn == NORM)
        whole = (directory / info.relative_path).read_bytes()
        made = make(directory, whole[info.offset : info.offset + info.length])
        (directory / "__9_9.distcp").write_bytes(made)
        place(NORM, relative_path="__9_9.distcp", offset=0, length=len(made))(directory)

    return spoil


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _compressed(_directory: Path, whole: bytes) -> bytes:
    """A zip bomb: a hundred megabytes of zeros in some kilobytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(10**8) if name.endswith("/data/0") else old.read(name))
    return stream.getvalue()


def _flipped(at: slice) -> Callable[[Path, bytes], bytes]:
    def make(_directory: Path, whole: bytes) -> bytes:
        changed = bytearray(whole)
        changed[at] = bytes(255 - value for value in changed[at])
        return bytes(changed)

    return make


def file(name: str, content: bytes | Callable[[Path], bytes]) -> Spoil:
    """Another file."""

    def spoil(directory: Path) -> None:
        (directory / name).write_bytes(content if isinstance(content, bytes) else content(directory))

    return spoil


def cut(name: str, share: float) -> Spoil:
    """A file's beginning."""

    def spoil(directory: Path) -> None:
        whole = (directory / name).read_bytes()
        (directory / name).write_bytes(whole[: int(len(whole) * share)])

    return spoil


def _emptied(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


NESTED = b"\x80\x02}" + b")" + b"2\x86" * 40 + b"Ns."
"""A dictionary whose key is a tuple of two tuples of two tuples …: to hash it takes for ever."""


def _with_pickle(pickled: bytes, whole: bytes | None = None) -> bytes:
    """As torch.save writes it, but for the pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole or _saved({}))) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("/data.pkl") else old.read(name))
    return stream.getvalue()


FOLDERS: dict[str, tuple[Spoil, str]] = {
    "metadata runs code": (file(".metadata", lambda d: pickle.dumps(RunsCode(d.parent))), "does not belong"),
    "common state runs code": (
        file("common.pt", lambda d: _saved({"a": RunsCode(d.parent)})),
        "common.pt cannot be",
    ),
    "common state is a list": (file("common.pt", _saved([1])), "common.pt holds no state"),
    "common state is a plain pickle": (file("common.pt", pickle.dumps({})), "common.pt cannot be trusted"),
    "metadata is empty": (file(".metadata", b""), "cannot be trusted or read"),
    "metadata is a dict": (file(".metadata", pickle.dumps({})), "describes no checkpoint"),
    "metadata without its list of tensors": (
        rewrite(lambda m: delattr(m, "state_dict_metadata")),
        "lists no tensors",
    ),
    "metadata without places": (rewrite(lambda m: delattr(m, "storage_data")), "does not say where"),
    "metadata is all lists": (file(".metadata", b"\x80\x04" + b"]" * (3 * 2**20)), "more than the"),
    "metadata asks for 2^40 bytes": (
        file(".metadata", b"\x80\x04\x8e" + struct.pack("<Q", 2**40)),
        "trusted or read",
    ),
    "metadata has a place of 2^31 in its memo": (
        file(".metadata", b"\x80\x04Nr" + struct.pack("<I", 2**31 - 1) + b"."),
        "trusted or read",
    ),
    "metadata asks for 2^33 bytes that can be changed": (
        file(".metadata", b"\x80\x05\x96" + struct.pack("<Q", 2**33)),
        "trusted or read",
    ),
    "metadata has a key that is hashed for ever": (file(".metadata", NESTED), "tuples in each other"),
    "common state has a key that is hashed for ever": (
        file("common.pt", _with_pickle(NESTED)),
        "tuples in each other",
    ),
    "a part has a key that is hashed for ever": (
        replaced_part(lambda _d, whole: _with_pickle(NESTED, whole)),
        "tuples in each other",
    ),
    "format is a list": (file("metadata.json", b"[1]"), "metadata.json cannot be read"),
    "format is deep": (file("metadata.json", b"[" * 100_000), "metadata.json cannot be read"),
    "format has no backend": (file("metadata.json", b"{}"), "metadata.json cannot be read"),
    "format of another version": (
        file("metadata.json", b'{"sharded_backend": "torch_dist", "sharded_backend_version": 7}'),
        "sharded_backend_version=7",
    ),
    "format names what is unknown": (
        file("metadata.json", b'{"sharded_backend": "torch_dist", "common_backend": "evil"}'),
        "common_backend=evil",
    ),
    "nothing is left": (_emptied, "no complete torch_dist checkpoint"),
    "a data file is cut": (cut("__0_0.distcp", 0.5), "bytes of the data file __0_0.distcp"),
    "a data file is empty": (cut("__0_0.distcp", 0), "bytes of the data file __0_0.distcp"),
    "ModelOpt's state": (lambda d: (d / "modelopt_state").mkdir(), "modelopt_state"),
    "size 0": (_shape((0,), (4,)), "outside its shape"),
    "size 0 throughout": (_shape((0,)), "bytes are stored where its shape needs 0"),
    "size 1e9": (_shape((10**9,)), "4000000000 bytes where"),
    "size 2^62": (_shape((2**62,)), "bytes where"),
    "size -4": (says(NORM, size=(-4,)), "has no shape"),
    "size of text": (says(NORM, size="abc"), "has no shape"),
    "ten axes": (_shape((1,) * 9 + (4,)), "has no shape"),
    "larger than its parts": (_shape((5,), (4,)), "leave gaps"),
    "smaller than its parts": (_shape((3,), (4,)), "outside its shape"),
    "less than is stored": (_shape((3,)), "16 bytes are stored where its shape needs 12"),
    "another dtype": (rewrite(_dtype), "16 bytes are stored where its shape needs 32"),
    "no dtype": (says(NORM, properties=None), "has no dtype"),
    "a part twice": (rewrite(_twice), "lie on each other"),
    "a part elsewhere": (chunk(NORM, offsets=torch.Size([2])), "outside its shape"),
    "a part of no numbers": (chunk(NORM, offsets=[None]), "outside its shape"),
    "no parts": (says(NORM, chunks=[]), "leave gaps"),
    "parts are a number": (says(NORM, chunks=3), "of which parts"),
    "no place": (rewrite(_unplaced), f"has no data for {NORM}"),
    "two tensors at one place": (rewrite(_on_each_other), "lie on each other"),
    "beyond the file": (place(NORM, offset=2**40), "bytes of the data file"),
    "before the file": (place(NORM, offset=-1), "does not say where"),
    "no bytes": (place(NORM, length=0), "does not say where"),
    "outside the folder": (place(NORM, relative_path="../../etc/passwd"), "outside the checkpoint"),
    "an absolute path": (place(NORM, relative_path="/etc/passwd"), "outside the checkpoint"),
    "no data file": (place(NORM, relative_path="common.pt"), "no data file"),
    "a data file that is missing": (place(NORM, relative_path="__7_7.distcp"), "which is missing"),
    "a data file's name of 5000 characters": (
        place(NORM, relative_path="a" * 5000 + ".distcp"),
        "which is missing",
    ),
    "transformed": (rewrite(_transformed), "is transformed"),
    "a name of 5000 characters": (_renamed("a" * 5000), "no text, or too long"),
    "a name that is a number": (_renamed(5), "no text, or too long"),
    "no tensors": (rewrite(lambda found: vars(found).update(state_dict_metadata=None)), "lists no tensors"),
    "no places": (
        rewrite(lambda found: vars(found).update(storage_data=[])),
        "does not say where tensors lie",
    ),
    "a tensor is a number": (
        rewrite(lambda found: found.state_dict_metadata.update({NORM: 3})),
        "neither that it is a tensor",
    ),
    "a part runs code": (replaced_part(lambda d, _: _saved(RunsCode(d.parent))), "bytes are stored"),
    "a part of a part's size runs code": (
        replaced_part(lambda d, _: _saved([RunsCode(d.parent), torch.zeros(4)])),
        "cannot be read",
    ),
    "a part is a list": (replaced_part(lambda _d, _b: _saved([torch.zeros(4)])), "no tensor of its size"),
    "a part is no archive": (replaced_part(lambda _d, whole: b"x" * len(whole)), "no zip archive"),
    "a part is a plain pickle": (
        replaced_part(lambda _d, _b: pickle.dumps(torch.zeros(4).numpy().tobytes())),
        "no zip archive",
    ),
    "a part is compressed": (replaced_part(_compressed), "is compressed"),
    "a part's directory is flipped": (replaced_part(_flipped(slice(-200, None))), "no zip archive"),
    "a part whose directory is said to be elsewhere": (
        replaced_part(_flipped(slice(-6, -5))),
        "not the same",
    ),
    "a part's pickle is flipped": (replaced_part(_flipped(slice(64, 128))), "cannot be read"),
    "a part of another shape": (replaced_part(lambda _d, _b: _saved(torch.zeros(2, 2))), "has parts of"),
    "a part of another dtype": (
        replaced_part(lambda _d, _b: _saved(torch.zeros(4, dtype=torch.int32))),
        "has parts of",
    ),
    "a part that repeats one number": (
        replaced_part(lambda _d, _b: _saved(torch.zeros(1).expand(4))),
        "4 bytes are stored",
    ),
}
"""What spoils a torch_dist folder, and words of the error."""


def _legacy(value: Any) -> Spoil:
    return lambda path: torch.save(value(path.parent) if callable(value) else value, path)


def _bomb(path: Path) -> None:
    torch.save({"model.x": torch.zeros(4)}, path)
    path.write_bytes(_compressed(path.parent, path.read_bytes()))


FILES: dict[str, tuple[Spoil, str]] = {
    "runs code": (_legacy(lambda folder: {"model.x": RunsCode(folder)}), "cannot be trusted"),
    "a list": (_legacy([1]), "no weights by name"),
    "names are numbers": (_legacy({3: torch.zeros(2)}), "names are no text"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be trusted or read"),
    "torn": (lambda path: path.write_bytes(b"torn"), "cannot be trusted or read"),
    "a key that is hashed for ever": (
        lambda path: path.write_bytes(_with_pickle(NESTED)),
        "cannot be trusted or read",
    ),
    "a plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "cannot be trusted or read"),
    "compressed": (_bomb, "cannot be trusted or read"),
}
"""What makes a `model_weights.ckpt` of old NeMo releases that is none, and words of the error."""


def gguf(keys: int = 0, tensors: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    """A GGUF header that says how much follows, and what follows."""
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _array(key: bytes, kind: int, count: int, body: bytes = b"") -> bytes:
    return _text(key) + struct.pack("<IIQ", 9, kind, count) + body


def _tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


_ALIGNMENT = _text(b"general.alignment") + struct.pack("<I", 4)

GGUFS: dict[str, tuple[bytes, str]] = {
    "an array of 2^40": (
        gguf(1, 0, _array(b"tokenizer.ggml.tokens", 0, 2**40) + bytes(32)),
        "for which there is no room",
    ),
    "an array of 2^40 texts": (
        gguf(1, 0, _array(b"tokenizer.ggml.tokens", 8, 2**40)),
        "for which there is no room",
    ),
    "ten million small numbers": (
        gguf(1, 0, _array(b"a", 0, 10**7, bytes(10**7))),
        "for which there is no room",
    ),
    "an array of arrays": (gguf(1, 0, _array(b"a", 9, 4, struct.pack("<IQ", 9, 1) * 40)), "list of lists"),
    "2^63 keys": (gguf(2**63, 0, bytes(64)), "keys, for which there is no room"),
    "2^63 tensors": (gguf(0, 2**63, bytes(64)), "tensors, for which there is no room"),
    "many keys in a hole": (gguf(10**6, 0, bytes(2**24)), "keys, for which there is no room"),
    "a text of 2^60": (gguf(1, 0, struct.pack("<Q", 2**60) + bytes(16)), "ends at"),
    "no UTF-8": (gguf(1, 0, _text(b"\xff\xfe") + struct.pack("<IB", 0, 1)), "no UTF-8"),
    "an unknown type": (gguf(1, 0, _text(b"a") + struct.pack("<IQ", 77, 1)), "unknown type 77"),
    "a key twice": (gguf(2, 0, (_text(b"a") + struct.pack("<IB", 0, 1)) * 2), "is there twice"),
    "version 9": (gguf(0, 0, version=9), "version 9"),
    "alignment 0": (gguf(1, 0, _ALIGNMENT + struct.pack("<I", 0)), "no power of 2"),
    "alignment of a byte": (
        gguf(1, 0, _text(b"general.alignment") + struct.pack("<IB", 0, 32)),
        "general.alignment is of the type 0, not 4",
    ),
    "a name with a line's end": (gguf(1, 0, _text(b"a\nb") + struct.pack("<IB", 0, 1)), "cannot be printed"),
    "a name of 256 characters": (gguf(0, 1, _tensor(b"n" * 256, (4,)) + bytes(64)), "256 characters"),
    "alignment 48": (gguf(1, 0, _ALIGNMENT + struct.pack("<I", 48)), "no power of 2"),
    "a product that overflows": (
        gguf(0, 1, _tensor(b"t", (2**32, 2**32)) + bytes(64)),
        "beyond the file's end",
    ),
    "a product that overflows to 0": (
        gguf(0, 1, _tensor(b"t", (2**33, 2**33, 2)) + bytes(64)),
        "beyond the file's end",
    ),
    "no elements": (gguf(0, 1, _tensor(b"t", (0, 4)) + bytes(64)), "no elements"),
    "no axes": (gguf(0, 1, _tensor(b"t", ()) + bytes(64)), "has 0 axes"),
    "2^31 axes": (gguf(0, 1, _text(b"t") + struct.pack("<I", 2**31) + bytes(64)), "has 2147483648 axes"),
    "an offset beyond the file": (
        gguf(0, 1, _tensor(b"t", (4,), offset=2**60) + bytes(64)),
        "beyond the file's end",
    ),
    "an offset of 2^64 - 1": (
        gguf(0, 1, _tensor(b"t", (4,), offset=2**64 - 1) + bytes(64)),
        "beyond the file's end",
    ),
    "tensors on each other": (
        gguf(0, 2, _tensor(b"t", (4,)) + _tensor(b"u", (4,), offset=8) + bytes(96)),
        "on each other",
    ),
    "a tensor twice": (gguf(0, 2, _tensor(b"t", (4,)) * 2 + bytes(96)), "is there twice"),
    "rows of half a block": (gguf(0, 1, _tensor(b"t", (16,), kind=8) + bytes(96)), "cannot be divided"),
}
"""GGUF files, and words of the error."""
