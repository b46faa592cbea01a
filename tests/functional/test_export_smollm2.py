# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""SmolLM2-135M out to Hugging Face: the base's texts, what drafts say, the base with drafts; in llama.cpp, too.

Two programs sum in other orders. A difference is excused only where the reference's two best logits are nearer than
`EPSILON`.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from nemo_ee.export.export import export
from nemo_ee.export.settings import ExportConfig
from tests.functional.test_convert_llama import SMOLLM2_PROMPTS, fetch_smollm2
from tests.support import tiny_gguf
from tests.support.exported_exits import best_two
from tests.support.script import ROOT

EPSILON = 1e-3
STEPS = 24
HEADS = {
    "residual": dict(mlp="residual", linear=False, projection="tied"),
    "block": dict(block=True, mlp="none", linear=False, projection="tied"),
    "fold": dict(mlp="beside", linear=True, projection="tied"),
}
NODE = ["node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1"]
"""llama.cpp, built for Linux on x86-64, in packages of npm."""

pytestmark = pytest.mark.slow


def sample(tokenizer) -> torch.Tensor:
    """2,000 tokens [8, 250] of English text."""
    ids = tokenizer((ROOT / "docs" / "calibration.md").read_text(), add_special_tokens=False).input_ids
    return torch.tensor(ids[:2000]).reshape(8, 250)


@torch.no_grad()
def write_checkpoints(folder: str) -> dict:
    """Converts, adds exits at layers 10 and 20 that are no copies, and saves them.

    Returns:
        `texts`: full depth's tokens behind each prompt; and kind of head -> layer -> `best_two` on the sample.
    """
    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model
    from tests.support.tiny_gpt import tiny_trainer

    base = f"{folder}/smollm2.nemo"
    convert_to_nemo(f"{folder}/smollm2.gguf", base)
    plain = Model.restore_from(base, return_config=True, trainer=tiny_trainer())
    found = {}
    for kind, head in HEADS.items():
        config = Model.add_exits(plain, dict(layers=[10, 20], init="copy", head=head))
        model = Model.restore_from(base, override_config_path=config, trainer=tiny_trainer()).eval()
        generator = torch.Generator().manual_seed(7)
        for parameter in model.gpt.exits.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.1 * parameter.std().item() + 1e-3)
        model.save_adapters(f"{folder}/{kind}.nemo")
        found[kind] = best_two(model.gpt, sample(model.tokenizer.tokenizer))
        if kind == "fold":
            lengths, sampling = dict(max_length=STEPS, min_length=STEPS), dict(add_BOS=False)
            output = model.generate(SMOLLM2_PROMPTS, lengths, sampling, early_exit=False)
            found["texts"] = [ids[-STEPS:] for ids in output["token_ids"]]  # none may end before
    return found


@pytest.fixture(scope="module")
def made(workers, tmp_path_factory):
    """A folder with the checkpoints, and `write_checkpoints`' findings."""
    folder = tmp_path_factory.mktemp("smollm2")
    shutil.move(fetch_smollm2(folder), folder / "smollm2.gguf")
    return folder, workers(1).run(write_checkpoints, str(folder), timeout=900)[0]


def exported(folder: Path, **settings) -> Path:
    values = dict(gpt_model_file=str(folder / "smollm2.nemo"), overwrite=True, **settings)
    return export(ExportConfig.from_dict(values))


@pytest.fixture(scope="module")
def base(made):
    """The exported base's folder."""
    return exported(made[0], kind="base", output_path=str(made[0] / "base"))


def draft(folder: Path, kind: str, layer: int) -> Path:
    return exported(
        folder,
        kind="draft",
        adapter_file=str(folder / f"{kind}.nemo"),
        layer=layer,
        output_path=str(folder / f"{kind}_{layer}"),
    )


def loaded(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()


def greedy(model, ids: list[int], **settings) -> list[int]:
    given = torch.tensor([ids])
    options = dict(do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS, pad_token_id=0)
    output = model.generate(given, attention_mask=torch.ones_like(given), **options, **settings)
    return output[0, len(ids) :].tolist()


def test_the_base_writes_the_checkpoints_texts(made, base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, found = made
    theirs, tokenizer = loaded(base), AutoTokenizer.from_pretrained(base)
    original = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="smollm2.gguf", torch_dtype=torch.float32
    )
    before, after = original.state_dict(), theirs.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for prompt, text in zip(SMOLLM2_PROMPTS, found["texts"], strict=True):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        own = greedy(theirs, ids)
        place = next((i for i, (a, b) in enumerate(zip(own, text, strict=True)) if a != b), None)
        if place is not None:
            with torch.no_grad():
                best = theirs(torch.tensor([ids + own[:place]])).logits[0, -1].topk(2).values
            assert best[0] - best[1] < EPSILON, (prompt, place)


@pytest.mark.parametrize("layer", [10, 20])
@pytest.mark.parametrize("kind", HEADS)
def test_a_draft_says_what_its_exit_says_and_the_base_keeps_its_text(made, base, kind, layer):
    from transformers import AutoTokenizer

    folder, found = made
    output = draft(folder, kind, layer)
    model, target, tokenizer = loaded(output), loaded(base), AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        own = torch.cat([model(row[None]).logits.argmax(-1) for row in sample(tokenizer)])
    tokens, gaps = found[kind][layer]
    different = own != tokens
    print(f"{kind} at layer {layer}: {int(different.sum())} of {own.numel()} tokens differ, by near ties")
    assert bool((gaps[different] < EPSILON).all())
    for prompt in SMOLLM2_PROMPTS[:4]:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        assert greedy(target, ids, assistant_model=model) == greedy(target, ids), prompt


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """A folder in which node finds llama.cpp; without npm or a network the test is skipped."""
    folder = tmp_path_factory.mktemp("node")
    command = ["npm", "install", "--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund", *NODE]
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    (folder / "package.json").write_text("{}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm cannot install {NODE[0]}: {done.stderr.strip()[-300:]}")
    shutil.copy(ROOT / "tests" / "support" / "llama_cpp.mjs", folder)
    return folder


@pytest.mark.parametrize("kind", ["residual", "fold"])
def test_in_llama_cpp_too(made, base, llama_cpp, kind):
    """Texts by llama.cpp: the base's with the draft are its own, and the draft's alone are transformers'."""
    from transformers import AutoTokenizer

    folder, _ = made
    output = draft(folder, kind, 10)
    vocabulary = tiny_gguf.vocabulary_in(folder / "smollm2.gguf")
    files = []
    for source in (base, output):
        files.append(llama_cpp / f"{source.name}.gguf")
        if not files[-1].exists():
            tiny_gguf.write(files[-1], loaded(source), vocabulary)
    tokenizer, model = AutoTokenizer.from_pretrained(base), loaded(output)
    prompts = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in SMOLLM2_PROMPTS[:4]]
    (llama_cpp / "request.json").write_text(json.dumps({"prompts": prompts, "tokens": STEPS}))
    done = subprocess.run(
        ["node", "llama_cpp.mjs", *map(str, files), "request.json"],
        cwd=llama_cpp,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == len(prompts) and sum(row["validated"] + row["refuted"] for row in rows) > 0
    for ids, row in zip(prompts, rows, strict=True):
        assert len(row["alone"]) == STEPS and row["drafted"] == row["alone"]
        own = greedy(model, ids)
        assert row["own"][: len(own)] == own[: len(row["own"])]
