# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How well exits do after different recipes at equal tokens: initialisation, projection, objective.

    python scripts/benchmarks/exit_recipes.py --model model.nemo --train text_train --validation text_validation

Every recipe is `conf/megatron_gpt_ee_tuning.yaml` with a few keys changed, run through `Trainer.fit`: closed form on
40,960 tokens where it is used, then 195 steps of 512 tokens. Quality is measured on held-out documents with 95 %
bootstrap intervals over sequences. Texts to tune on are compared at equal minutes, by text_recipes.py.
"""

import gc
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from harness import REQUIRED, main
from report import Column, plot, table
from tuning_runs import TUNING, fit, held_out_quality, tuning, with_interval

SHORTLIST = "model.early_exit.head.shortlist_size"
CE = (f"{TUNING}.ce_weight=1", f"{TUNING}.kl_weight=0", f"{TUNING}.argmax_weight=0")
WEIGHTED = f"{TUNING}.token_weighting=confidence"
RECIPES = {
    "default (ridge, 8k shortlist, KL + argmax)": (),
    "init: copy": ("model.early_exit.init=copy",),
    "init: random": ("model.early_exit.init=random",),
    "projection: full (tied)": ("model.early_exit.head.projection=tied",),
    "projection: 4k shortlist": (f"{SHORTLIST}=4096",),
    "projection: 16k shortlist": (f"{SHORTLIST}=16384",),
    "objective: KL": (f"{TUNING}.kl_weight=1", f"{TUNING}.argmax_weight=0"),
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
COMMON = (
    "trainer.max_steps=195",
    "trainer.val_check_interval=${trainer.max_steps}",
    "trainer.limit_val_batches=1",
)
COMMON += ("model.early_exit.ridge.tokens=40960",)


def cases(arguments: Namespace) -> list[dict]:
    """Recipes."""
    return [{"recipe": name} for name in RECIPES if arguments.only in name]


def measure(case: Mapping, arguments: Namespace) -> dict:
    """Tunes and measures one recipe."""
    from lightning.pytorch.callbacks import Callback

    changes = (*COMMON, *arguments.set, *RECIPES[case["recipe"]])
    cfg = tuning(arguments.model, arguments.layers, arguments.train, arguments.validation, changes)
    held_out = (arguments.validation, arguments.sequences, cfg.model.data.seq_length)
    found: dict[str, Any] = {}

    class Start(Callback):
        def on_train_start(self, trainer: Any, model: Any) -> None:
            found["start"] = held_out_quality(model, *held_out)
            self.begin = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            found["tuning, s"] = time.perf_counter() - self.begin

    model, way = fit(cfg, Start()), {}
    for start, end in zip(found["start"], held_out_quality(model, *held_out), strict=True):
        way[f"exit {end['layer']}, no steps"] = start["agreement"]
        way[f"exit {end['layer']}, tuned"] = with_interval(end)
        way |= {
            f"exit {end['layer']}, {key}": end[name]
            for key, name in (("strict", "strict_agreement"), ("loss", "loss"))
        }
    gc.collect()
    fitted = cfg.model.early_exit.ridge.tokens if cfg.model.early_exit.init == "ridge" else 0
    tokens = cfg.trainer.max_steps * cfg.model.global_batch_size * cfg.model.data.seq_length
    about = {
        "fitted": fitted,
        "tuned": tokens,
        "held_out": end["tokens"],
        "precision": str(cfg.trainer.precision),
    }
    return {
        "ways": {"": {**way, "tuning, s": found["tuning, s"]}},
        "about case": {**about, "seed": cfg.model.seed},
    }


def page(rows: Sequence[dict]) -> tuple[dict, Any]:
    """What the template needs, and the plot."""
    rows = sorted(rows, key=lambda row: list(RECIPES).index(row["case"]["recipe"]))
    names = [name for name in rows[0]["ways"][""] if name != "tuning, s"]
    columns = [Column(name, name, 2 if name.endswith("loss") else 3) for name in names]
    tables = table(rows, [*columns, Column("tuning, s", "tuning, s", 0)], case="recipe", way=None)
    tuned = [name for name in names if name.endswith("tuned")]
    points = [(row["case"]["recipe"], name, row["ways"][""][name]) for row in rows for name in tuned]
    values = {**rows[0]["about case"], "table": tables}
    return values, plot(points, "agreement with the final exit")


if __name__ == "__main__":
    main("exit_recipes")
