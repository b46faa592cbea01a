# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How well exits do after different recipes at equal tokens: initialisation, projection, objective.

    python scripts/benchmarks/exit_recipes.py --model model.nemo \\
        --train text_train --validation text_validation

Every recipe is `conf/megatron_gpt_ee_tuning.yaml` with a few keys changed, run through `Trainer.fit`: closed
form on 40,960 tokens where it is used, then 195 steps of 512 tokens. Only the backbone is run once for all:
what it computes for a text is kept in memory, so a recipe costs its exits alone. Quality is measured on
held-out documents with 95 % bootstrap intervals over sequences. Results are appended to
OUTPUT/exit_recipes.json recipe by recipe; started again, the script does those that are missing, then writes
OUTPUT/exit_recipes.md and .png. Texts to tune on are compared at equal minutes, by text_recipes.py.
"""

import argparse
import gc
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_ee.files.output import write_text
from nemo_ee.runtime.script import user_errors

CONF = str(Path(__file__).resolve().parents[2] / "conf")
TUNING = "model.early_exit.tuning"
HEAD = "model.early_exit.head"


@dataclass(frozen=True)
class Recipe:
    """What differs from conf/megatron_gpt_ee_tuning.yaml."""

    name: str
    changes: tuple[str, ...] = ()


RECIPES = (
    Recipe("default (ridge, 8k shortlist, KL + argmax)"),
    Recipe("init: copy", ("model.early_exit.init=copy",)),
    Recipe("init: random", ("model.early_exit.init=random",)),
    Recipe("projection: full (tied)", (f"{HEAD}.projection=tied",)),
    Recipe("projection: 4k shortlist", (f"{HEAD}.shortlist_size=4096",)),
    Recipe("projection: 16k shortlist", (f"{HEAD}.shortlist_size=16384",)),
    Recipe("objective: KL", (f"{TUNING}.kl_weight=1", f"{TUNING}.argmax_weight=0")),
    Recipe("objective: argmax", (f"{TUNING}.kl_weight=0", f"{TUNING}.argmax_weight=1")),
    Recipe("objective: CE", (f"{TUNING}.ce_weight=1", f"{TUNING}.kl_weight=0", f"{TUNING}.argmax_weight=0")),
    Recipe(
        "objective: CE, confidence-weighted",
        (
            f"{TUNING}.ce_weight=1",
            f"{TUNING}.kl_weight=0",
            f"{TUNING}.argmax_weight=0",
            f"{TUNING}.token_weighting=confidence",
        ),
    ),
    Recipe("objective: KL + argmax, confidence-weighted", (f"{TUNING}.token_weighting=confidence",)),
)
QUICK = ("model.early_exit.ridge.tokens=512", "trainer.max_steps=2", "model.optim.sched.warmup_steps=1")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="the base, a .nemo")
    parser.add_argument("--train", required=True, help="prefix of an indexed dataset")
    parser.add_argument("--validation", required=True, help="prefix of an indexed dataset of other documents")
    parser.add_argument("--layers", default="10,20", help="exit layers")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="directory")
    parser.add_argument("--only", help="run recipes whose name contains this")
    parser.add_argument("--sequences", type=int, default=96, help="held-out sequences")
    parser.add_argument("--set", nargs="*", default=[], help="changes to the configuration of every recipe")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few tokens, two recipes")
    return parser.parse_args()


def compose(arguments: argparse.Namespace, changes: tuple[str, ...]) -> Any:
    """The tuning script's configuration for one recipe."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    data = f"{{train:[{arguments.train}],validation:[{arguments.validation}],test:[{arguments.validation}]}}"
    common = (
        f"model.restore_from_path={arguments.model}",
        f"model.early_exit.layers=[{arguments.layers}]",
        f"model.data.data_prefix={data}",
        "trainer.max_steps=195",
        "trainer.val_check_interval=195",
        "trainer.limit_val_batches=1",
        "model.validate_at_start=false",
        "model.early_exit.ridge.tokens=40960",
        "exp_manager=null",
    )
    quick = ("trainer.val_check_interval=2", *QUICK) if arguments.quick else ()
    with initialize_config_dir(CONF, version_base=None):
        return hydra_compose("megatron_gpt_ee_tuning", [*common, *quick, *arguments.set, *changes])


