# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Through lm-evaluation-harness, full depth is its own `hf` model on the same weights, example by example."""

from copy import deepcopy

import pytest
from datasets import Dataset
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from nemo_ee.errors import ConfigError, GenerationError
from nemo_ee.evaluation.harness.language_model import EarlyExitLM
from tests.support import tiny_chats
from tests.support.published import Published, client, convert, restored

CLOSE = 1e-4
"""Nats, of at most 130 tokens in fp32."""
LENGTH = 48
"""Positions in use, which some texts exceed."""
DOCS = [
    {"text": "the cat sat on the", "answers": [" mat", " dog and the cat", " moon."], "gold": 0},
    {"text": "what does an early exit do? ", "answers": ["it saves layers", "it talks", "x"], "gold": 1},
    {"text": "", "answers": ["the cat", "user and assistant", "dog"], "gold": 2},
    {"text": "the dog ran after the cat; " * 6, "answers": [" the", " cat", " sat"], "gold": 0},
    {"text": "ünïcode — 猫", "answers": [" 犬", " é", "\n"], "gold": 1},
]
TASKS = [
    {
        "task": "choose",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "num_fewshot": 0,
    },
    {
        "task": "continue",
        "output_type": "generate_until",
        "doc_to_text": "{{text}} the",
        "doc_to_target": "{{answers[0]}}",
        "generation_kwargs": {"until": ["at", "<|im_start|>", "\n"], "max_gen_toks": 20, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "fewshot_split": "test",
        "num_fewshot": 1,
    },
    {
        "task": "perplexity",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}the cat sat",
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
        ],
    },
]


def examples(**_):
    return {"test": Dataset.from_list(DOCS)}


def tasks():
    return [{**deepcopy(task), "test_split": "test", "custom_dataset": examples} for task in TASKS]


@pytest.fixture(scope="module", params=["qwen", "mistral"])
def both(request, tmp_path_factory):
    """Hugging Face's model without BOS and one with it, and ours."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from nemo_ee.models.generation_mixin import kept_microbatches

    folder = tmp_path_factory.mktemp(request.param)
    published = Published(getattr(tiny_chats, f"save_{request.param}")(folder / "hf"))
    with kept_microbatches():
        destroy_num_microbatches_calculator()
        yield published, restored(convert(folder / "hf", folder / "m.nemo"))


MANAGER = TaskManager(include_defaults=False)
"""Without the harness's own tasks, which are read for seconds."""


def samples(lm, which=slice(None), **options):
    how = {"task_manager": MANAGER, "bootstrap_iters": 0, **options}
    return simple_evaluate(model=lm, tasks=tasks()[which], **how)["samples"]


def hugging_face(published, **options):
    how = {"max_length": LENGTH, "device": "cpu", "batch_size": 1, **options}
    return HFLM(pretrained=published.network, tokenizer=published.tokenizer, **how)


@pytest.mark.parametrize(
    "how", [dict(early_exit=False), dict(early_exit={"lossless": True, "threshold": 0.0})]
)
def test_every_example_is_that_of_hf(both, how):
    published, model = both
    ours = samples(EarlyExitLM(model, batch_size=3, max_length=LENGTH, **how))
    theirs = samples(hugging_face(published))
    assert ours.keys() == theirs.keys() == {"choose", "continue", "perplexity"}
    for task, mine in ours.items():
        for one, other in zip(mine, theirs[task], strict=True):
            assert one["arguments"] == other["arguments"]
            for (found,), (wanted,) in zip(one["resps"], other["resps"], strict=True):
                if task == "continue":
                    assert found == wanted
                elif task == "perplexity":
                    assert found == pytest.approx(wanted, abs=CLOSE)
                else:
                    assert found[0] == pytest.approx(wanted[0], abs=CLOSE) and found[1] == wanted[1]
    texts = [one["resps"][0][0] for one in ours["continue"]]
    assert len(set(texts)) > 2, "the case must be tried"
    metric = {"choose": "acc", "continue": "exact_match", "perplexity": "word_perplexity"}
    for task, name in metric.items():
        found, wanted = ([one[name] for one in each[task]] for each in (ours, theirs))
        assert found == (
            wanted if task != "perplexity" else [pytest.approx(each, abs=CLOSE) for each in wanted]
        )


