# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Spoilt weights are one error that names the file, at once and in little memory; none of them runs code."""

import io
import resource
import shutil
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from nemo_ee.checkpoint import gguf
from nemo_ee.checkpoint.exits.exit_tensors import check_token_ids
from nemo_ee.checkpoint.gguf import header
from nemo_ee.checkpoint.legacy import read_legacy_weights
from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint, handed_over, layout, zip_records
from nemo_ee.errors import CheckpointError
from nemo_ee.modeling.finite import not_finite
from tests.support import hostile_weights, tiny_gguf

MOST_SECONDS, MOST_MEMORY = 1.0, 100 * 2**20


def open_and_read(directory: Path) -> dict[str, torch.Tensor]:
    """All that anything of ours reads of a folder."""
    checkpoint = TorchDistCheckpoint(directory)
    checkpoint.check_stored_sizes()
    return {key: checkpoint.read(key) for key in checkpoint.tensors}


def refused(work: Callable[[], object]) -> str:
    """The error, which comes at once and in little memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(CheckpointError) as error:
        work()
    assert time.perf_counter() - start < MOST_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    return hostile_weights.write_torch_dist(
        tmp_path_factory.mktemp("honest") / "c", hostile_weights.tensors()
    )


@pytest.mark.parametrize("name", hostile_weights.FOLDERS)
def test_spoilt_folders(name, honest, tmp_path):
    spoil, words = hostile_weights.FOLDERS[name]
    directory = tmp_path / "c"
    shutil.copytree(honest, directory)
    spoil(directory)
    message = refused(lambda: open_and_read(directory))
    assert words in message and str(directory) in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", hostile_weights.FILES)
def test_spoilt_files_of_old_releases(name, tmp_path):
    spoil, words = hostile_weights.FILES[name]
    path = tmp_path / "model_weights.ckpt"
    spoil(path)
    for mmap in (False, True):
        message = refused(lambda mmap=mmap: read_legacy_weights(path, mmap))
        assert words in message and str(path) in message
    assert not (tmp_path / "ran").exists()


def test_honest_folders_are_read_and_handed_over(honest, tmp_path):
    for key, value in hostile_weights.tensors().items():
        assert open_and_read(honest)[key].equal(value)
    checkpoint = TorchDistCheckpoint(honest)
    with handed_over(checkpoint) as folder:
        copied = TorchDistCheckpoint(folder)
        assert all(copied.read(key).equal(value) for key, value in hostile_weights.tensors().items())
    assert not folder.exists()


def test_what_is_exchanged_after_it_was_checked_is_not_unpickled(honest, tmp_path):
    """megatron-core reads a copy, whose pickles are written anew from what was checked."""
    directory = tmp_path / "c"
    shutil.copytree(honest, directory)
    checkpoint = TorchDistCheckpoint(directory)
    for name in ("metadata runs code", "common state runs code"):
        hostile_weights.FOLDERS[name][0](directory)
    with handed_over(checkpoint) as folder:
        for name in (".metadata", "common.pt"):
            assert b"touch" not in (folder / name).read_bytes()
        target = {key: torch.zeros_like(value) for key, value in hostile_weights.tensors().items()}
        torch.distributed.checkpoint.load(target, checkpoint_id=folder, no_dist=True)
        assert torch.load(folder / "common.pt", weights_only=False) == {}
    assert all(target[key].equal(value) for key, value in hostile_weights.tensors().items())
    assert not (tmp_path / "ran").exists()


class _Called:
    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


def _saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        _Called(bytearray, 2**33),
        _Called(torch.Tensor, 2**33),
        {"a": [_Called(torch.FloatStorage, 2**33)]},
        torch.zeros(2),
    ],
    ids=["bytearray", "tensor", "storage", "honest"],
)
def test_state_that_asks_for_memory(content, honest, tmp_path):
    folder = shutil.copytree(honest, tmp_path / "folder")
    (folder / "common.pt").write_bytes(_saved({"state": content}))
    if isinstance(content, torch.Tensor):
        assert TorchDistCheckpoint(folder).common["state"].shape == (2,)
    else:
        assert "common.pt cannot be trusted or read" in refused(lambda: TorchDistCheckpoint(folder))


def test_metadata_does_not_change_the_classes_that_it_names(honest, tmp_path):
    """A pickle sets attributes of classes as of objects, and those of `Path` would be all paths' from then on."""
    folder = shutil.copytree(honest, tmp_path / "folder")
    change = b"cpathlib\nPosixPath\n(N}(Vexists\nccollections\nOrderedDict\nutb0"  # (None, {name: value}), BUILD, POP
    data = (folder / ".metadata").read_bytes()
    assert data[:1] == b"\x80"
    (folder / ".metadata").write_bytes(data[:2] + change + data[2:])
    assert "it changes PosixPath" in refused(lambda: TorchDistCheckpoint(folder))
    assert (folder / ".metadata").exists() is True


