# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A base that came from Hugging Face goes back to it bit for bit; what no plain model computes is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file

from nemo_ee.checkpoint import archive
from nemo_ee.checkpoint.stored_tensors import StoredTensor
from nemo_ee.errors import CheckpointError, ConfigError, OutputError
from nemo_ee.export.export import export
from nemo_ee.export.folder import dtype_of
from nemo_ee.export.settings import ExportConfig
from tests.support import tiny_llama
from tests.support.exported_exits import write_sharded
from tests.support.script import run_script

LLAMA3 = tiny_llama.LLAMA3_SCALING
VARIANTS = {
    "tied": ("LlamaConfig", "32", {}),
    "untied-llama3-rope": ("LlamaConfig", "bf16", {"tie_word_embeddings": False, "rope_scaling": LLAMA3}),
    "one-wide-group-linear-rope": (
        "LlamaConfig",
        "32",
        {"num_key_value_heads": 1, "head_dim": 16, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "no-groups-rows-to-spare": (
        "LlamaConfig",
        "bf16",
        {"num_key_value_heads": 4, "vocab_size": 300, "rope_theta": 5e5},
    ),
    "mistral": ("MistralConfig", "32", {"sliding_window": None, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", "bf16", {"use_sliding_window": False}),
}
"""Name -> kind of model, precision of the checkpoint, changes to the tiny Llama."""
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}


def write_source(folder: Path, kind: str, changes: dict) -> None:
    """A Hugging Face folder of a tiny random model."""
    import transformers

    settings = tiny_llama.config(**changes).to_dict()
    for key in ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp"):  # Llama's own
        settings.pop(key, None)
    tiny_llama.model(getattr(transformers, kind)(**settings)).save_pretrained(folder)
    tiny_llama.tokenizer().save_pretrained(folder)


def convert_all(folder: str) -> None:
    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

    for name, (_, precision, _) in VARIANTS.items():
        convert_to_nemo(f"{folder}/{name}", f"{folder}/{name}.nemo", precision=precision)


@pytest.fixture(scope="module")
def converted(workers, tmp_path_factory):
    """A folder with each variant's Hugging Face folder and its `.nemo`."""
    folder = tmp_path_factory.mktemp("bases")
    for name, (kind, _, changes) in VARIANTS.items():
        write_source(folder / name, kind, changes)
    workers(1).run(convert_all, str(folder))
    return folder


def exported(source: Path, output: Path, **settings) -> Path:
    values = dict(kind="base", gpt_model_file=str(source), output_path=str(output), **settings)
    return export(ExportConfig.from_dict(values))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def settings_of(folder: Path, *without: str) -> dict:
    settings = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in settings.items() if key not in ("torch_dtype", *without)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_goes_back_bit_for_bit(converted, tmp_path, variant):
    kind, precision, _ = VARIANTS[variant]
    architecture = "mistral" if kind == "MistralConfig" else None
    output = exported(converted / f"{variant}.nemo", tmp_path / "out", architecture=architecture)
    before, after = weights_of(converted / variant), weights_of(output)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value.to(DTYPES[precision]), after[name]), name
        assert after[name].dtype == DTYPES[precision]
    assert settings_of(output) == settings_of(converted / variant)
    generation = json.loads((output / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)


def test_transformers_computes_the_same(converted, tmp_path):
    """Of all files of a folder, sharded ones too, nothing is missing or left over."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = tiny_llama.prompts()
    for variant in ("untied-llama3-rope", "qwen2"):
        output = exported(
            converted / f"{variant}.nemo", tmp_path / variant, precision=32, max_shard_size="20KB"
        )
        index = json.loads((output / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {file.name for file in output.glob("*.safetensors")}
        assert len(list(output.glob("*.safetensors"))) > 2
        theirs, report = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
        assert not any(report.values()), report
        assert theirs.dtype == torch.float32 and theirs.config.torch_dtype == torch.float32
        ours = AutoModelForCausalLM.from_pretrained(converted / variant, torch_dtype=torch.bfloat16).float()
        with torch.no_grad():
            assert torch.equal(theirs(ids).logits, ours(ids).logits)
        own, old = AutoTokenizer.from_pretrained(output), AutoTokenizer.from_pretrained(converted / variant)
        turns = [{"role": "user", "content": "the cat"}]
        assert theirs.generate(**own("the cat", return_tensors="pt"), max_new_tokens=2).shape == (1, 4)
        assert own("the cat sat").input_ids == old("the cat sat").input_ids == [3, 19, 21]
        assert own.apply_chat_template(turns) == old.apply_chat_template(turns)


def test_without_biases_mistral_is_a_llama(converted, tmp_path):
    output = exported(converted / "mistral.nemo", tmp_path / "out")
    theirs, own = settings_of(converted / "mistral"), settings_of(output)
    assert own["architectures"] == ["LlamaForCausalLM"]
    shared = theirs.keys() & own.keys() - {"architectures", "model_type"}
    assert {key: theirs[key] for key in shared} == {key: own[key] for key in shared}


def unpacked(source: Path, folder: Path, **changes) -> Path:
    """A checkpoint as a folder without weights, whose configuration is changed."""
    archive.extract(source, folder)
    document = OmegaConf.load(folder / "model_config.yaml")
    model = document.get("model", document)
    for key, value in changes.items():
        OmegaConf.update(model, key.replace("__", "."), value, force_add=True)
    OmegaConf.save(document, folder / "model_config.yaml")
    return folder


@pytest.mark.parametrize(("add_bos", "ids"), [(True, [1, 3, 19]), (False, [3, 19])])
def test_texts_begin_as_the_checkpoint_says(converted, tmp_path, add_bos, ids):
    from transformers import AutoTokenizer

    source = unpacked(converted / "tied.nemo", tmp_path / "source", tokenizer__add_bos=add_bos)
    tokenizer = AutoTokenizer.from_pretrained(exported(source, tmp_path / "out"))
    assert tokenizer("the cat").input_ids == ids
    assert tokenizer("the cat", add_special_tokens=False).input_ids == [3, 19]


@pytest.mark.parametrize("form", ["text", "named", "roles"])
def test_the_configurations_chat_template_goes_along(converted, tmp_path, form):
    from transformers import AutoTokenizer

    template = "{% for m in messages %}sat {{ m['content'] }} {% endfor %}"
    forms = {
        "text": template,
        "named": [{"name": "default", "template": template}],
        "roles": {"prefix": "", "roles": {"User": "{_content_}"}},
    }
    source = unpacked(converted / "tied.nemo", tmp_path / "source", tokenizer__chat_template=forms[form])
    tokenizer = AutoTokenizer.from_pretrained(exported(source, tmp_path / "out"))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}])
    assert ids == ([3, 19, 2] if form == "roles" else [21, 3, 19]), "the tokenizer's own, or this one"


def test_all_ends_of_texts_go_along(converted, tmp_path):
    source = unpacked(converted / "tied.nemo", tmp_path / "source", tokenizer__eos_token_ids=[2, 50])
    output = exported(source, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((output / name).read_text())["eos_token_id"] == [2, 50]


REFUSED = {
    "LayerNorm": (dict(normalization="layernorm1p"), "model.normalization=layernorm1p: Llama's norms"),
    "GELU": (dict(activation="gelu"), "model.activation=gelu: Llama's MLPs have SwiGLU"),
    "biases": (dict(bias=True), "model.bias=true: .*qkv_bias"),
    "learned positions": (dict(position_embedding_type="learned_absolute"), "are rotary"),
    "half of a head": (dict(rotary_percentage=0.5), "model.rotary_percentage=0.5"),
    "norms of queries": (dict(qk_layernorm=True), "model.qk_layernorm=true"),
    "a window": (dict(window_size=[16, 0]), r"model.window_size=\[16, 0\]"),
    "softcapping": (
        dict(mcore_customization_config={"final_logit_softcapping": 30.0}),
        "model.mcore_customization_config.final_logit_softcapping=30.0",
    ),
    "something new": (
        dict(mcore_customization_config={"attention_sinks": 4}),
        "model.mcore_customization_config.attention_sinks=4",
    ),
    "two scalings": (
        dict(seq_len_interpolation_factor=2.0, scale_positional_embedding=True),
        "not by both",
    ),
    "experts": (dict(num_moe_experts=4), "model.num_moe_experts=4"),
    "before megatron-core": (dict(mcore_gpt=False), "model.mcore_gpt=false"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_plain_model_computes_is_refused_before_weights_are_read(converted, tmp_path, case):
    changes, words = REFUSED[case]
    source = unpacked(converted / "tied.nemo", tmp_path / "source", **changes)
    shutil.rmtree(source / "model_weights")
    with pytest.raises(ConfigError, match=words) as error:
        exported(source, tmp_path / "out")
    assert "export another checkpoint" in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("variant", "architecture", "words"),
    [
        (
            "qwen2",
            "llama",
            "its Q, K and V have no biases, and the checkpoint's have some; set architecture=qwen2",
        ),
        (
            "tied",
            "qwen2",
            "its Q, K and V have biases, and the checkpoint's have none; set architecture=llama",
        ),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused(converted, tmp_path, variant, architecture, words):
    with pytest.raises(ConfigError, match=words):
        exported(converted / f"{variant}.nemo", tmp_path / "out", architecture=architecture)
    assert not list(tmp_path.iterdir())


def test_weights_of_several_dtypes_are_held_by_one():
    """float16 has not bfloat16's range, and bfloat16 not float16's digits."""
    kinds = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}
    stored = {name: StoredTensor((1,), dtype, lambda: torch.zeros(1)) for name, dtype in kinds.items()}
    some = lambda *names: {name: stored[name] for name in names}  # noqa: E731
    assert dtype_of(some("16"), None) is torch.float16 and dtype_of(some("bf16"), None) is torch.bfloat16
    assert dtype_of(some("16", "bf16"), None) is dtype_of(some("bf16", "32"), None) is torch.float32
    assert dtype_of(stored, "bf16") is torch.bfloat16
    with pytest.raises(ConfigError, match="precision=null: .*has weights in float64; set precision=32"):
        dtype_of(stored, None)


def test_tensors_without_a_place_are_refused(converted, tmp_path):
    """The configuration says nothing of biases, but they are there."""
    source = unpacked(converted / "qwen2.nemo", tmp_path / "source", qkv_bias=False)
    with pytest.raises(CheckpointError, match="linear_qkv.bias.*4 tensors have no place"):
        exported(source, tmp_path / "out")


def test_a_tokenizer_of_another_library_needs_one_for_transformers(converted, tmp_path):
    source = unpacked(converted / "tied.nemo", tmp_path / "source", tokenizer__library="byte-level")
    with pytest.raises(ConfigError, match="tokenizer=null: .*library byte-level.*set tokenizer=FOLDER"):
        exported(source, tmp_path / "out")
    with pytest.raises(
        ConfigError, match="tokenizer=nowhere: is no folder; name one that holds tokenizer.json"
    ):
        exported(source, tmp_path / "out", tokenizer="nowhere")
    larger = tiny_llama.tokenizer()
    larger.add_tokens([f"new{n}" for n in range(400)])
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(ConfigError, match="tokenizer=.*larger: has token ids up to .*the model's own ids"):
        exported(source, tmp_path / "out", tokenizer=str(tmp_path / "larger"))
    others = dict(embedding_rows=None, make_vocab_size_divisible_by=128, tokenizer__library="byte-level")
    wide = unpacked(converted / "no-groups-rows-to-spare.nemo", tmp_path / "wide", **others)
    with pytest.raises(
        ConfigError, match="ids up to 99, and the model has 512 rows .* at most 127 are padding"
    ):
        exported(wide, tmp_path / "out", tokenizer=str(converted / "tied"))
    output = exported(source, tmp_path / "out", tokenizer=str(converted / "tied"))
    assert (output / "tokenizer.json").read_bytes() == (converted / "tied" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("add_bos", [None, True], ids=["copied", "written anew"])
def test_a_tokenizer_names_no_code_and_no_other_model(converted, tmp_path, add_bos):
    source = unpacked(converted / "tied.nemo", tmp_path / "source", **{"tokenizer__add_bos": add_bos})
    file = source / "tokenizer" / "tokenizer_config.json"
    settings = {
        **json.loads(file.read_text()),
        "auto_map": {"AutoTokenizer": [None, "some/where--code.Class"]},
    }
    file.write_text(json.dumps(settings))
    (source / "tokenizer" / "adapter_config.json").write_text('{"base_model_name_or_path": "some/where"}')
    output = exported(source, tmp_path / "out")
    assert not (output / "adapter_config.json").exists()
    written = json.loads((output / "tokenizer_config.json").read_text())
    assert "auto_map" not in written and written["tokenizer_class"] == settings["tokenizer_class"]


def test_script_exports_and_then_refuses_to_overwrite(converted, tmp_path):
    arguments = ("kind=base", f"gpt_model_file={converted / 'tied.nemo'}", f"output_path={tmp_path / 'out'}")
    first = run_script(tmp_path, "export_hf.py", *arguments)
    assert first.returncode == 0 and "wrote" in first.stdout, first.stderr
    names = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "README.md",
        "tokenizer.json",
    } <= names
    with pytest.raises(ConfigError, match="exists; choose another or set overwrite=true"):
        exported(converted / "tied.nemo", tmp_path / "out")
    with pytest.raises(ConfigError, match="gpt_model_file=.*lies in it, and would be removed"):
        exported(converted / "tied.nemo", converted, overwrite=True)
    (tmp_path / "out" / "model.safetensors").chmod(0)
    exported(converted / "tied.nemo", tmp_path / "out", overwrite=True, precision="bf16")
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1, "readable by the same"
    assert weights_of(tmp_path / "out")["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_folder_but_an_earlier_models_is_replaced(converted, tmp_path, monkeypatch, overwrite):
    precious = tmp_path / "home" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    monkeypatch.chdir(precious.parent)
    for output, rule in (
        ("", "output_path=: is empty; set output_path=exported"),
        (" ", "is empty"),
        (".", "is the folder that this runs in, or holds it; set output_path=exported"),
        ("..", "is the folder that this runs in, or holds it"),
        ("precious.txt", "is a file; name a folder that does not exist"),
    ):
        with pytest.raises(ConfigError, match=rule):
            exported(converted / "tied.nemo", output, overwrite=overwrite)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="home: holds precious.txt, which is not of an export"):
        exported(converted / "tied.nemo", "home", overwrite=overwrite)
    (precious.parent / "config.json").touch()
    with pytest.raises(ConfigError, match="home: holds config.json, which is not of an export"):
        exported(converted / "tied.nemo", "home", overwrite=overwrite)
    (precious.parent / "config.json").unlink()
    (precious.parent / "README.md").write_text("Drafts are written by nemo_ee.")
    with pytest.raises(ConfigError, match="home: holds README.md, which is not of an export"):
        exported(converted / "tied.nemo", "home", overwrite=overwrite)
    (precious.parent / "README.md").unlink()
    assert precious.read_text() == "mine" and [*tmp_path.iterdir()] == [precious.parent]


@pytest.mark.parametrize(
    "other",
    [
        "base.gguf",
        "pytorch_model.bin",
        "model.py",
        ".env.json",
        "corpus.txt/part.bin",
        "images/a.json",
        "custom_generate/mine.py",
        "link",
        "notes.txt",
        "eval_results.json",
        "__pycache__/thesis.docx",
    ],
)
def test_what_lies_in_an_export_and_is_not_of_it_is_not_lost(converted, tmp_path, other):
    output = exported(converted / "tied.nemo", tmp_path / "out")
    (output / "__pycache__").mkdir()
    (output / "__pycache__" / "leaving.cpython-311.pyc").touch()
    exported(converted / "tied.nemo", output, overwrite=True)
    (output / other).parent.mkdir(exist_ok=True)
    if other == "link":
        (output / other).symlink_to(tmp_path)
    else:
        (output / other).touch()
    with pytest.raises(ConfigError, match=f"out: holds {other}, which is not of an export"):
        exported(converted / "tied.nemo", output, overwrite=True)
    assert (output / other).exists() and (output / "model.safetensors").exists()


def test_a_full_disk_is_the_outputs(converted, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("nemo_ee.export.folder.save_file", full)
    with pytest.raises(OutputError, match=f"{tmp_path / 'out'}: cannot be written: the disk is full"):
        exported(converted / "tied.nemo", tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_exits_are_no_base(converted, tmp_path):
    exits = unpacked(
        converted / "tied.nemo",
        tmp_path / "exits",
        base={"name": "tied", "content_hash": "0", "vocab_size": 9},
    )
    with pytest.raises(CheckpointError, match="holds exits only; restore its base tied and load these"):
        exported(exits, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [dict(tp=2), dict(pp=2)], ids=str)
def test_the_layout_of_a_checkpoint_does_not_count(workers, tmp_path, layout):
    folders = []
    for name, parallel in (("one", {}), ("two", layout)):
        workers(2 if parallel else 1).run(write_sharded, str(tmp_path / f"{name}.nemo"), parallel)
        folders.append(exported(tmp_path / f"{name}.nemo", tmp_path / name))
        for layer in (2, 5):
            values = dict(kind="draft", gpt_model_file=str(tmp_path / f"{name}.nemo"), layer=layer)
            export(ExportConfig.from_dict({**values, "output_path": str(tmp_path / f"{name}_{layer}")}))
            folders.append(tmp_path / f"{name}_{layer}")
    for one, two in zip(folders[:3], folders[3:], strict=True):
        before, after = weights_of(one), weights_of(two)
        assert before.keys() == after.keys() and all(
            torch.equal(before[name], after[name]) for name in before
        )
