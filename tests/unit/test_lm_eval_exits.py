# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""lm-evaluation-harness with exits: log-likelihoods against a softmax per token, texts against an uncached model, and a
sweep over tasks made of a few made-up examples."""

import gzip
import json
import math
from dataclasses import fields
from functools import partial

import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from pydantic import TypeAdapter

from nemo_ee.decoding.cpu.cpu_kernels import SWITCH
from nemo_ee.errors import ConfigError, DataError
from nemo_ee.evaluation.harness import page, run, sweep, task_functions, tasks
from nemo_ee.evaluation.harness.gen_kwargs import read_gen_kwargs
from nemo_ee.evaluation.harness.language_model import EarlyExitLM
from nemo_ee.evaluation.harness.scoring import score_continuations
from nemo_ee.evaluation.harness.settings import LmEvalConfig
from nemo_ee.report.schema import Metadata, Spread
from tests.support.script import ROOT
from tests.support.tiny_gpt import HEADS, VOCABULARY, tiny_model, tiny_model_config
from tests.support.uncached import exit_log_probs, generate_uncached

LAYERS = (2, 4, 6)
WAYS = [{}, dict.fromkeys(LAYERS, 0.3), {2: 0.6, 4: 1.0, 6: 0.4}, dict.fromkeys(LAYERS, 0.0)]


@pytest.fixture(scope="module")
def model():
    config = tiny_model_config(head=HEADS["linear, shortlist"], share_embeddings_and_output_weights=False)
    return tiny_model(config, dtype=torch.float64)


def drawn(length, seed):
    return torch.randint(6, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def by_hand(model, read, said, way):
    """Log-probability and greediness, position by position; a token without a row has its share of the bucket."""
    ids = torch.tensor([[*read]])
    exits = {n: exit_log_probs(model, n, ids)[0] for n in LAYERS}
    final = model.gpt(ids, torch.arange(len(read))[None], None)[0, :, :VOCABULARY].log_softmax(-1)
    logprob, greedy = 0.0, True
    for token, at in zip(said, range(len(read) - len(said), len(read)), strict=True):
        probabilities = final[at]
        for n in LAYERS:
            held = exits[n][at, :VOCABULARY]
            if way.get(n, 1.0) < 1.0 and held.max().exp() > way[n]:
                without = held == -math.inf
                probabilities = held.where(~without, exits[n][at, -1] - math.log(int(without.sum())))
                assert probabilities.exp().sum() == pytest.approx(1.0)
                break
        logprob += probabilities[token].item()
        best = held.argmax() if probabilities is not final[at] and way else probabilities.argmax()
        greedy &= int(best) == token
    return logprob, greedy


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_token_is_scored_by_the_first_sure_exit(model, monkeypatch, batch_size):
    monkeypatch.setenv(SWITCH, "0")  # heads in full
    texts = [(drawn(20, seed), drawn(4, seed + 50)) for seed in range(5)]
    texts += [(texts[0][0], drawn(1, 9)), (texts[0][0], drawn(1, 10)), (drawn(1, 3), drawn(7, 3))]
    best = model.gpt(torch.tensor([texts[1][0]]), torch.arange(20)[None], None)[0, -1, :VOCABULARY].argmax()
    texts.append((texts[1][0], [int(best)]))
    continuations = [([*context, *said][:-1], said) for context, said in texts]
    found = dict(score_continuations(model, continuations, WAYS, batch_size))
    assert sorted(found) == list(range(len(texts)))
    for index, (read, said) in enumerate(continuations):
        for way, (logprob, greedy) in zip(WAYS, found[index], strict=True):
            wanted = by_hand(model, read, said, way)
            assert logprob == pytest.approx(wanted[0]) and greedy == wanted[1]
    assert any(found[i][0][0] != found[i][1][0] for i in found), "the case must be tried"
    assert found[len(texts) - 1][0][1] and not found[0][0][1]


def test_keywords_become_our_own():
    read = lambda **given: read_gen_kwargs(given, 256)  # noqa: E731
    plain = read(until="\n")
    assert plain.until == ("\n",) and plain.lengths == {"max_length": 256, "min_length": 0}
    assert plain.sampling == {"use_greedy": True} == read(do_sample=False, temperature=0.7).sampling
    drawn_ = read(do_sample=True, temperature=0.7, top_k=5, max_new_tokens=9, until=["", "x"])
    assert drawn_.sampling == {"use_greedy": False, "temperature": 0.7, "top_k": 5}
    assert drawn_.until == ("x",) and drawn_.max_length == 9
    assert read(temperature=0.7).sampling["use_greedy"] is False
    assert read(do_sample=True).sampling == {"use_greedy": False}
    assert read(repetition_penalty=1.2).sampling == {"use_greedy": True, "repetition_penalty": 1.2}
    for given, words in {
        "num_beams": "nemo_ee's decoding does not know it",
        "top_pp": "did you mean top_p",
        "until": "must be texts",
        "max_gen_toks": "must be a number of tokens",
        "top_k": "must be a number",
    }.items():
        bad = {"until": [3], "max_gen_toks": 0, "top_k": "x"}.get(given, 2)
        with pytest.raises(ConfigError, match=rf"gen_kwargs.{given}=.*{words}"):
            read(**{given: bad})


def test_rouge_and_lengths():
    doc = {"summary": "The cats sat on the mat"}
    assert task_functions.rouge(doc, ["the cat sat on the mat"])["rougeL"] == 1.0
    found = task_functions.rouge(doc, ["a dog sat"])
    assert (
        found["rouge1"] == pytest.approx(2 * (1 / 3) * (1 / 6) / (1 / 3 + 1 / 6)) and found["rouge2"] == 0.0
    )
    assert task_functions.no_score({}, ["abc"]) == {"characters": 3.0}


PACKAGES = {
    "boolq-questions": [
        {"question": f"is w{n} a word", "title": "T", "answer": str(n % 2 == 0), "passage": f"w{n} w7"}
        for n in range(5)
    ],
    "gsm8k-questions": [
        {"question": f"w{n} w{n + 1}?", "answer": f"w5\n#### {n}"} for n in range(tasks.FEW_SHOT + 4)
    ],
    "xsum-articles": [{"id": n, "document": f"w{n} w3 w4", "summary": "w3 w9"} for n in range(3)],
    "humaneval-problems": [
        {
            "task_id": f"HumanEval/{n}",
            "prompt": f"w{n} w2",
            "canonical_solution": "w1",
            "test": "",
            "entry_point": "f",
        }
        for n in range(3)
    ],
}


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Files of packages in the form of the true ones."""

    def fetch(file, target):
        name = next(name for name, each in tasks.KNOWN_FILES.items() if each is file)
        text = "".join(json.dumps(record) + "\n" for record in PACKAGES[name]).encode()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.compress(text) if target.suffix == ".gz" else text)

    monkeypatch.setattr(tasks, "fetch_package_file", fetch)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_local_tasks_are_the_harness_own_but_for_their_examples(packages):
    chats = [
        {"messages": [{"role": "user", "content": "w1 w7\n\nIs  w1 a word?"}]},
        {"conversations": [{"from": "User", "value": "Is w3 a word?"}]},
    ]
    (packages / "tuned_on.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    files = tasks.write_tasks("made", "downloads", exclude_file="tuned_on.jsonl")
    assert [path.stem for path in files] == list(tasks.LOCAL_TASKS)
    stamps = [path.stat().st_mtime_ns for path in files]
    assert tasks.write_tasks("made", "downloads", exclude_file="tuned_on.jsonl") == files
    assert [path.stat().st_mtime_ns for path in files] == stamps, "written once"
    mine = TaskManager(include_path="made", include_defaults=False).load(list(tasks.LOCAL_TASKS))["tasks"]
    for name, own in {"boolq_local": "super_glue/boolq/default", "gsm8k_local": "gsm8k/gsm8k"}.items():
        theirs = yaml.safe_load((tasks.Path(tasks.lm_eval.__file__).parent / f"tasks/{own}.yaml").read_text())
        written = yaml.safe_load((packages / f"made/{name}.yaml").read_text())
        changed = {"dataset_path", "dataset_name", "dataset_kwargs", "tag", "task", "training_split"}
        assert {k: v for k, v in written.items() if k not in changed} == {
            k: v for k, v in theirs.items() if k not in changed
        }
    boolq, gsm8k = mine["boolq_local"], mine["gsm8k_local"]
    docs = list(boolq.validation_docs())
    assert [doc["question"] for doc in docs] == ["is w0 a word", "is w2 a word", "is w4 a word"]
    assert boolq.doc_to_text(docs[0]) == "w0 w7\nQuestion: is w0 a word?\nAnswer:" and docs[0]["label"] == 1
    assert len(gsm8k.test_docs()) == 4 and len(gsm8k.fewshot_docs()) == tasks.FEW_SHOT
    with pytest.raises(DataError, match="tuned_on.jsonl:1: has no conversations"):
        (packages / "tuned_on.jsonl").write_text('{"prompt": "x"}\n')
        tasks.write_tasks("made", "downloads", exclude_file="tuned_on.jsonl")


def configured(**changes):
    values = {
        "gpt_model_file": "model.nemo",
        "tasks": ["gsm8k_local", "boolq_local", "humaneval_local"],
        "limit": 3,
        "num_fewshot": 1,
        "gen_kwargs": {"max_gen_toks": 8, "until": ["w9"]},
        "thresholds": [0.6, 0.3, 1.0],
        "task_thresholds": {"humaneval_local": 3},
        "output_dir": "swept",
    }
    return LmEvalConfig.from_dict({**values, **changes})


@pytest.fixture
def in_process(packages, model, monkeypatch):
    """The model is there; what it was made of is not looked at."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from nemo_ee.models.generation_mixin import kept_microbatches

    monkeypatch.setenv(SWITCH, "0")  # exits as the reference asks them
    monkeypatch.setattr(run, "read_exits", lambda config: (model.cfg, model.early_exit))
    monkeypatch.setattr(run, "_model", lambda config, trainer: model)
    (packages / "model.nemo").write_bytes(b"weights")
    with kept_microbatches():
        destroy_num_microbatches_calculator()
        yield packages


def test_a_sweep_scores_times_and_goes_on(in_process, model, monkeypatch):
    asked = []
    timed = sweep.SweepLM._timed
    monkeypatch.setattr(sweep.SweepLM, "_timed", lambda lm, *a: asked.append(a[2]) or timed(lm, *a))
    files = run.run(configured(), trainer=None)
    assert [path.name for path in files[-3:]] == ["lm_eval.json", "lm_eval.png", "lm_eval.md"]
    result = TypeAdapter(page.SweepResult).validate_json(files[-3].read_bytes())
    text = files[-1].read_text()
    assert page.to_markdown(result) == text and str(in_process) not in text
    gsm8k, boolq, code = result.tasks
    assert [way.way for way in gsm8k.ways] == ["full depth", "0.6", "0.3", "1"]
    assert [way.threshold for way in code.ways] == [None, 1.0, 0.5, 0.0]
    assert (gsm8k.examples, gsm8k.num_fewshot, code.num_fewshot) == (3, 1, 0)
    assert set(gsm8k.ways[0].scores) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert boolq.ways[0].speedup is None and set(boolq.ways[0].scores) == {"acc,none"}
    for task in (gsm8k, code):
        full, sure = task.ways[0], task.ways[-1 if task is gsm8k else 1]
        for way in (full, sure):
            assert (way.agreement, way.same, way.left, way.layers) == (1.0, 1.0, 0.0, 1.0)
        assert task.ways[2].left > 0.0 and task.ways[2].layers < 1.0
        assert task.ways[2].speedup.median > 0.0
        assert f"{task.at_once} of them are answered by one token" in text or not task.at_once
    lines = [json.loads(line) for line in (in_process / "swept/answers.jsonl").read_text().splitlines()]
    for task, size in ((gsm8k, False), (code, True)):
        found = [each["texts"] for each in lines[1:] if "texts" in each and (each["prompt"] == 2) == size]
        assert task.at_once == sum(len(texts["full depth"]["tokens"]) == 1 for texts in found)
        for way in task.ways:
            longer = [t for t in found if len(t["full depth"]["tokens"]) > 1]
            same = [t[way.way]["tokens"] == t["full depth"]["tokens"] for t in longer]
            assert way.same == (sum(same) / len(same) if same else None)
    lm = EarlyExitLM(model, False)
    names = [model.text_tokenizer.name(token) for token in range(VOCABULARY)]
    for doc, line in zip(
        PACKAGES["humaneval-problems"], [each for each in lines[1:] if each.get("prompt") == 2], strict=True
    ):
        prompt = lm.tok_encode(doc["prompt"])
        assert list(line["texts"]) == ["full depth", "1", "0.5", "0"]
        for name, threshold in {"full depth": 1.0, "0.5": 0.5, "0": 0.0}.items():
            exits = dict.fromkeys(LAYERS, threshold) if threshold < 1.0 else {}
            wanted = generate_uncached(model.gpt, prompt, 8, exits)
            ends = (i + 1 for i, token in enumerate(wanted.tokens) if token == 0 or "w9" in names[token])
            end = next(ends, len(wanted.tokens))
            mine = line["texts"][name]
            assert mine["tokens"] == wanted.tokens[:end]
            assert mine["layers"] == {
                str(n): wanted.exit_layers[:end].count(n) for n in set(wanted.exit_layers[:end])
            }
            assert 0 <= mine["steps"][0] < end or end == 1
        full = line["texts"]["full depth"]["tokens"]
        said = [first_sure(model, prompt + full[:i], 0.5) in (None, full[i]) for i in range(1, len(full))]
        assert line["agreeing"]["0.5"] == [sum(said), len(full) - 1]
    count = len(asked)
    assert count == 3 * 4 + 3 * 4 + 2, "each in each way, and two to warm up"
    again = run.run(configured(thresholds=[0.6, 1.0]), trainer=None)
    assert len(asked) == count and "| 0.3 |" not in again[-1].read_text(), "nothing is generated twice"
    with pytest.raises(ConfigError, match="max_length=32: swept/answers.jsonl was begun with"):
        run.run(configured(max_length=32), trainer=None)
    (in_process / "model.nemo").write_bytes(b"other weights")
    begun = r"gpt_model_file=model.nemo \(13 bytes.*was begun with .*model.nemo \(7 bytes"
    with pytest.raises(ConfigError, match=begun):
        run.run(configured(), trainer=None)
    (in_process / "swept/answers.jsonl").write_text('{}\n{"texts": {}}\n')
    with pytest.raises(DataError, match="answers.jsonl: is damaged; delete it to begin anew"):
        run.run(configured(), trainer=None)
    measured = [files[-3], *(ROOT / "docs" / "benchmarks").rglob("lm_eval.json")]
    for numbers in measured:
        found = TypeAdapter(page.SweepResult).validate_json(numbers.read_bytes())
        assert page.to_markdown(found) == numbers.with_suffix(".md").read_text(), numbers


def test_a_page_of_texts_that_end_at_once():
    """As a bad exit's do at low thresholds: nothing is timed behind their first step."""
    speed = Spread(1.0, 0.9, 1.1)
    said = {"left": 0.5, "layers": 0.7, "agreement": 0.2, "same": 0.0}
    ways = [
        page.WayResult(
            "full depth", None, {"m,none": (0.5, None)}, **said, tokens_per_second=speed, speedup=speed
        ),
        page.WayResult("0.5", 0.5, {"m,none": (0.4, 0.1)}, **said, tokens_per_second=speed, speedup=speed),
        page.WayResult("0", 0.0, {"m,none": (0.1, 0.1)}, **said),
    ]
    about = Metadata(*["x"] * len(fields(Metadata)))
    result = page.SweepResult(about, (2,), "1", False, (page.TaskResult("t", 3, 0, tuple(ways)),))
    rows = [line for line in page.to_markdown(result).splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in rows[-5:]} == {9} and rows[-1].startswith(
        "| 0 | 0.100 ± 0.100 |  |  | 50 % |"
    )
    (axes,) = page.plot(result).axes
    assert len(axes.containers) == 1 and [text.get_text() for text in axes.texts] == ["0.5"]


@torch.no_grad()
def first_sure(model, ids, threshold):
    for n in LAYERS:
        held = exit_log_probs(model, n, torch.tensor([ids]))[0, -1, :VOCABULARY].exp()
        if held.max() > threshold:
            return int(held.argmax())
    return None


def test_one_way_writes_what_the_harness_found(in_process, monkeypatch, capsys):
    changes = {"thresholds": None, "task_thresholds": {}, "batch_size": 2, "output_dir": "found"}
    chosen = {"early_exit": {"threshold": 0.5, "always": True}, "tasks": ["gsm8k_local", "boolq_local"]}
    files = run.run(configured(**changes, **chosen), trainer=None)
    assert [path.name for path in files[-3:]] == [
        "samples_gsm8k_local.jsonl",
        "samples_boolq_local.jsonl",
        "results.json",
    ]
    results = json.loads(files[-1].read_text())
    assert results["results"]["boolq_local"].keys() >= {"acc,none", "acc_stderr,none"}
    assert results["config"]["early_exit"]["threshold"] == 0.5 and "|boolq_local|" in capsys.readouterr().out
    assert len(files[-3].read_text().splitlines()) == 2 * 3, "two filters"
    assert [path.name for path in run.run(LmEvalConfig(), None)] == [
        f"{name}.yaml" for name in tasks.LOCAL_TASKS
    ]
    own = partial(TaskManager, include_path="lm_eval_tasks", include_defaults=False)
    monkeypatch.setattr(run, "TaskManager", lambda **_: own())  # the harness's own take seconds
    with pytest.raises(
        ConfigError, match="boolq_locl is neither a task of the harness .*did you mean boolq_local"
    ):
        run.run(configured(**changes, tasks=["boolq_locl"]), trainer=None)
    with pytest.raises(ConfigError, match=r"gsm8k\* is neither a task"):
        run.run(configured(**changes, tasks=["gsm8k*"]), trainer=None)
    monkeypatch.setattr(run, "_model", None)  # what follows is known without it
    with pytest.raises(ConfigError, match="max_length=4096: must be 1 to the model's"):
        run.run(configured(**changes, max_length=4096), trainer=None)
    with pytest.raises(ConfigError, match="gen_kwargs.num_beams=2: nemo_ee's decoding does not know it"):
        run.run(configured(**changes, gen_kwargs={"num_beams": 2}), trainer=None)
    (in_process / "lm_eval_tasks/both.yaml").write_text("group: both\ntask: [gsm8k_local, boolq_local]\n")
    with pytest.raises(ConfigError, match="gen_kwargs.do_sample=true: a sweep compares greedy texts"):
        run.run(configured(gen_kwargs={"do_sample": True}), trainer=None)
    grouped = configured(tasks=["both"], thresholds=3, task_thresholds={"both": 5})
    with pytest.raises(
        ConfigError, match="task_thresholds=.*both is a group, and thresholds are of its tasks"
    ):
        run.run(grouped, trainer=None)


def test_settings_report_every_fault():
    with pytest.raises(ConfigError) as error:
        configured(
            gpt_model_file=None,
            thresholds=[0.5, 0.5],
            task_thresholds={"x": 1},
            batch_size=2,
            system="Be brief.",
        )
    for part in (
        "gpt_model_file=null",
        "thresholds=",
        "must each be named once",
        "task_thresholds.x=1: must be from 2 to 101",
        "batch_size=2",
    ):
        assert part in str(error.value)
    assert "system=Be brief.: is for chats alone" in str(error.value)
    with pytest.raises(ConfigError, match="exits=.*is of a sweep"):
        configured(thresholds=None, exits=[2], task_thresholds={})
    with pytest.raises(ConfigError, match="thresholds=.*each be named once"):
        configured(thresholds=[1, 1.0], task_thresholds={})
    assert configured(thresholds=5, task_thresholds={}).thresholds_of("any") == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert configured(task_thresholds={"gsm8k_local": [0.9]}).thresholds_of("gsm8k_local") == (0.9,)
