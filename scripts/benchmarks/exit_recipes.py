# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How well exits do after different recipes at equal tokens: initialisation, projection, objective.

    python scripts/benchmarks/exit_recipes.py --model model.nemo --train text_train --validation text_validation

Every recipe is `conf/megatron_gpt_ee_tuning.yaml` with a few keys changed, run through `Trainer.fit`: closed form on
40,960 tokens where it is used, then 195 steps of 512 tokens. Quality is measured on held-out documents, in float32,
with 95 % bootstrap intervals over sequences. Texts to tune on are compared at equal minutes, by text_recipes.py.
"""

import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from harness import REQUIRED, main
from report import columns, plot, table
from tuning_runs import CE, KL, TUNING, fit, held_out_quality, in_child, tuning, with_interval

from nemo_ee.files.scratch import scratch_folder

SHORTLIST, WEIGHTED = "model.early_exit.head.shortlist_size", f"{TUNING}.token_weighting=confidence"
NEMO = False  # but in the processes of recipes
RECIPES = {
    "default (ridge, 8k shortlist, KL + argmax)": (),
    "init: copy": ("model.early_exit.init=copy",),
    "init: random": ("model.early_exit.init=random",),
    "projection: full (tied)": ("model.early_exit.head.projection=tied",),
    "projection: 4k shortlist": (f"{SHORTLIST}=4096",),
    "projection: 16k shortlist": (f"{SHORTLIST}=16384",),
    "objective: KL": KL,
    "objective: argmax": (f"{TUNING}.kl_weight=0", f"{TUNING}.argmax_weight=1"),
    "objective: CE": CE,
    "objective: CE, confidence-weighted": (*CE, WEIGHTED),
    "objective: KL + argmax, confidence-weighted": (WEIGHTED,),
}
OPTIONS = {
    "model": (REQUIRED, "the base, a .nemo"),
    "train": (REQUIRED, "prefix of an indexed dataset"),
    "validation": (REQUIRED, "prefix of an indexed dataset of other documents"),
    "layers": ("10,20", "of exits"),
    "only": ("", "run recipes whose name contains this"),
    "sequences": (96, "held-out sequences"),
    "set": ((), "changes to the configuration of every recipe"),
}
COMMON = ("trainer.max_steps=195", "trainer.limit_val_batches=0", "model.early_exit.ridge.tokens=40960")


def cases(arguments: Namespace) -> list[dict]:
    """Recipes."""
    return [{"recipe": name} for name in RECIPES if arguments.only in name]


def measure(case: Mapping, arguments: Namespace) -> dict:
    """Tunes and measures one recipe."""
    with scratch_folder("recipe") as folder:
        about = in_child(tune, case["recipe"], arguments, str(folder))
        start, end = in_child(measure_exits, arguments, str(folder), about["length"])
    way: dict[str, Any] = {}
    for before, after in zip(start, end, strict=True):
        name = f"exit {after['layer']}"
        way |= {f"{name}, no steps": before["agreement"], f"{name}, tuned": with_interval(after)}
        way |= {f"{name}, strict": after["strict_agreement"], f"{name}, loss": after["loss"]}
    way["tuning, s"] = about.pop("seconds")
    return {"ways": {"": way}, "about case": {**about, "held_out": end[0]["tokens"], "note": ""}}


def tune(recipe: str, arguments: Namespace, folder: str) -> dict:
    """Writes the exits before the first step and after the last."""
    from lightning.pytorch.callbacks import Callback

    class Start(Callback):
        def on_train_start(self, trainer: Any, model: Any) -> None:
            model.save_adapters(f"{folder}/start.nemo")
            self.begin = time.perf_counter()

        def on_train_end(self, *_: Any) -> None:
            self.seconds = time.perf_counter() - self.begin

    start, changes = Start(), (*COMMON, *arguments.set, *RECIPES[recipe])
    cfg = tuning(arguments.model, arguments.layers, changes, arguments.train, arguments.validation)
    fit(cfg, start).save_adapters(f"{folder}/end.nemo")
    fitted = cfg.model.early_exit.ridge.tokens if cfg.model.early_exit.init == "ridge" else 0
    about = {"fitted": fitted, "precision": str(cfg.trainer.precision), "seed": cfg.model.seed}
    about |= {"seconds": start.seconds, "length": cfg.model.data.seq_length}
    return {**about, "tuned": cfg.trainer.max_steps * cfg.model.global_batch_size * about["length"]}


def measure_exits(arguments: Namespace, folder: str, length: int) -> list[list[dict]]:
    """Before and after tuning, on the whole backbone."""
    from decoding_ways import restore

    files = [f"{folder}/{name}.nemo" for name in ("start", "end")]
    held_out = arguments.validation, arguments.sequences, length
    return [held_out_quality(restore(arguments.model, file, "32", 0), *held_out) for file in files]


def page(rows: Sequence[dict]) -> tuple[dict, Any]:
    """What the template needs, and the plot."""
    rows = sorted(rows, key=lambda row: list(RECIPES).index(row["case"]["recipe"]))
    names = list(rows[0]["ways"][""])
    digits = {name: {"loss": 2, "s": 0}.get(name.split(", ")[1], 3) for name in names}
    tuned = [(row, name) for row in rows for name in names if name.endswith("tuned")]
    points = [(row["case"]["recipe"], name, row["ways"][""][name]) for row, name in tuned]
    values = {**rows[0]["about case"], "table": table(rows, columns(digits), case="recipe", way=None)}
    return values, plot(points, "agreement with the final exit")


if __name__ == "__main__":
    main("exit_recipes")