def test_objects_are_handed_over_if_they_are_of_known_classes(tmp_path):
    stream = io.BytesIO(b"scales")
    content = {**hostile_weights.tensors(), "model.layers._extra_state/shard_0_1": stream}
    hostile_weights.write_torch_dist(tmp_path / "c", content)
    checkpoint = TorchDistCheckpoint(tmp_path / "c")
    assert checkpoint.objects == {"model.layers._extra_state"}
    with handed_over(checkpoint, objects=True) as folder:
        (key,) = TorchDistCheckpoint(folder).object_keys
        loaded = torch.load(io.BytesIO(TorchDistCheckpoint(folder).read_object(key)), weights_only=False)
    assert loaded.getvalue() == b"scales"
    with handed_over(checkpoint) as folder:
        assert TorchDistCheckpoint(folder).object_keys == []
    content["model.layers._extra_state/shard_0_1"] = hostile_weights.RunsCode(tmp_path)
    hostile_weights.write_torch_dist(tmp_path / "hostile", content)
    with pytest.raises(CheckpointError, match="_extra_state/shard_0_1 cannot be trusted"):
        with handed_over(TorchDistCheckpoint(tmp_path / "hostile"), objects=True):
            pass
    assert not (tmp_path / "ran").exists()


def test_parts_make_up_a_tensor_where_each_element_is_in_one():
    """Against counting, with every pair and triple of boxes of a small grid."""
    shape = (3, 2)
    boxes = [
        (start, extent)
        for start in product(range(3), range(2))
        for extent in product(range(4), range(3))
        if all(s + e <= n for s, e, n in zip(start, extent, shape, strict=True)) and 0 not in extent
    ]

    def counted(chosen: tuple) -> bool:
        grid = torch.zeros(shape)
        for start, extent in chosen:
            grid[tuple(slice(s, s + e) for s, e in zip(start, extent, strict=True))] += 1
        return bool((grid == 1).all())

    fine = 0
    for count in (1, 2, 3):
        for chosen in product(boxes, repeat=count):
            expected = counted(chosen)
            assert layout._makes_up(shape, chosen) == expected
            fine += expected
    assert fine > 10
    assert layout._makes_up((), [((), ())]) and not layout._makes_up((), [])


