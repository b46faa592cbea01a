# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The exported folder with exits and their code, in transformers: against what the model says itself in NeMo."""

import ast
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_ee.config import parse_early_exit
from nemo_ee.export.card import written
from nemo_ee.export.remote import described
from nemo_ee.export.remote_card import RULES, remote_card
from nemo_ee.export.settings import ExportConfig
from tests.support.remote_folder import (
    DEPTH,
    EXITS,
    HEADS,
    PROMPT,
    STEPS,
    confidences,
    refused,
    rounds,
    write_all,
)
from tests.support.script import run_script

CODE = Path(__file__).parents[2] / "nemo_ee" / "export" / "remote_code"
DRAFTS, DRAFTED = 4, 20
IDS = torch.tensor([PROMPT])
GREEDY = dict(attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=STEPS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module")
def said(workers, folder):
    (result,) = workers(1).run(write_all, str(folder))
    return result


@pytest.fixture(scope="module")
def load(said, folder):
    """Loads an exported folder; the copies that transformers makes of its code stay with the test."""
    from transformers import AutoModelForCausalLM, dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
        patch.setattr(sys, "path", [*sys.path])
        yield lambda name, **options: AutoModelForCausalLM.from_pretrained(folder / name, **options).eval()


@pytest.fixture(scope="module")
def model(load):
    model = load("llama_remote", trust_remote_code=True)
    model.generation_config.num_assistant_tokens = DRAFTS
    return model


def new_tokens(out):
    return out[0, len(PROMPT) :].tolist()


def at_layer(model, n, ids):
    """Logits [S, V] as while transformers drafts at layer n."""
    model.config.num_hidden_layers = n
    try:
        with torch.no_grad():
            return model(ids[None]).logits[0]
    finally:
        model.config.num_hidden_layers = DEPTH


@pytest.mark.parametrize("n", EXITS)
def test_a_head_of_every_kind_says_what_its_exit_says(model, said, n):
    assert len({tuple(sorted(head.items())) for head in HEADS}) == len(EXITS)
    check_logits(model, said["llama"], n)


def check_logits(model, said, n):
    wanted, tokens = said.logits[n]
    known = tokens >= 0
    logits = at_layer(model, n, said.ids)
    torch.testing.assert_close(logits[:, tokens[known]], wanted[:, known], rtol=0, atol=1e-5)
    assert torch.equal(logits.argmax(-1), tokens[known][wanted[:, known].argmax(-1)])
    others = torch.ones(logits.shape[-1], dtype=bool).index_fill(0, tokens[known], False)
    if (
        others.any()
    ):  # a bucket's probability is theirs in equal parts, unless that were above the best token's
        shares, bucket = logits.softmax(-1), wanted.softmax(-1)[:, ~known]
        fits = bucket[:, 0] / others.sum() < 0.3 * confidences(wanted, tokens)
        torch.testing.assert_close(
            shares[fits][:, others],
            (bucket / others.sum())[fits].expand(-1, others.sum()),
            rtol=1e-4,
            atol=1e-7,
        )
        assert fits.any()


def test_without_exits_it_is_the_base(model, load, said):
    base = load("llama_base")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, base(IDS).logits)
    text = new_tokens(model.generate(IDS, **GREEDY))
    assert text == new_tokens(base.generate(IDS, **GREEDY)) == said["llama"].texts["full"][0]