def test_tokens_are_those_of_hf(both):
    published, model = both
    ours, theirs = EarlyExitLM(model), hugging_face(published)
    assert ours.eot_token_id == theirs.eot_token_id and ours.prefix_token_id == theirs.prefix_token_id
    bos = published.tokenizer.bos_token or ""
    for text in ("the cat", f"{bos}the cat", " the", "<|im_start|>user\nthe cat<|im_end|>"):
        for special in (None, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special), (text, special)


def test_chats_are_rendered_as_by_hf(both):
    published, model = both
    ours, theirs = EarlyExitLM(model), hugging_face(published)
    asked = [{"role": "user", "content": "the cat?"}]
    begun = [*asked, {"role": "assistant", "content": "it sat"}]
    assert ours.apply_chat_template(asked) == theirs.apply_chat_template(asked)
    assert ours.apply_chat_template(begun, False) == theirs.apply_chat_template(begun, False)
    assert ours.chat_template(True) == theirs.chat_template(True) == published.tokenizer.chat_template
    assert ours.tokenizer_name == EarlyExitLM(model).tokenizer_name
    with pytest.raises(GenerationError, match="the tokenizer's template refuses these turns"):
        ours.apply_chat_template([{"role": "user"}])
    chats = dict(apply_chat_template=True, fewshot_as_multiturn=True, limit=2)
    ours, theirs = EarlyExitLM(model, False, max_length=128), hugging_face(published, max_length=128)
    one, other = (samples(lm, **chats)["continue"] for lm in (ours, theirs))
    assert [each["resps"] for each in one] == [each["resps"] for each in other]


def test_what_it_cannot_do_is_said(both):
    _, model = both
    with pytest.raises(ConfigError, match="max_length=4096: must be 1 to the model's 128 positions"):
        EarlyExitLM(model, max_length=4096)
    with pytest.raises(ConfigError, match="early_exit.exits"):
        EarlyExitLM(model, {"exits": [3], "threshold": 0.5})
    lm = EarlyExitLM(model, {"confidence": "entropy", "threshold": 0.5})
    with pytest.raises(ConfigError, match="early_exit.confidence=entropy: given text is scored by"):
        samples(lm)
    with pytest.raises(ConfigError, match="gen_kwargs.max_gen_toks=40: leaves none of 40 positions"):
        samples(EarlyExitLM(model, False, max_length=40), gen_kwargs={"max_gen_toks": 40})
    for name, value in {"num_beams": 4, "top_": 3, "max_length": 9}.items():
        with pytest.raises(
            ConfigError, match=f"gen_kwargs.{name}={value}: nemo_ee's decoding does not know it"
        ):
            samples(EarlyExitLM(model, False, max_length=LENGTH), gen_kwargs={name: value})


def test_stock_local_completions_finds_the_same_at_our_server(both):
    published, model = both
    with client(model) as http:
        address = f"{str(http.base_url).rstrip('/')}/v1/completions"
        whose = {"model": "tiny", "tokenizer": str(published.folder), "tokenizer_backend": "huggingface"}
        bos = published.tokenizer.bos_token_id is not None
        lm = LocalCompletionsAPI(base_url=address, add_bos_token=bos, **whose)
        ours = samples(lm, slice(2), limit=3, num_fewshot=0)
    theirs = samples(hugging_face(published), slice(2), limit=3, num_fewshot=0)
    for one, other in zip(ours["choose"], theirs["choose"], strict=True):
        for (found,), (wanted,) in zip(one["resps"], other["resps"], strict=True):
            assert found[0] == pytest.approx(wanted[0], abs=CLOSE) and found[1] == wanted[1]
    # `hf` decodes a text by itself, so that a SentencePiece tokenizer takes the blank in front of it for the beginning.
    texts = [[each["resps"][0][0].lstrip(" ") for each in side["continue"]] for side in (ours, theirs)]
    assert texts[0] == texts[1]