@pytest.mark.parametrize("name", hostile_weights.GGUFS)
def test_spoilt_gguf_files(name, tmp_path):
    content, words = hostile_weights.GGUFS[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    message = refused(lambda: gguf.inspect(path))
    assert words in message and str(path) in message and "truncated or damaged" in message


def test_a_header_is_read_as_the_package_gguf_reads_it(tmp_path):
    from gguf import GGUFReader

    more = {
        "a.float": 0.1,
        "a.bool": True,
        "a.list": [1.5, 2.5],
        "a.texts": ["x", "äöü", ""],
        "a.bools": [True, False],
    }
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"):
        network = one_layer()
        path = tiny_gguf.write(tmp_path / f"{kind}.gguf", network, keys=more, quantization=kind)
        values, tensors = header.read(path)
        theirs = GGUFReader(path)
        found = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
        assert values.keys() == found.keys() and len(values) > 20
        for key, value in found.items():
            assert values[key] == (pytest.approx(value, rel=1e-7) if isinstance(value, float) else value), key
            assert type(values[key]) is type(value)
        assert tensors.keys() == {tensor.name for tensor in theirs.tensors}
        for tensor in theirs.tensors:
            mine = tensors[tensor.name]
            assert mine.tensor_type == tensor.tensor_type and mine.shape == tuple(tensor.shape.tolist())
            assert mine.data.dtype == tensor.data.dtype and mine.data.shape == tensor.data.shape
            assert mine.data.tobytes() == tensor.data.tobytes()


def one_layer():
    from tests.support import tiny_llama

    return tiny_llama.model(tiny_gguf.config(num_hidden_layers=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_numbers_that_are_none_are_found_in_any_dtype(dtype):
    honest = torch.full((40, 50), 448.0).to(dtype)  # a sum in half precision would be infinite
    assert not_finite([("honest", honest), ("none", honest[:0]), ("whole", torch.arange(3))]) == []
    for value in (float("nan"), float("inf"), -float("inf")):
        if dtype == torch.float8_e4m3fn and value == value:
            continue  # it has none
        spoilt = honest.clone()
        spoilt[3, 4] = value
        both = spoilt.clone()
        both[5, 6] = -value
        found = not_finite([("a", honest), ("b", spoilt), ("c", spoilt.t()), ("d", both)])
        assert found == ["b", "c", "d"]


def test_large_numbers_are_numbers():
    assert not_finite([("x", torch.full((100,), 3e38))]) == [], "whose sum is not finite in their dtype"


def test_weights_to_convert_that_are_no_numbers_are_named(tmp_path):
    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo
    from tests.support import tiny_llama

    network = tiny_llama.model(tiny_gguf.config(num_hidden_layers=1))
    with torch.no_grad():
        network.model.norm.weight[2] = float("nan")
    file = tiny_gguf.write(tmp_path / "m.gguf", network)
    network.save_pretrained(tmp_path / "hf")
    tiny_llama.tokenizer(network.config.vocab_size).save_pretrained(tmp_path / "hf")
    for source in (file, tmp_path / "hf"):
        with pytest.raises(
            CheckpointError, match=r"1 weights hold NaN or infinities, first model\.norm\.weight"
        ):
            convert_to_nemo(source, tmp_path / "m.nemo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m.gguf"]


@pytest.mark.parametrize("ids", [[1, 1], [2, 1], [-1, 3], [1, 9], [], [[1, 2]], [1.0, 2.0]])
def test_a_shortlist_names_tokens_of_the_vocabulary(ids):
    check_token_ids("k", torch.tensor([0, 3, 8]), 9, "f")
    with pytest.raises(CheckpointError, match="f: k must name distinct tokens of 9"):
        check_token_ids("k", torch.tensor(ids), 9, "f")


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (300, 1000)])
def test_how_much_is_stored_is_known_from_an_archives_end(shape, monkeypatch):
    """By the quick way and by zipfile, whatever torch writes."""
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        tensor = torch.ones(shape, dtype=dtype)
        stream = io.BytesIO()
        torch.save(tensor, stream)
        data = stream.getvalue()
        needed = tensor.numel() * tensor.element_size()

        def read(at: int, count: int, data: bytes = data) -> bytes:
            return data[at : at + count]

        assert zip_records._plainly_stored(data[-4096:], len(data)) == needed
        for quick in (True, False):
            with monkeypatch.context() as patch:
                if not quick:
                    patch.setattr(zip_records, "_plainly_stored", lambda end, length: None)
                zip_records.check_tensor(read, len(data), needed)
                with pytest.raises(zip_records.ZipRecordsError, match="where its shape needs"):
                    zip_records.check_tensor(read, len(data), needed + 1)
