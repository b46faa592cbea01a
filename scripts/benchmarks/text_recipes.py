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
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import REQUIRED, ROOT, main
from report import columns, plot, table
from tuning_runs import configuration, fit, held_out_quality, in_child, tuning, with_interval

from nemo_ee.files.output import write_text

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
AXES, ARTICLES, NEMO = ("prompts",), "Wikipedia", False
THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TIMING_STEPS, CORES, TO_TUNE_ON, TO_MEASURE_ON = 11, 2, 160, 128
"""Steps at a rate of 0 that time a step; tokens of an answer, at most."""


def recipes(arguments: Namespace) -> dict[str, tuple[int, bool]]:
    """Name -> how many prompts the model answers first (0: tuned on articles), and whether it begins with the closed
    form of articles."""
    found = {ARTICLES: (0, True)}
    for count in arguments.prompts:
        name = f"its own answers to {count} prompts"
        found |= {name: (count, False), f"closed form on {ARTICLES}, then {name}": (count, True)}
    return found


def cases(arguments: Namespace) -> list[dict]:
    """Recipes."""
    return [{"recipe": name} for name in recipes(arguments) if arguments.only in name]


def measure(case: Mapping, arguments: Namespace) -> dict:
    """All parts of a recipe, each in a process of its own unless WORK has what it found."""
    left, written = arguments.minutes * 60 * CORES, None
    prompts, begins = recipes(arguments)[case["recipe"]]
    name = f"{prompts}_mixed" if prompts and begins else str(prompts)
    if prompts:
        written = part(f"written_{prompts}", write_answers, arguments, prompts)
        left -= written["seconds"]
    # The closed form, and the time of a step at a rate of 0, which is for measuring alone.
    started = part(f"started_{prompts}", timed_fit, arguments, prompts, TIMING_STEPS, 1, "model.optim.lr=0")
    begun = (
        part("started_0", timed_fit, arguments, 0, TIMING_STEPS, 1, "model.optim.lr=0") if begins else started
    )
    steps = max(2, round((left - begun["before"]) / started["per_step"]))
    adapter = f"model.adapter_path={arguments.work}/started_{0 if begins else prompts}.nemo"
    run = part(f"tuned_{name}", timed_fit, arguments, prompts, steps, steps // 10 + 1, adapter)
    found = part(f"measured_{name}", measure_exits, arguments)
    cost = {"closed form, s": begun["before"], "tuning, s": run["all"], "steps": steps}
    cost["s/step"] = run["per_step"]
    cost["tokens that count, each time they are read"] = run["samples"] * run["tokens_per_sample"]
    if written:
        cost |= {"writing answers, s": written["seconds"], "tokens written": written["tokens"]}
        cost["answers"] = written["answers"]
    return {**found, "cost": {"": cost}}


def part(name: str, work: Callable, arguments: Namespace, *others: Any) -> dict:
    """What a part found, from WORK if it is there; in a process of one thread, as waiting threads would be counted."""
    path = Path(arguments.work, f"{name}.json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(in_child(work, name, arguments, *others, threads=1)))
        print(f"{name}: {path.read_text()[:300]}", flush=True)
    return json.loads(path.read_text())


def write_answers(name: str, arguments: Namespace, prompts: int) -> dict:
    """Lets the model answer; returns what that took and gave."""
    from omegaconf import OmegaConf

    from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder
    from nemo_ee.running.prompt_file import read_prompt_file
    from nemo_ee.tuning_text.generate import generate_tuning_text
    from nemo_ee.tuning_text.prompts import keys_of, read_prompts
    from nemo_ee.tuning_text.settings import TuningTextConfig

    changes = [f"gpt_model_file={arguments.model}", f"output_prefix={arguments.work}/answers_{prompts}"]
    changes += [f"prompts.directory={arguments.downloads}", f"prompts.exclude_file={PROMPTS}"]
    changes += [f"prompts.count={prompts}", f"inference.tokens_to_generate={TO_TUNE_ON}"]
    changes += ["validation_share=0", *arguments.writing]
    values = OmegaConf.to_container(configuration("generate_tuning_text", changes), resolve=True)
    trainer = values.pop("trainer")
    config = TuningTextConfig.from_dict({**values, "precision": trainer["precision"]})
    asked, held_out = read_prompts(config.prompts, config.seed), read_prompt_file(str(PROMPTS), "held out")
    assert not keys_of(asked) & keys_of(held_out), "a held-out prompt would be tuned on"
    built = EarlyExitTrainerBuilder(OmegaConf.create({"trainer": trainer, "model": {}})).create_trainer()
    began = time.process_time()
    done = generate_tuning_text(config, built).progress
    return {"seconds": time.process_time() - began, **asdict(done)}


def timed_fit(name: str, arguments: Namespace, prompts: int, steps: int, warm: int, *changes: str) -> dict:
    """One run of tuning; returns its processor seconds: before the first step, per step, and in all."""
    from lightning.pytorch.callbacks import Callback

    class Clock(Callback):
        def setup(self, *_: Any) -> None:
            self.times = [time.process_time()]

        def on_train_start(self, *_: Any) -> None:
            self.times.append(time.process_time())

        on_train_batch_end = on_train_start

    common = ["trainer.limit_val_batches=0", f"trainer.max_steps={steps}", *changes, *arguments.set]
    common.insert(0, f"model.optim.sched.warmup_steps={warm}")
    articles = (arguments.train, arguments.validation)
    if prompts:  # three chats have about as many tokens as two pieces of articles
        file, articles = f"{arguments.work}/answers_{prompts}_train.jsonl", ()
        common = ["model.data.chat=true", f"model.data.train_ds.file_names=[{file}]", *common]
        common = ["model.micro_batch_size=3", "model.global_batch_size=3", *common]
    cfg, clock = tuning(arguments.model, arguments.layers, common, *articles), Clock()
    model = fit(cfg, clock)
    ended = time.process_time()
    model.save_adapters(f"{arguments.work}/{name}.nemo")
    began, first, *later = clock.times
    each = [late - early for early, late in zip([first, *later], later, strict=False)]
    per_step = statistics.mean(each[len(each) // 3 :])
    found = {"before": first - began, "per_step": per_step, "all": ended - began}
    samples = cfg.trainer.max_steps * cfg.model.global_batch_size
    return {**found, "samples": samples, "tokens_per_sample": model.text.tokens_per_sample}


def measure_exits(name: str, arguments: Namespace) -> dict:
    """The exits on full depth's own answers to the held-out prompts, and on held-out articles, in float32."""
    from decoding_ways import restore

    from nemo_ee.evaluation.held_out import quality_of
    from nemo_ee.evaluation.settings import SweepConfig
    from nemo_ee.evaluation.sweep import GeneratedText, Sweep
    from nemo_ee.generation.prompts import tokenize_prompts
    from nemo_ee.running.prompt_file import read_prompt_file

    model = restore(
        arguments.model, f"{arguments.work}/{name.replace('measured', 'tuned')}.nemo", "32", 0
    ).eval()
    chats = read_prompt_file(str(PROMPTS), "held out")
    prompts = tokenize_prompts(chats, model.text_tokenizer, None, model.cfg.encoder_seq_length)
    sweep = Sweep(model, prompts, SweepConfig(tokens_to_generate=TO_MEASURE_ON), seed=0)
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
    agreeing: dict[str, list[int]] = {str(n): [] for n in sweep.exits}
    for each, _, mask in scores:
        for n, counts in agreeing.items():
            counts += ((each.exits[int(n)].tokens == each.final.tokens) & mask).sum(1).tolist()
    for threshold in THRESHOLDS:
        agreement, around = sweep.agreement([threshold] * len(sweep.exits), scores)
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
    first, parts = rows[0], []
    for row in rows:
        layers = row["per prompt"]["agreeing"] if row is not first else ()
        row["gained"] = {layer: {"difference": gained(first, row, layer)} for layer in layers}
        row["at"] = {"": at_equal_agreement(row["thresholds"])}
    for threshold in first["thresholds"]:
        parts += [{**row, "thresholds": {threshold: row["thresholds"][threshold]}} for row in rows]
    shares = columns({"agreement": 3, "leave early, %": 1, "layers left out, %": 1})
    cost = dict.fromkeys(("writing answers, s", "tokens written", "answers", *first["cost"][""]), 0)
    tables = {
        "agreements": table(rows, columns(dict.fromkeys(first["ways"][""], 3)), case="recipe", way=None),
        "gained": table(rows, columns({"difference": 3}), "gained", case="recipe", way="exit"),
        "thresholds": table(parts, shares, "thresholds", case="recipe", way="threshold"),
        "equal": table(rows, columns(dict.fromkeys(first["at"][""], 1)), "at", case="recipe", way=None),
        "costs": table(rows, columns({**cost, "s/step": 2}), "cost", case="recipe", way=None),
    }
    seconds = 60 * CORES * first["settings"]["minutes"]
    about = {**first["about case"], "first": first["case"]["recipe"], "processor_seconds": seconds}
    series = ((row["case"]["recipe"], row["thresholds"]) for row in rows)
    points = [(t, name, at["agreement"]) for name, thresholds in series for t, at in thresholds.items()]
    return {**about, **tables}, plot(points, "agreement with full depth's own answers, by thresholds")


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
