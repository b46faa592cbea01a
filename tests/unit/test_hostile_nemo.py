# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Files from elsewhere are refused by name, at once, and without doing anything; honest ones are read as ever."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_ee.checkpoint import archive, model_config, sizes
from nemo_ee.errors import CheckpointError
from nemo_ee.files import plain_json, plain_yaml
from nemo_ee.files.tar_headers import TarArchive
from tests.support import hostile_nemo
from tests.support.nemo_confs import CONFS, conf
from tests.support.script import ROOT

SECONDS, MIB = 1.0, 100


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """What the reader did with each file, by name; in a process of its own."""
    folder = str(tmp_path_factory.mktemp("hostile"))
    command = [sys.executable, "-m", "tests.support.refusals", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.stderr == ""
    return {line["name"]: {**line, "path": f"{folder}/m.nemo"} for line in lines}


@pytest.mark.parametrize("name", hostile_nemo.FILES)
def test_hostile_files_are_refused_by_name_at_once(refusals, name):
    found = refusals[name]
    assert found["refused"], found["message"]
    for line in found["message"].splitlines():
        assert line.startswith(f"{found['path']}: ") and "; " in line and len(line) < 1000
    for word in hostile_nemo.FILES[name].words:
        assert word in found["message"]
    assert found["seconds"] < SECONDS and found["mib"] < MIB, found
    assert found["left"] == []


def test_the_configuration_that_they_change_is_read(tmp_path):
    hostile_nemo.changed()(tmp_path / "m.nemo")
    assert archive.read_config(tmp_path / "m.nemo") == hostile_nemo.GOOD


class TestArchives:
    @pytest.mark.parametrize("form", ["USTAR_FORMAT", "GNU_FORMAT", "PAX_FORMAT"])
    @pytest.mark.parametrize("mode", ["w:", "w:gz"])
    def test_what_tarfile_writes_is_read_as_tarfile_reads_it(self, tmp_path, form, mode):
        names = [
            "model_config.yaml",
            "./model_weights/data",
            "model_weights/" + "n" * 90,
            "f" * 60 + "/" + "g" * 70,
        ]
        names += [] if form == "USTAR_FORMAT" else ["ü/" + "ä" * 100, "/".join("h" * 30 for _ in range(20))]
        path = tmp_path / "m.nemo"
        with tarfile.open(path, mode, format=getattr(tarfile, form)) as tar:
            tar.addfile(_folder("model_weights"))
            for number, name in enumerate(names):
                info = tarfile.TarInfo(name)
                info.size, info.mtime = 300 * number, 1.5 if form == "PAX_FORMAT" else 1
                tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
        with tarfile.open(path) as theirs, TarArchive(path) as ours:
            expected = {
                str(Path(entry.name)): (entry.isdir(), entry.size, entry.offset_data)
                for entry in theirs.getmembers()
            }
            assert {m.name: (m.is_folder, m.size, m.offset) for m in ours.members.values()} == expected
            for name, (is_folder, *_) in reversed(expected.items()):
                if not is_folder:
                    content = theirs.extractfile(next(e for e in theirs if str(Path(e.name)) == name)).read()
                    assert ours.read(ours.members[name]) == content

    @pytest.mark.parametrize("form", ["GNU_FORMAT", "PAX_FORMAT"])
    def test_files_above_8_gib_are_passed_over(self, tmp_path, form):
        """A hole stands for the weights: reading them would take seconds."""
        size, text, path = 9 * 2**30 + 5, b"num_layers: 4\n", tmp_path / "m.nemo"
        weights, config = tarfile.TarInfo("model_weights/data"), tarfile.TarInfo("model_config.yaml")
        weights.size, config.size = size, len(text)
        with open(path, "wb") as file:
            file.write(weights.tobuf(getattr(tarfile, form)))
            file.seek(-(-size // 512) * 512, io.SEEK_CUR)
            file.write(config.tobuf(getattr(tarfile, form)) + hostile_nemo.padded(text) + bytes(1024))
        assert archive.read_config(path).num_layers == 4
        with TarArchive(path) as found:
            assert found.members["model_weights/data"].size == size

    def test_weights_are_passed_over(self, tmp_path, monkeypatch):
        data = bytes(50 * 2**20)
        hostile_nemo.with_config(hostile_nemo.GOOD, ("model_weights/data", data))(tmp_path / "m.nemo")
        read, take = [], TarArchive._take
        monkeypatch.setattr(
            TarArchive, "_take", lambda self, size, whole=True: read.append(size) or take(self, size, whole)
        )
        archive.read_config(tmp_path / "m.nemo")
        assert 0 < sum(read) < 5000

    def test_repetitive_weights_in_a_gzipped_archive_are_no_bomb(self, tmp_path):
        data = b"weights that are alike " * 10**6
        with tarfile.open(tmp_path / "m.nemo", "w:gz") as tar:
            for name, content in (("model_config.yaml", b"num_layers: 4\n"), ("data", data)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        assert (archive.extract(tmp_path / "m.nemo", tmp_path / "out") / "data").read_bytes() == data

    def test_a_folder_s_configuration_is_judged_as_a_file_s(self, tmp_path):
        (tmp_path / "model_config.yaml").write_text("num_layers: 0\n")
        with pytest.raises(CheckpointError, match="num_layers=0"):
            archive.read_config(tmp_path)
        (tmp_path / "model_config.yaml").write_bytes(bytes(plain_yaml.MOST_BYTES + 1))
        with pytest.raises(CheckpointError, match="bytes"):
            archive.read_config(tmp_path)


def _folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


class TestConfigurations:
    TEXTS = (
        "a: 1\nb: [1, 2.5, x, null, ~, true, no, 'off', \"1\"]\n",
        "a: 1e-5\nb: 1E5\nc: 1.5e3\nd: .5\ne: 5.\nf: .inf\ng: -.INF\nh: 1_000\ni: 0x1F\nj: 0b11\nk: 017\nl: 1:30\n",
        "a: 2024-01-02\nb: 12:30:45\nc: 1.2.3\nd: e=f\ne: '<<'\n1: one\n",
        "a: |\n  {{ x }}\n  {% y %}\nb: >\n  folded\n  text\nc: 'it''s'\nd: \"\\u00fc\\n\"\n",
        "a: &x [1, 2]\nb: *x\nc: {d: *x}\n",
        "{}",
    )

    @pytest.mark.parametrize("text", TEXTS)
    def test_yaml_is_what_omegaconf_reads(self, text):
        assert plain_yaml.load(text.encode()) == OmegaConf.to_container(OmegaConf.create(text))

    def test_values_of_the_same_file_may_be_referred_to(self):
        text = """
        model:
          encoder_seq_length: 64
          max_position_embeddings: ${.encoder_seq_length}
          none: null
          data: {seq_length: "${model.encoder_seq_length}", list: ["${..seq_length}", "${...none}", "${.0}"]}
          far: ${model.data.list.2}
        """
        expected = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
        assert plain_yaml.load(text.encode()) == expected
        assert expected["model"]["far"] == 64

    @pytest.mark.parametrize("name", CONFS)
    def test_nemo_s_own_are_allowed(self, name):
        """As NeMo's examples have them, and as NeMo saves them."""
        whole = conf(name).copy()
        if "cpu_offloading_num_layers" in whole.model:
            whole.model.cpu_offloading_num_layers = 1  # by a resolver of NeMo's, which it saves the result of
        text = OmegaConf.to_yaml(whole)
        expected = OmegaConf.to_container(whole, resolve=True)
        loaded = plain_yaml.load(text.encode())
        assert loaded == expected
        sections = loaded["model"]
        if name != "megatron_gpt_finetuning_config":  # has no sizes
            assert model_config.checked(loaded, "it") is loaded
            model_config.require(sections, "it")
            assert sections["tokenizer"].get("trust_remote_code") is None
            assert sections["tokenizer"]["library"] == whole.model.tokenizer.library

    def test_classes_are_not_the_file_s_choice(self, tmp_path):
        for target, kept in (
            ("this.x", False),
            ("os.system", False),
            (3, False),
            (hostile_nemo.GOOD["target"], True),
        ):
            hostile_nemo.changed(target=target)(tmp_path / "m.nemo")
            assert ("target" in archive.read_config(tmp_path / "m.nemo")) is kept

    def test_files_that_a_library_does_not_read_are_left_out(self, tmp_path):
        section = dict(hostile_nemo.GOOD["tokenizer"], vocab_file="nemo:evil.pickle", trust_remote_code=True)
        hostile_nemo.changed(tokenizer=section)(tmp_path / "m.nemo")
        found = archive.read_config(tmp_path / "m.nemo").tokenizer
        assert found == {**hostile_nemo.GOOD["tokenizer"], "vocab_file": None}

    def test_every_fault_is_listed(self, tmp_path):
        hostile_nemo.changed(num_layers=0, hidden_size="x", cls="y")(tmp_path / "m.nemo")
        with pytest.raises(CheckpointError) as error:
            archive.read_config(tmp_path / "m.nemo")
        assert [line.split(": ")[2] for line in str(error.value).splitlines()] == [
            "cls",
            "num_layers=0",
            "hidden_size='x'",
        ]


class Shape:
    def __init__(self, *size: int):
        self.size = size


class TestSizes:
    CONFIG = dict(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        encoder_seq_length=16,
        make_vocab_size_divisible_by=128,
    )
    SIZE = 32 * (4 * (64 + 32) + 128)
    STACKED = {
        "model.embedding.word_embeddings.weight": Shape(256, 32),
        "model.embedding.position_embeddings.weight": Shape(16, 32),
        "model.decoder.layers.self_attention.linear_qkv.weight": Shape(4, 64, 32),
        "model.decoder.layers.self_attention.linear_proj.weight": Shape(4, 32, 32),
        "model.decoder.layers.mlp.linear_fc2.weight": Shape(4, 32, 64),
        "model.decoder.final_layernorm.weight": Shape(32),
        "model.exits.2.norm.weight": Shape(32),
    }
    NUMBERED = {
        f"module.decoder.layers.{n}.{key.split('layers.')[1]}": Shape(*shape.size[1:])
        for key, shape in STACKED.items()
        for n in range(4)
        if "layers." in key
    } | {key: shape for key, shape in STACKED.items() if "layers." not in key}

    @pytest.mark.parametrize("tensors", [STACKED, NUMBERED], ids=["stacked", "numbered"])
    def test_what_belongs_together(self, tensors):
        sizes.check_tensors(self.CONFIG, tensors, "m.nemo")

    @pytest.mark.parametrize("tensors", [STACKED, NUMBERED], ids=["stacked", "numbered"])
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (dict(num_layers=1_000_000), "num_layers=1000000: the weights have 4 layers"),
            (dict(num_layers=3), "num_layers=3: the weights have 4 layers"),
            (dict(hidden_size=2**20), "hidden_size=1048576: the weights have a width of 32"),
            (dict(ffn_hidden_size=2**24), "ffn_hidden_size=16777216: the weights have MLPs of width 64"),
            (dict(num_attention_heads=8), "num_query_groups=2: the weights have 4 groups"),
            (
                dict(kv_channels=2**16),
                "num_attention_heads=4: the weights have attention of width 32, not 4 x 65536",
            ),
            (dict(num_query_groups=2**16), "num_query_groups=65536: the weights have 2 groups"),
            (dict(encoder_seq_length=2**27), "encoder_seq_length=134217728: the weights have 16 positions"),
            (dict(make_vocab_size_divisible_by=2**24), "divisible_by=16777216: the weights have 256 rows"),
            (dict(override_vocab_size=2**24), "override_vocab_size=16777216: the weights have 256 rows"),
        ],
    )
    def test_what_does_not(self, tensors, changes, words):
        with pytest.raises(CheckpointError, match=f"^m.nemo: .*{words}") as error:
            sizes.check_tensors({**self.CONFIG, **changes}, tensors, "m.nemo")
        assert "; " in str(error.value)

    @pytest.mark.parametrize("tensor", [key for key in STACKED if ".weight" in key and "norm" not in key])
    def test_what_sizes_are_compared_with_must_be_there(self, tensor):
        others = {key: shape for key, shape in self.STACKED.items() if key != tensor}
        with pytest.raises(
            CheckpointError,
            match=f"=[0-9]+: the weights have no {tensor.removeprefix('model.').removeprefix('decoder.layers.')}",
        ):
            sizes.check_tensors(self.CONFIG, others, "m.nemo")

    def test_positions_that_are_no_weights_need_not_be_there(self):
        others = {key: shape for key, shape in self.STACKED.items() if "position" not in key}
        sizes.check_tensors({**self.CONFIG, "position_embedding_type": "rope"}, others, "m.nemo")

    def test_weights_that_have_not_been_opened(self):
        sizes.check_bytes(self.CONFIG, self.SIZE, "m.nemo")
        with pytest.raises(
            CheckpointError, match="m.nemo: num_layers=10000, .* the weights have 16384 bytes"
        ):
            sizes.check_bytes({**self.CONFIG, "num_layers": 10_000}, self.SIZE, "m.nemo")
        with pytest.raises(CheckpointError, match="attention of width 262144"):
            sizes.check_bytes({**self.CONFIG, "kv_channels": 2**16}, self.SIZE, "m.nemo")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "no JSON"),
        (b"[" * 100_000, "nested"),
        (b"[1]", "no JSON object"),
        (b"\xff", "no JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no JSON"),
        (bytes(2**20 + 1), "bytes"),
    ],
)
def test_json_that_is_none(tmp_path, content, words):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"config.json: .*{words}"):
        plain_json.load_section(tmp_path / "config.json")


def test_a_checkpoint_without_weights_is_named(tmp_path):
    from nemo_ee.checkpoint.connector import _check_sizes

    with pytest.raises(
        CheckpointError, match="^m.nemo: holds neither model_weights/ nor model_weights.ckpt.*; "
    ):
        _check_sizes(OmegaConf.create(), None, tmp_path, "m.nemo")


@pytest.mark.parametrize("key", ["num_layers", "hidden_size", "tokenizer"])
def test_exits_that_do_not_say_of_which_model_they_are(tmp_path, key):
    from nemo_ee.checkpoint.exits.adapter import read_adapter_config

    config = dict.fromkeys(model_config.NEEDED, 4) | {"tokenizer": {}, "early_exit": {"layers": [1]}}
    config["base"] = {"name": "b.nemo", "content_hash": "0", "vocab_size": 100}
    del config[key]
    (tmp_path / "model_config.yaml").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"its configuration has no {key}; "):
        read_adapter_config(tmp_path)