def test_without_trust_it_does_not_load_and_other_models_are_their_own(load, model):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load("llama_remote", trust_remote_code=False)
    assert type(load("llama_base", trust_remote_code=True)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("n", EXITS)
def test_drafts_of_an_exit_leave_the_greedy_text_and_are_accepted_as_ours_would_be(model, said, n):
    text, passes = said["llama"].texts["full"][0][:DRAFTED], []
    hook = model.model.layers[-1].register_forward_hook(lambda *_: passes.append(1))
    out = model.generate(IDS, assistant_early_exit=n, **{**GREEDY, "max_new_tokens": DRAFTED})
    hook.remove()
    assert new_tokens(out) == text and model.config.num_hidden_layers == DEPTH
    logits, tokens = said["llama"].logits[n]
    said_by_exit = tokens[logits[:, tokens >= 0].argmax(-1)].tolist(), confidences(logits, tokens).tolist()
    pairs = [*zip(*said_by_exit, strict=True)][len(PROMPT) - 1 :]
    assert len(passes) == rounds(text, pairs, DRAFTS)


@pytest.mark.parametrize(
    "name", ["each", "one", "always the second", "some", "entropy", "margin"], ids=lambda name: name
)
def test_tokens_leave_where_ours_leave(model, said, name):
    options = said["llama"].thresholds[name]
    out = model.generate(IDS, early_exit=options, return_dict_in_generate=True, **GREEDY)
    tokens, layers = said["llama"].texts[name]
    assert new_tokens(out.sequences) == tokens and out.exit_layers == layers
    assert set(layers) >= {"each": {*EXITS, DEPTH}, "always the second": {EXITS[1]}}.get(
        name, {DEPTH, EXITS[0]}
    )


def test_the_folders_own_thresholds(model, said):
    options = said["llama"].thresholds["each"]
    model.config.early_exit["inference"]["threshold"] = options["threshold"]
    assert new_tokens(model.generate(IDS, early_exit=True, **GREEDY)) == said["llama"].texts["each"][0]
    model.config.early_exit["inference"]["threshold"] = None
    with pytest.raises(ValueError, match="the folder has none .*; give e.g. 0.9"):
        model.generate(IDS, early_exit=True, **GREEDY)


def test_other_architectures(load, said):
    mistral, qwen2 = (load(f"{name}_remote", trust_remote_code=True) for name in ("mistral", "qwen2"))
    assert isinstance(mistral.model, sys.modules["transformers"].MistralModel)
    check_logits(mistral, said["llama"], 5)
    assert isinstance(qwen2.model, sys.modules["transformers"].Qwen2Model)
    check_logits(qwen2, said["qwen2"], 3)
    for model, own in ((mistral, said["llama"]), (qwen2, said["qwen2"])):
        model.generation_config.num_assistant_tokens = DRAFTS
        text = model.generate(IDS, assistant_early_exit=3, **{**GREEDY, "max_new_tokens": DRAFTED})
        assert new_tokens(text) == own.texts["full"][0][:DRAFTED]
        out = model.generate(IDS, early_exit=own.thresholds["each"], return_dict_in_generate=True, **GREEDY)
        assert (new_tokens(out.sequences), out.exit_layers) == own.texts["each"]
    assert set(said["qwen2"].texts["each"][1]) == {3, 8}
    with pytest.raises(ValueError, match="assistant_early_exit=8: is the whole depth.*use one of"):
        qwen2.generate(IDS, assistant_early_exit=8, **GREEDY)


def test_custom_generate_is_the_models_own(model, load, said):
    spec = importlib.util.spec_from_file_location("custom_generate", CODE / "custom_generate" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = said["llama"].thresholds["each"]
    out = module.generate(
        IDS, model=model, early_exit=options, **GREEDY
    )  # as transformers from 4.52 on calls it
    assert new_tokens(out) == said["llama"].texts["each"][0]
    with pytest.raises(
        ValueError, match="LlamaForCausalLM has no exits; load the folder with trust_remote_code=True"
    ):
        module.generate(IDS, model=load("llama_base"), early_exit=options, **GREEDY)


TWICE = dict(input_ids=IDS.expand(2, -1), attention_mask=torch.ones(2, len(PROMPT)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(assistant_early_exit=9),
            r"assistant_early_exit=9: there is no exit .*; use one of \[1, 2, 3, 4, 5, 6, 7\]",
        ),
        (dict(assistant_early_exit=DEPTH), "assistant_early_exit=8: is the whole depth"),
        (
            dict(early_exit=dict(threshold=[0.5, 0.5])),
            r"threshold=\[0.5, 0.5\]: 2 thresholds for 7 exits .*give one per",
        ),
        (
            dict(early_exit=dict(threshold=0.5, exits=[1, 9])),
            r"exits=\[1, 9\]: not some of the exits \[1, 2, 3, 4",
        ),
        (dict(early_exit=dict(threshold=0.5, exits=[2, 1])), "ascending; name such"),
        (dict(early_exit=dict(threshold=0.5, exits=[])), r"exits=\[\]: not some of the exits"),
        (dict(early_exit=dict(threshold=0.5, exits=2)), "exits=2: not some of the exits"),
        (dict(early_exit=dict(threshold=1.5)), "threshold=1.5: must lie within"),
        (dict(early_exit=dict(threshold="0.5")), "threshold=0.5: must lie within"),
        (
            dict(early_exit=dict(treshold=0.5)),
            "early_exit.treshold=0.5: no such option; did you mean threshold",
        ),
        (
            dict(early_exit=dict(lossless=True)),
            "early_exit.lossless=True: .*; use threshold, exits, confidence",
        ),
        (
            dict(early_exit=dict(threshold=0.5, confidence="patience")),
            "confidence=patience: must be one of max_prob",
        ),
        (dict(early_exit=0.5), "early_exit=0.5: must be a dict or True; give e.g."),
        (
            dict(early_exit=dict(threshold=0.5), assistant_early_exit=2),
            "assistant_early_exit has all tokens verified",
        ),
        (
            dict(early_exit=dict(threshold=0.5), prompt_lookup_num_tokens=2),
            "prompt_lookup_num_tokens .*; leave out one",
        ),
        (
            dict(early_exit=dict(threshold=0.5), **TWICE),
            "one text of token ids at a time; call generate for each",
        ),
        (dict(early_exit=dict(threshold=0.5), num_beams=2), "without beams"),
        (
            dict(early_exit=dict(threshold=0.5), output_hidden_states=True),
            "output_hidden_states=True: .*leave it out",
        ),
        (dict(early_exit=dict(threshold=0.5), use_cache=False), "leave out use_cache"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_the_model_as_it_was(model, said, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": IDS, **GREEDY, **options})
    assert model.config.num_hidden_layers == DEPTH
    assert new_tokens(model.generate(IDS, **GREEDY)) == said["llama"].texts["full"][0]


def test_several_tokens_at_once_behind_the_prompt_are_refused(model):
    """As transformers feeds them where a prompt comes in chunks."""
    walk = sys.modules[type(model).__module__].Walk(model, {1: 0.5}, "max_probability")
    cache = sys.modules["transformers"].DynamicCache()
    with torch.no_grad():
        walk(IDS, past_key_values=cache)
        with pytest.raises(ValueError, match="token by token; leave out prefill_chunk_size"):
            walk(IDS, past_key_values=cache)


def test_a_cache_of_the_callers_is_refused(model):
    cache = model(IDS, use_cache=True).past_key_values
    longer = torch.tensor([[*PROMPT, 5]])
    with pytest.raises(ValueError, match="give the whole text, and no cache"):
        model.generate(longer, past_key_values=cache, early_exit=dict(threshold=0.5), max_new_tokens=2)


def test_padding_before_a_text_changes_nothing(model, said):
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], dim=1)
    mask = (torch.arange(ids.shape[1]) >= 3).long()[None]
    out = model.generate(
        ids, early_exit=said["llama"].thresholds["each"], **{**GREEDY, "attention_mask": mask}
    )
    assert out[0, ids.shape[1] :].tolist() == said["llama"].texts["each"][0]


def test_a_base_and_exits_alone_make_the_same_folder(folder, said):
    files = [
        "gpt_model_file=llama.nemo",
        "adapter_file=exits.nemo",
        "output_path=both",
        "max_shard_size=200KB",
    ]
    done = run_script(folder, "export_hf.py", "kind=remote", *files)
    assert done.returncode == 0 and "wrote both" in done.stdout, done.stderr
    first, second = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (folder / "llama_remote", folder / "both")
    )
    assert first.keys() == second.keys()
    assert [str(name) for name in first if first[name] != second[name]] == ["README.md"]
    card = second[Path("README.md")].decode()
    assert (
        "behind the layers 1, 2, 3, 4, 5, 6, 7, of `exits.nemo`" in card and "assistant_early_exit=7" in card
    )


@pytest.mark.parametrize(
    ("threshold", "confidence", "options"),
    [
        (None, "max_probability", '{"threshold": 0.9}'),
        ([0.5], "entropy", "True"),
        ([0.5], "patience", '{"threshold": 0.9, "confidence": "max_probability"}'),
    ],
)
def test_the_cards_example_is_one_that_the_folder_takes(model, threshold, confidence, options):
    inference = {"confidence": confidence} | ({} if threshold is None else {"threshold": threshold})
    early_exit = parse_early_exit({"layers": [2], "inference": inference}, DEPTH)
    source = SimpleNamespace(name="x.nemo", exits_name="x.nemo", early_exit=early_exit)
    settings = SimpleNamespace(num_hidden_layers=DEPTH, vocab_size=9, torch_dtype=torch.float32)
    card = remote_card(ExportConfig("remote", "x.nemo", "x"), source, settings, "modeling_early_exit", None)
    assert f"early_exit={options}, max_new_tokens" in card
    code = sys.modules[type(model).__module__.replace("modeling_early_exit", "leaving_early")]
    code.thresholds_of(ast.literal_eval(options), [2], described(early_exit)["inference"])
    assert RULES == tuple(code.CONFIDENCE_RULES)


def test_a_folders_name_stays_one_word_in_its_cards():
    names = written(ExportConfig("draft", "x.nemo", 'some/it\'s "here"'))
    assert ast.literal_eval(names["quoted"]) == 'it\'s "here"'
    assert shlex.split(f"vllm serve {names['word']}") == ["vllm", "serve", 'it\'s "here"']
    (option,) = shlex.split(names["vllm"])
    assert json.loads(option)["model"] == 'it\'s "here"'


def test_exits_that_cannot_be_are_refused(workers, folder, said):
    (messages,) = workers(1).run(refused, str(folder))
    for name, message in {
        "none": "adapter_file=null: kind=remote runs exits, and llama.nemo has none; set kind=base, or set "
        "adapter_file to exits tuned on this base; to tune some: .* model.restore_from_path=.*llama.nemo",
        "surplus": "exits.3.other.weight: 1 tensors belong to no exit",
        "shape": r"exits.3.norm.weight has the shape \[7\], and its configuration asks for \[64\]",
        "shortlist": "exits.3.projection.token_ids must name distinct tokens of 201, ascending",
    }.items():
        assert re.search(message, messages[name]), messages[name]
    assert not (folder / "none").exists()


def test_weights_are_sharded_with_an_index(folder, said):
    index = json.loads((folder / "llama_remote" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1 and "exits.6.projection.token_ids" in index
    config = json.loads((folder / "llama_remote" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling_early_exit.LlamaEarlyExitConfig",
        "AutoModelForCausalLM": "modeling_early_exit.LlamaEarlyExitForCausalLM",
    }
    assert config["early_exit"]["layers"] == EXITS


def test_shipped_code_imports_torch_and_transformers_alone(folder, said):
    shipped = [*(folder / "llama_remote").rglob("*.py")]
    assert {path.name for path in shipped} == {path.name for path in CODE.rglob("*.py")} | {"leaving.py"}
    for path in shipped:
        nodes = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        own = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level}
        assert all((path.parent / f"{name}.py").exists() for name in own), path
        packages = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
        assert packages <= {"torch", "transformers"}, path
