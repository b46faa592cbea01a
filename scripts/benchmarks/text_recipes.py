# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which text to tune exits on for chats: articles, or what the model itself answers; at equal time.

    python scripts/benchmarks/text_recipes.py --model smollm2.nemo --train wikipedia_train \\
        --validation wikipedia_validation --work work

Each recipe gets the same time for all that it needs: letting the model answer prompts, the closed form, and tuning.
Time is that of the processor (of all threads of the process), since a shared machine's clock measures its other users
as well; `--minutes` are those of two cores. Measured are the exits on full depth's own answers to prompts that were
not among the tuning prompts, and on held-out articles, in float32. What a part of a recipe found lies in WORK.
"""

import json
import multiprocessing
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import REQUIRED, ROOT, main
from report import Column, plot, table
from tuning_runs import configuration, fit, held_out_quality, tuning, with_interval

from nemo_ee.files.output import write_text
from nemo_ee.runtime.script import user_errors

PROMPTS = ROOT / "scripts" / "benchmarks" / "held_out_prompts.jsonl"
OPTIONS = {
    "model": (REQUIRED, "the base, a .nemo with a chat template"),
    "train": (REQUIRED, "prefix of an indexed dataset of articles"),
    "validation": (REQUIRED, "prefix of an indexed dataset of other articles"),
    "work": (REQUIRED, "directory of what the recipes write"),
    "downloads": ("downloads", "directory of the prompts' sources"),
    "minutes": (3.0, "of two cores, for each recipe"),
    "prompts": ([192], "how many are answered, per recipe"),
    "layers": ("10,20", "of exits"),
    "only": ("", "run recipes whose name contains this"),
    "sequences": (48, "held-out pieces of articles"),
    "set": ((), "changes to the configuration of tuning"),
    "writing": ((), "changes to that of writing answers"),
}
AXES = ("prompts",)
THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TIMING_STEPS, CORES, TO_TUNE_ON, TO_MEASURE_ON = 11, 2, 160, 128
"""Steps at a rate of 0 that time a step; tokens of an answer, at most."""
ARTICLES = "Wikipedia"


def cases(arguments: Namespace) -> list[dict]:
    """Recipes: how many prompts the model answers first (0: tuned on articles), and whether it begins with the closed
    form of articles."""
    found = [{"recipe": ARTICLES, "prompts": 0, "begins": True}]
    for count in arguments.prompts:
        name = f"its own answers to {count} prompts"
        found.append({"recipe": name, "prompts": count, "begins": False})
        found.append({"recipe": f"closed form on {ARTICLES}, then {name}", "prompts": count, "begins": True})
    return [case for case in found if arguments.only in case["recipe"]]


def measure(case: Mapping, arguments: Namespace) -> dict:
    """All parts of a recipe, each in a process of its own unless WORK has what it found."""
    left, written, prompts = arguments.minutes * 60 * CORES, None, case["prompts"]
    name = f"{prompts}_mixed" if prompts and case["begins"] else str(prompts)
    if prompts:
        written = part(f"written_{prompts}", write_answers, arguments, prompts)
        left -= written["seconds"]
    started = part(f"started_{prompts}", start, arguments, prompts)
    begun = part("started_0", start, arguments, 0) if case["begins"] else started
    # What the steps at a rate of 0 took is for measuring alone; a run of known speed has none.
    steps = max(2, round((left - begun["before"]) / started["per_step"]))
    first = 0 if case["begins"] else prompts
    run = part(f"tuned_{name}", tune, arguments, prompts, first, name, steps)
    found = part(f"measured_{name}", measure_exits, arguments, name)
    cost = {
        "closed form, s": begun["before"],
        "tuning, s": run["all"],
        "steps": steps,
        "s/step": run["per_step"],
    }
    cost["tokens that count, each time they are read"] = run["samples"] * run["tokens_per_sample"]
    if written:
        cost |= {"writing answers, s": written["seconds"], "tokens written": written["tokens"]}
        cost["answers"] = written["answers"]
    return {**found, "cost": {"": cost}}


def part(name: str, work: Callable, arguments: Namespace, *others: Any) -> dict:
    """What a part found, from WORK if it is there. A process of its own, of one thread: Megatron's batch sizes are a
    process's for good, and waiting threads would be counted as working."""

    path = Path(arguments.work, f"{name}.json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(_called, work, arguments, *others).result()
        write_text(path, json.dumps(found))
        print(f"{name}: {json.dumps(found)[:300]}", flush=True)
    return json.loads(path.read_text())


def _called(work: Callable, *arguments: Any) -> dict:

    torch.set_num_threads(1)
    with user_errors():
        return work(*arguments)


def write_answers(arguments: Namespace, prompts: int) -> dict:
    """Lets the model answer; returns what that took and gave."""
    from omegaconf import OmegaConf

    from nemo_ee.inference.prompt_file import read_prompt_file
    from nemo_ee.models.trainer_builder import EarlyExitTrainerBuilder
    from nemo_ee.tuning_text.generate import generate_tuning_text
    from nemo_ee.tuning_text.prompts import keys_of, read_prompts
    from nemo_ee.tuning_text.settings import TuningTextConfig

    changes = [f"gpt_model_file={arguments.model}", f"output_prefix={arguments.work}/answers_{prompts}"]
    changes += [f"prompts.directory={arguments.downloads}", f"prompts.exclude_file={PROMPTS}"]
    changes += [
        f"prompts.count={prompts}",
        f"inference.tokens_to_generate={TO_TUNE_ON}",
        "validation_share=0",
    ]
    made = configuration("generate_tuning_text", [*changes, *arguments.writing])
    values = OmegaConf.to_container(made, resolve=True)
    trainer = values.pop("trainer")
    config = TuningTextConfig.from_dict({**values, "precision": trainer["precision"]})
    asked, held_out = (
        keys_of(read_prompts(config.prompts, config.seed)),
        read_prompt_file(str(PROMPTS), "held out"),
    )
    assert not asked & keys_of(held_out), "a held-out prompt would be tuned on"
    built = EarlyExitTrainerBuilder(OmegaConf.create({"trainer": trainer, "model": {}})).create_trainer()
    began = time.process_time()
    done = generate_tuning_text(config, built).progress
    return {"seconds": time.process_time() - began, **asdict(done)}


def timed_fit(
    arguments: Namespace, prompts: int, save_to: str, steps: int, warm_up: int, *changes: str
) -> dict:
    """One run of tuning; returns its processor seconds: before the first step, per step, and in all."""
    from lightning.pytorch.callbacks import Callback

    class Clock(Callback):
        def setup(self, *_: Any) -> None:
            self.times = [time.process_time()]

        def on_train_start(self, *_: Any) -> None:
            self.times.append(time.process_time())

        on_train_batch_end = on_train_start

    clock, text = Clock(), []
    if prompts:  # three chats have about as many tokens as two pieces of articles
        file = f"{arguments.work}/answers_{prompts}_train.jsonl"
        text = ["~model.data.data_prefix", "model.data.chat=true", f"model.data.train_ds.file_names=[{file}]"]
        text += ["model.micro_batch_size=3", "model.global_batch_size=3"]
    changes = (*text, "trainer.limit_val_batches=0", f"trainer.max_steps={steps}", *changes, *arguments.set)
    changes = (f"model.optim.sched.warmup_steps={warm_up}", *changes)
    cfg = tuning(arguments.model, arguments.layers, arguments.train, arguments.validation, changes)
    model = fit(cfg, clock)
    ended = time.process_time()
    model.save_adapters(f"{arguments.work}/{save_to}.nemo")
    began, first, *later = clock.times
    each = [late - early for early, late in zip([first, *later], later, strict=False)]
    found = {
        "before": first - began,
        "per_step": statistics.mean(each[len(each) // 3 :]),
        "all": ended - began,
    }
    samples = cfg.trainer.max_steps * cfg.model.global_batch_size
    return {**found, "samples": samples, "tokens_per_sample": model.tokens_per_sample}


def start(arguments: Namespace, prompts: int) -> dict:
    """The closed form, and the time of a step."""
    return timed_fit(arguments, prompts, f"start_{prompts}", TIMING_STEPS, 1, "model.optim.lr=0")


def tune(arguments: Namespace, prompts: int, first: int, name: str, steps: int) -> dict:
    """As many steps as fit into what is left."""
    adapter = f"model.adapter_path={arguments.work}/start_{first}.nemo"
    return timed_fit(arguments, prompts, f"tuned_{name}", steps, steps // 10 + 1, adapter)


def measure_exits(arguments: Namespace, name: str) -> dict:
    """The exits on full depth's own answers to the held-out prompts, and on held-out articles, in float32."""
    from decoding_ways import restore

    from nemo_ee.evaluation.held_out import quality_of
    from nemo_ee.evaluation.settings import SweepConfig
    from nemo_ee.evaluation.sweep import GeneratedText, Sweep
    from nemo_ee.inference.prompt_file import read_prompt_file
    from nemo_ee.inference.prompts import tokenize_prompts

    model = restore(arguments.model, f"{arguments.work}/tuned_{name}.nemo", "32", 0).eval()
    chats = read_prompt_file(str(PROMPTS), "held out")
    prompts = tokenize_prompts(chats, model.text_tokenizer, None, model.cfg.encoder_seq_length)
    sweep = Sweep(
        model, prompts, SweepConfig(tokens_to_generate=TO_MEASURE_ON, thresholds=THRESHOLDS), seed=0
    )
    path = Path(arguments.work, "held_out_answers.json")
    if not path.exists():  # the same for all recipes
        model.prepare_decoding()
        batches = [prompts[first : first + 8] for first in range(0, len(prompts), 8)]
        write_text(path, json.dumps([asdict(t) for batch in batches for t in sweep.generate(batch, None)]))
    texts = [GeneratedText(**each) for each in json.loads(path.read_text())]
    scores, way, thresholds = sweep.score(texts), {}, {}
    own = quality_of(((each, mask) for each, _, mask in scores), seed=0).exits
    articles = held_out_quality(model, arguments.validation, arguments.sequences, 256)
    for kind, found in (("answers", map(asdict, own)), ("articles", articles)):
        way |= {f"{kind}, exit {each['layer']}": with_interval(each) for each in found}
    agreeing = {
        str(n): [
            int(c) for each, _, m in scores for c in ((each.exits[n].tokens == each.final.tokens) & m).sum(1)
        ]
        for n in sweep.exits
    }
    for threshold in THRESHOLDS:
        agreement, around = sweep.agreement(threshold, scores)
        left = [each.leaving(dict.fromkeys(sweep.exits, threshold))[1][mask] for each, _, mask in scores]
        layers = torch.cat(left).double()
        early, out = layers > 0, torch.where(layers > 0, sweep.final_layer - layers, 0)
        at = with_interval({"agreement": agreement, "agreement_ci": around and asdict(around)})
        shares = {"leave early, %": 100 * early.double().mean().item()}
        shares["layers left out, %"] = 100 * out.mean().item() / sweep.final_layer
        thresholds[f"{threshold:g}"] = {"agreement": at, **shares}
    tokens = [int(count) for _, _, mask in scores for count in mask.sum(1)]
    about = {"held_out": len(prompts), "ended": sum(len(text.tokens) < TO_MEASURE_ON for text in texts)}
    about |= {"answer_tokens": sum(tokens), "article_tokens": articles[0]["tokens"]}
    per_prompt = {"tokens": tokens, "agreeing": agreeing}
    return {"ways": {"": way}, "thresholds": thresholds, "per prompt": per_prompt, "about case": about}


def page(rows: Sequence[dict]) -> tuple[dict, Any]:
    """What the template needs, and the plot."""

    def named(metrics: Mapping, digits: int = 3) -> list[Column]:
        return [Column(name, name, digits) for name in metrics]

    rows = [{**row, "case": {"recipe": row["case"]["recipe"]}} for row in rows]
    for row in rows:
        row["gained"] = {}
        for layer in row["per prompt"]["agreeing"] if row is not rows[0] else ():
            row["gained"][layer] = {"difference": gained(rows[0], row, layer)}
        row["at"] = {"": at_equal_agreement(row["thresholds"])}
    by_threshold = [
        [{**row, "thresholds": {t: row["thresholds"][t]}} for row in rows] for t in rows[0]["thresholds"]
    ]
    digits = {"agreement": 3, "leave early, %": 1, "layers left out, %": 1}
    columns = [Column(name, name, number) for name, number in digits.items()]
    cost = [
        "writing answers, s",
        "tokens written",
        "answers",
        "closed form, s",
        "tuning, s",
        "steps",
        "s/step",
    ]
    costs = [
        Column(n, n, 2 if n == "s/step" else 0)
        for n in [*cost, *rows[0]["cost"][""]]
        if n in cost or n[:4] == "toke"
    ]
    values = {
        **rows[0]["about case"],
        "processor_seconds": 60 * CORES * rows[0]["settings"]["minutes"],
        "agreements": table(rows, named(rows[0]["ways"][""]), case="recipe", way=None),
        "first": rows[0]["case"]["recipe"],
        "gained": table(rows[1:], named(["difference"]), "gained", case="recipe", way="exit"),
        "thresholds": table(sum(by_threshold, []), columns, "thresholds", case="recipe", way="threshold"),
        "equal": table(rows, named(rows[0]["at"][""], 1), "at", case="recipe", way=None),
        "costs": table(rows, list(dict.fromkeys(costs)), "cost", case="recipe", way=None),
    }
    points = [
        (t, row["case"]["recipe"], at["agreement"]) for row in rows for t, at in row["thresholds"].items()
    ]
    return values, plot(points, "agreement with full depth's own answers, by thresholds")


def gained(first: Mapping, row: Mapping, layer: str) -> dict[str, float]:
    """How much more often a recipe's exit agrees than the first's, per token, with its interval over prompts."""
    one, other = (np.array(each["per prompt"]["agreeing"][layer]) for each in (first, row))
    tokens = np.array(first["per prompt"]["tokens"])
    drawn = np.random.default_rng(0).integers(len(tokens), size=(2000, len(tokens)))
    low, high = np.quantile((other - one)[drawn].sum(1) / tokens[drawn].sum(1), [0.025, 0.975])
    return {"value": float((other - one).sum() / tokens.sum()), "low": float(low), "high": float(high)}


def at_equal_agreement(thresholds: Mapping[str, Mapping]) -> dict[str, float]:
    """Shares at an agreement, read off between the two nearest thresholds."""
    points = sorted(thresholds.values(), key=lambda at: at["agreement"]["value"])
    agreement = [at["agreement"]["value"] for at in points]
    return {
        f"{share} at {level}": float(np.interp(level, agreement, [at[share] for at in points]))
        for level in (0.9, 0.95)
        for share in ("leave early, %", "layers left out, %")
    }


if __name__ == "__main__":
    main("text_recipes")