def run_recipe(recipe: Recipe, cfg: Any, backbone: Any, held_out: Any) -> dict:
    """Tunes and measures one recipe; returns its row of the results."""
    from lightning.pytorch.callbacks import Callback

    from nemo_ee.models.megatron_gpt_ee_tuning_model import MegatronGPTEETuningModel
    from nemo_ee.models.trainer_builder import EarlyExitTrainerBuilder

    row: dict[str, Any] = {"name": recipe.name, "changes": list(recipe.changes)}

    class MeasureStart(Callback):
        def on_train_start(self, trainer, model):
            row["start"] = held_out.measure(model)
            self.begin = time.perf_counter()

        def on_train_batch_end(self, *_):
            row["tuning_seconds"] = time.perf_counter() - self.begin

    trainer = EarlyExitTrainerBuilder(cfg).create_trainer([MeasureStart()])
    model = MegatronGPTEETuningModel.restore_base(cfg, trainer)
    backbone.attach(model.gpt)
    trainer.fit(model)
    row["end"] = held_out.measure(model)
    row["tuned_tokens"] = cfg.trainer.max_steps * cfg.model.global_batch_size * cfg.model.data.seq_length
    row["fitted_tokens"] = cfg.model.early_exit.ridge.tokens if cfg.model.early_exit.init == "ridge" else 0
    row["precision"], row["seed"] = str(cfg.trainer.precision), cfg.model.seed
    return row


def append(path: Path, row: dict) -> list[dict]:
    """Adds a row to the results, replacing one of the same name; returns all."""
    rows = [each for each in load(path) if each["name"] != row["name"]] + [row]
    write_text(path, json.dumps(rows, indent=1) + "\n")
    return rows


def load(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def main() -> None:
    arguments = parse_arguments()
    with user_errors():
        from cached_backbone import CachedBackbone, HeldOut
        from exit_costs import measure_costs
        from recipe_report import write_page

        from nemo_ee.evaluation import provenance

        about = {
            "command": provenance.command(),
            "commit": provenance.commit(),
            "device": provenance.device(),
        }
        path = arguments.output / "exit_recipes.json"
        recipes = RECIPES[:2] if arguments.quick else RECIPES
        wanted = [r for r in recipes if arguments.only is None or arguments.only in r.name]
        done = {row["name"] for row in load(path)}
        length = compose(arguments, ()).model.data.seq_length
        backbone, held_out = CachedBackbone(), HeldOut(arguments.validation, arguments.sequences, length)
        for recipe in wanted:
            if recipe.name in done:
                print(f"{recipe.name}: done already")
                continue
            load_before = provenance.load_average()
            row = run_recipe(recipe, compose(arguments, recipe.changes), backbone, held_out)
            append(path, {**row, **about, "date": provenance.date(), "load": load_before})
            gc.collect()
            ends = ", ".join(f"exit {q['layer']}: {q['agreement']:.3f}" for q in row["end"])
            print(f"{recipe.name}: agreement {ends}, {row['tuning_seconds']:.0f} s of tuning", flush=True)
        if "costs" not in done:
            costs = measure_costs(compose(arguments, ()), repeats=3 if arguments.quick else 15)
            append(
                path,
                {
                    "name": "costs",
                    "costs": [asdict(c) for c in costs],
                    **about,
                    "load": provenance.load_average(),
                    "date": provenance.date(),
                },
            )
        order = [r.name for r in RECIPES]
        print(write_page(load(path), order, arguments.output))


if __name__ == "__main__":
    main()
