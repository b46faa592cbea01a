# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""`.nemo` files made at random: read as tarfile and OmegaConf read them, or refused by one error with their name."""

import math
import os
import shutil
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from nemo_ee.checkpoint import archive, model_config
from nemo_ee.errors import CheckpointError
from nemo_ee.files import plain_json, plain_yaml
from nemo_ee.files.tar_headers import TarArchive
from tests.support import hostile_nemo
from tests.support.fuzz import EXAMPLES, fuzz, refusal_of
from tests.support.mutations import spoilt, spoilt_bytes, values
from tests.support.tar_examples import CONFIG, archives, of_tarfile

TAGS = (
    b"&a ", b"*a", b"!!str ", b"!x ", b"<<: ", b"? ", b"- ", b": ", b"${num_layers}", b"${oc.env:HOME}",
    b"${.optim.lr}", b"${optim.name}", b"1e5", b"0o7", b"0x1F", b"1:30", b".inf", b"2001-01-01", b"yes", b"~", b"{",
    b"]", b"|\n", b">-\n", b"'", b'"', b"#", b"%YAML 1.2\n", b"---\n", b"...\n", b"\t", b"\xef\xbb\xbf", b"\xff",
    b"_", b"=",
)  # fmt: skip
SMALL = (
    b"a: 1\nb: [1, 2.5, yes, ~]\n", b"x: &a {y: 1}\nz: *a\n", b"- 1\n- a: b\n", b"a: |\n  text\n  more\nb: 'c'\n",
    b"a: ${b}\nb: ${c.d}\nc: {d: 3, e: '${.d}'}\n", b"1: 2\n", b"{a: b, c: [d, {e: f}]}", b"a: 0b101\nb: 1_000\n",
)  # fmt: skip


@pytest.mark.parametrize("examples", EXAMPLES)
def test_archives(examples, tmp_path):
    """What is accepted has the members that tarfile finds; extracting writes them, and nothing beside."""
    path, target = tmp_path / "m.nemo", tmp_path / "target"
    target.mkdir()

    def check(data: bytes) -> bool:
        path.write_bytes(data)
        with_members, refused = refusal_of(lambda: TarArchive(path), CheckpointError, path)
        document, unreadable = refusal_of(lambda: archive.read_config(path), CheckpointError, path, 20)
        extracted, unpacked = refusal_of(
            lambda: archive.extract(path, target / "x"), CheckpointError, path, 20
        )
        try:
            assert unreadable if refused else True
            assert (extracted is None) == (unpacked is not None)
            if refused:
                assert extracted is None and document is None
                return False
            with with_members:
                members = {
                    name: (each.is_folder, with_members.read(each))
                    for name, each in with_members.members.items()
                }
            assert members == of_tarfile(path)
            if extracted:
                written = {
                    str(file.relative_to(extracted)): (
                        file.is_dir(),
                        b"" if file.is_dir() else file.read_bytes(),
                    )
                    for file in [extracted, *extracted.rglob("*")]
                }
                assert {**written, **members} == written
                assert all(is_folder for name, (is_folder, _) in written.items() if name not in members)
            return extracted is not None
        finally:
            shutil.rmtree(target / "x", ignore_errors=True)
            assert os.listdir(target) == []

    small = (name for name in hostile_nemo.FILES if name not in ("a gzip bomb", "300,000 empty members"))

    def first():
        for name in small:
            hostile_nemo.FILES[name].write(path)
            yield path.read_bytes()

    assert fuzz(archives, check, examples, first()) > examples / 40


def same(one: Any, other: Any) -> bool:
    """Whether values are equal in type, too; nan is nan."""
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
        )
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_yaml(examples):
    """What is read is what OmegaConf makes of the same text, references resolved."""

    def check(text: bytes) -> bool:
        try:
            found = plain_yaml.load(text)
        except plain_yaml.YamlError as error:
            assert len(str(error)) < 500 and "\n" not in str(error)
            return False
        try:
            theirs = yaml.load(text.decode(), get_yaml_loader())
        except (
            yaml.scanner.ScannerError,
            yaml.parser.ParserError,
        ):  # PyYAML in Python, for what libyaml takes
            return False
        if isinstance(theirs, dict | list):
            theirs = OmegaConf.to_container(OmegaConf.create(theirs), resolve=True)
        assert same(found, theirs), (found, theirs)
        return True

    texts = spoilt_bytes([CONFIG, *SMALL, *SMALL], TAGS) | values.map(
        lambda value: yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    )
    assert fuzz(texts, check, examples) > examples / 5


@pytest.mark.parametrize("examples", EXAMPLES)
def test_configurations(examples, tmp_path):
    """Values of any kind in any place: what is accepted has no key that anything is built by, and fit sizes."""
    path = tmp_path / "m.nemo"
    sections = dict(early_exit={"layers": [1, 2], "head": {"type": "norm"}}, data={"data_prefix": [1, "x"]})
    keys = st.sampled_from(
        ("_target_", "cls", "params", "special_tokens", "chat_template", "library", "base")
    )
    strange = values | st.dictionaries(keys, values, max_size=2)

    def check(document: Any) -> bool:
        text = yaml.safe_dump(document, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")
        hostile_nemo.with_config(text)(path)
        found, refused = refusal_of(lambda: archive.read_config(path), CheckpointError, path, 20)
        if refused:
            return False
        read = OmegaConf.to_container(found, resolve=True)
        given = yaml.load(text.decode(), get_yaml_loader())
        given = given.get("model", given)
        names = {key.rpartition(".")[2] for key, _ in plain_yaml.walk(read)}
        assert not names & model_config.INSTANTIATION
        for key, most in model_config.SIZES.items():
            assert read.get(key) is None or 1 <= read[key] <= most
        dropped = {"target", "tokenizer"}
        assert same(*({key: each[key] for key in each if key not in dropped} for each in (read, given)))
        return True

    assert (
        fuzz(spoilt({**hostile_nemo.GOOD, **sections}, strange), check, examples, [hostile_nemo.GOOD])
        > examples / 20
    )


@pytest.mark.parametrize("examples", EXAMPLES)
def test_json(examples, tmp_path):
    """What is read is what Python's json reads; `config.json` of a Hugging Face folder."""
    import json

    path = tmp_path / "config.json"

    def check(text: bytes) -> bool:
        path.write_bytes(text)
        found, refused = refusal_of(lambda: plain_json.load_section(path), CheckpointError, path)
        if not refused:
            assert same(found, json.loads(text))
        return not refused

    honest = json.dumps({"model_type": "llama", "sizes": [1, 2.5, None], "deep": {"a": {"b": True}}}).encode()
    tokens = (
        b"{",
        b"}",
        b"[",
        b'"',
        b"\\u",
        b"\\ud800",
        b"NaN",
        b"-",
        b"1e999",
        b",",
        b":",
        b"9" * 5000,
        b"\xff",
    )
    texts = spoilt_bytes([honest, b"{}", b"[1]"], tokens) | values.map(
        lambda value: json.dumps(value).encode()
    )
    assert (
        fuzz(texts, check, examples, [b"[" * 100_000, b'{"a": ' * 100_000, b"", b"\xff", b"null"])
        > examples / 20
    )


def test_a_check_that_takes_too_much_fails():
    """The bounds themselves."""

    def slow(_: Any) -> None:
        while math.pi:
            math.sqrt(2)

    with pytest.raises(AssertionError, match="1000 ms"):
        fuzz(st.none(), slow, 1, [None])
    with pytest.raises(MemoryError):
        fuzz(st.none(), lambda _: bytearray(200 * 2**20), 1, [None])
