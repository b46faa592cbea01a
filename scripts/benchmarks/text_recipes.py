# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which text to tune exits on for chats: articles, or what the model itself answers; at equal time.

    python scripts/benchmarks/text_recipes.py --model smollm2.nemo --train wikipedia_train \\
        --validation wikipedia_validation --work work

Each recipe gets the same time for all that it needs: letting the model answer prompts, the closed form, and tuning.
Time is that of the processor (of all threads of the process), since a shared machine's clock measures its other users
as well; `--minutes` are those of two cores. Measured are the exits on full depth's own answers to prompts that were
not among the tuning prompts, and on held-out articles, in float32. Results are appended to OUTPUT/text_recipes.json
part by part; started again, the script does those that are missing, then writes OUTPUT/text_recipes.md and .png.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exit_recipes import CONF, append, load

from nemo_ee.files.output import write_text
from nemo_ee.runtime.script import user_errors

HERE = Path(__file__).resolve().parent
PROMPTS = HERE / "held_out_prompts.jsonl"
THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TIMING_STEPS = 11
CORES = 2
ARTICLES = "Wikipedia"
TOKENS_TO_GENERATE = 160
"""Of an answer that is tuned on, at most."""
LONGEST_ANSWER = 128
"""Tokens of an answer that is measured on, at most."""


@dataclass(frozen=True)
class TextRecipe:
    """What exits are tuned on.

    Attributes:
        name: of the recipe.
        prompts: that the model answers first; 0: tuned on articles.
        begins_on_articles: the closed form is that of articles.
    """

    name: str
    prompts: int = 0
    begins_on_articles: bool = False

    @property
    def mixed(self) -> bool:
        """Whether it uses both."""
        return self.begins_on_articles and self.prompts > 0

    def exits(self, part: str) -> str:
        """File of the exits after a part, `start` or `tuned`."""
        if part == "start" and self.mixed:
            return "start_0.nemo"
        return f"{part}_{self.prompts}{'_mixed' if self.mixed else ''}.nemo"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="the base, a .nemo with a chat template")
    parser.add_argument("--train", required=True, help="prefix of an indexed dataset of articles")
    parser.add_argument("--validation", required=True, help="prefix of an indexed dataset of other articles")
    parser.add_argument("--work", type=Path, required=True, help="directory of what the recipes write")
    parser.add_argument("--downloads", default="downloads", help="directory of the prompts' sources")
    parser.add_argument("--minutes", type=float, default=3.0, help="of two cores, for each recipe")
    parser.add_argument(
        "--prompts", type=int, nargs="*", default=[192], help="how many are answered, per recipe"
    )
    parser.add_argument("--layers", default="10,20", help="exit layers")
    parser.add_argument("--only", default="", help="run recipes whose name contains this")
    parser.add_argument("--sequences", type=int, default=48, help="held-out pieces of articles")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="directory")
    parser.add_argument("--set", nargs="*", default=[], help="changes to the configuration of tuning")
    parser.add_argument("--writing", nargs="*", default=[], help="changes to that of writing answers")
    return parser.parse_args()


def recipes_of(arguments: argparse.Namespace) -> list[TextRecipe]:
    recipes = [TextRecipe(ARTICLES, begins_on_articles=True)]
    for count in arguments.prompts:
        name = f"its own answers to {count} prompts"
        recipes += [
            TextRecipe(name, count),
            TextRecipe(f"closed form on {ARTICLES}, then {name}", count, True),
        ]
    return [recipe for recipe in recipes if arguments.only in recipe.name]


def write_answers(arguments: argparse.Namespace, recipe: TextRecipe) -> dict:
    """Lets the model answer; returns what that took and gave."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from nemo_ee.inference.prompt_file import read_prompt_file
    from nemo_ee.models.trainer_builder import EarlyExitTrainerBuilder
    from nemo_ee.tuning_text.generate import generate_tuning_text
    from nemo_ee.tuning_text.prompts import keys_of, read_prompts
    from nemo_ee.tuning_text.settings import TuningTextConfig

    overrides = [
        f"gpt_model_file={arguments.model}",
        f"output_prefix={arguments.work}/answers_{recipe.prompts}",
        f"prompts.directory={arguments.downloads}",
        f"prompts.exclude_file={PROMPTS}",
        f"prompts.count={recipe.prompts}",
        f"inference.tokens_to_generate={TOKENS_TO_GENERATE}",
        "validation_share=0",
        *arguments.writing,
    ]
    with initialize_config_dir(CONF, version_base=None):
        values = OmegaConf.to_container(compose("generate_tuning_text", overrides), resolve=True)
    trainer = values.pop("trainer")
    config = TuningTextConfig.from_dict({**values, "precision": trainer["precision"]})
    asked = keys_of(read_prompts(config.prompts, config.seed))
    assert not asked & keys_of(read_prompt_file(str(PROMPTS), "held out")), (
        "a held-out prompt would be tuned on"
    )
    built = EarlyExitTrainerBuilder(OmegaConf.create({"trainer": trainer, "model": {}})).create_trainer()
    began = time.process_time()
    done = generate_tuning_text(config, built).progress
    return {"seconds": time.process_time() - began, **asdict(done)}


def compose_tuning(arguments: argparse.Namespace, recipe: TextRecipe, *changes: str) -> Any:
    """The tuning script's configuration."""
    from hydra import compose, initialize_config_dir

    parts = ",".join(
        f"{split}:[{prefix}]"
        for split, prefix in (("train", arguments.train), ("validation", arguments.validation))
    )
    data = [f"model.data.data_prefix={{{parts},test:[{arguments.validation}]}}"]
    if recipe.prompts:  # three chats have about as many tokens as two pieces of articles
        file = f"{arguments.work}/answers_{recipe.prompts}_train.jsonl"
        data = ["model.data.chat=true", f"model.data.train_ds.file_names=[{file}]"]
        data += ["model.micro_batch_size=3", "model.global_batch_size=3"]
    common = [
        f"model.restore_from_path={arguments.model}",
        f"model.early_exit.layers=[{arguments.layers}]",
        "trainer.limit_val_batches=0",
        "model.validate_at_start=false",
        "exp_manager=null",
    ]
    with initialize_config_dir(CONF, version_base=None):
        return compose("megatron_gpt_ee_tuning", [*common, *data, *changes, *arguments.set])


def fit(cfg: Any, save_to: Path) -> dict:
    """One run of tuning; returns its processor seconds: before the first step, per step, and in all."""
    from lightning.pytorch.callbacks import Callback

    from nemo_ee.models.megatron_gpt_ee_tuning_model import MegatronGPTEETuningModel
    from nemo_ee.models.trainer_builder import EarlyExitTrainerBuilder

    class Clock(Callback):
        def on_train_start(self, *_):
            self.times = [time.process_time()]

        def on_train_batch_end(self, *_):
            self.times.append(time.process_time())

    clock = Clock()
    trainer = EarlyExitTrainerBuilder(cfg).create_trainer([clock])
    model = MegatronGPTEETuningModel.restore_base(cfg, trainer)
    began = time.process_time()
    trainer.fit(model)
    ended = time.process_time()
    model.save_adapters(str(save_to))
    steps = [late - early for early, late in zip(clock.times, clock.times[1:], strict=False)]
    return {
        "before": clock.times[0] - began,
        "per_step": statistics.mean(steps[len(steps) // 3 :]),
        "all": ended - began,
        "samples": cfg.trainer.max_steps * cfg.model.global_batch_size,
        "tokens_per_sample": model.tokens_per_sample,
    }


def start(arguments: argparse.Namespace, recipe: TextRecipe) -> dict:
    """The closed form, and the time of a step."""
    changes = [f"trainer.max_steps={TIMING_STEPS}", "model.optim.lr=0", "model.optim.sched.warmup_steps=1"]
    return fit(compose_tuning(arguments, recipe, *changes), arguments.work / recipe.exits("start"))


def tune(arguments: argparse.Namespace, recipe: TextRecipe, steps: int) -> dict:
    """As many steps as fit into what is left."""
    changes = [
        f"model.adapter_path={arguments.work}/{recipe.exits('start')}",
        f"trainer.max_steps={steps}",
    ]
    changes.append(f"model.optim.sched.warmup_steps={steps // 10 + 1}")
    cfg = compose_tuning(arguments, recipe, *changes)
    return {"steps": steps, **fit(cfg, arguments.work / recipe.exits("tuned"))}


def measure(arguments: argparse.Namespace, recipe: TextRecipe) -> dict:
    """The exits on full depth's own answers to the held-out prompts, and on held-out articles, in float32."""
    import torch
    from omegaconf import OmegaConf

    from nemo_ee.evaluation.held_out import held_out_sequences, measure_quality, quality_of
    from nemo_ee.evaluation.settings import SweepConfig
    from nemo_ee.evaluation.sweep import Sweep
    from nemo_ee.evaluation.teacher_forced import score_text
    from nemo_ee.inference.generate import generating
    from nemo_ee.inference.prompt_file import read_prompt_file
    from nemo_ee.inference.prompts import tokenize_prompts
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel
    from nemo_ee.models.trainer_builder import EarlyExitTrainerBuilder

    off = {"logger": False, "enable_checkpointing": False}
    settings = {"trainer": {"devices": 1, "num_nodes": 1, "precision": 32, **off}, "model": {}}
    trainer = EarlyExitTrainerBuilder(OmegaConf.create(settings)).create_trainer()
    exits = arguments.work / recipe.exits("tuned")
    overrides = OmegaConf.create({"precision": 32})
    model = MegatronGPTEarlyExitModel.restore_with_exits(
        arguments.model, str(exits), trainer, overrides
    ).eval()
    chats = read_prompt_file(str(PROMPTS), "held out")
    prompts = tokenize_prompts(chats, model.text_tokenizer, None, model.cfg.encoder_seq_length)
    options = SweepConfig(tokens_to_generate=LONGEST_ANSWER, thresholds=THRESHOLDS)
    sweep = Sweep(model, prompts, options, seed=0)
    texts = _answers(arguments.work / "held_out_answers.json", sweep, prompts)
    scores = sweep.score(texts)

    def score(tokens: Any, labels: Any) -> Any:
        with generating(model):
            return score_text(model.gpt, tokens, labels)

    articles = held_out_sequences(arguments.validation, arguments.sequences, 256, model.true_vocab_size)
    own = quality_of(((each, mask) for each, _, mask in scores), seed=0)
    agreeing = {
        n: [
            int(count)
            for each, _, mask in scores
            for count in ((each.exits[n].tokens == each.final.tokens) & mask).sum(1)
        ]
        for n in sweep.exits
    }
    return {
        "per_prompt": {
            "tokens": [int(count) for _, _, mask in scores for count in mask.sum(1)],
            "agreeing": {str(n): counts for n, counts in agreeing.items()},
        },
        "answers": [asdict(each) for each in own.exits],
        "articles": [asdict(each) for each in measure_quality(score, articles.split(4), seed=0).exits],
        "thresholds": [_at(sweep, threshold, scores, torch) for threshold in THRESHOLDS],
        "prompts": len(prompts),
        "ended": sum(len(text.tokens) < LONGEST_ANSWER for text in texts),
    }


def _answers(path: Path, sweep: Any, prompts: list[list[int]]) -> list:
    """Full depth's answers to the held-out prompts: the same for all recipes, and so written once."""
    from nemo_ee.evaluation.sweep import GeneratedText

    if not path.exists():
        sweep.model.prepare_decoding()
        batches = [prompts[first : first + 8] for first in range(0, len(prompts), 8)]
        found = [text for batch in batches for text in sweep.generate(batch, None)]
        write_text(path, json.dumps([asdict(text) for text in found]))
    return [GeneratedText(**each) for each in json.loads(path.read_text())]


def _at(sweep: Any, threshold: float, scores: list, torch: Any) -> dict:
    """Agreement on full depth's answers, the share of tokens that leave early, and the layers that they leave out."""
    agreement, interval = sweep.agreement(threshold, scores)
    early = layers = count = 0
    for each, _, mask in scores:
        _, left_at = each.leaving(dict.fromkeys(sweep.exits, threshold))
        left_at = torch.where(left_at == 0, sweep.final_layer, left_at)[mask]
        early += int((left_at < sweep.final_layer).sum())
        layers += int((sweep.final_layer - left_at).sum())
        count += left_at.numel()
    return {
        "threshold": threshold,
        "agreement": agreement,
        "agreement_ci": None if interval is None else asdict(interval),
        "early": early / count,
        "layers_left_out": layers / count / sweep.final_layer,
        "tokens": count,
    }


def _in_child(work: Callable, *arguments: Any) -> dict:
    """In a process of its own, of one thread: Megatron's batch sizes are a process's for good, and waiting threads
    would be counted as working."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_called, work, *arguments).result()


def _called(work: Callable, *arguments: Any) -> dict:
    import torch

    torch.set_num_threads(1)
    with user_errors():
        return work(*arguments)


def main() -> None:
    arguments = parse_arguments()
    with user_errors():
        from text_report import write_page

        from nemo_ee.evaluation import provenance

        about = {
            "command": provenance.command(),
            "commit": provenance.commit(),
            "device": provenance.device(),
            "minutes": arguments.minutes,
        }
        path = arguments.output / "text_recipes.json"
        arguments.work.mkdir(parents=True, exist_ok=True)
        for recipe in recipes_of(arguments):
            rows = {row["name"]: row for row in load(path)}
            row = rows.get(recipe.name, {"name": recipe.name, **about})
            left = arguments.minutes * 60 * CORES
            if recipe.mixed:
                own = rows[f"its own answers to {recipe.prompts} prompts"]
                row["written"] = own["written"]
                row["started"] = {**rows[ARTICLES]["started"], "per_step": own["started"]["per_step"]}
            if recipe.prompts:
                row = _part(row, "written", path, write_answers, arguments, recipe)
                left -= row["written"]["seconds"]
            row = _part(row, "started", path, start, arguments, recipe)
            # What the steps at a rate of 0 took is for measuring alone; a run of known speed has none.
            steps = max(2, round((left - row["started"]["before"]) / row["started"]["per_step"]))
            row = _part(row, "tuned", path, tune, arguments, recipe, steps)
            _part(row, "measured", path, measure, arguments, recipe)
        print(write_page(load(path), arguments.output))


def _part(row: dict, name: str, path: Path, work: Callable, *arguments: Any) -> dict:
    """A row with one part more, unless it has it already; the results are written after each."""
    from nemo_ee.evaluation import provenance

    if name not in row:
        began = time.perf_counter()
        found = _in_child(work, *arguments)
        row = {**row, name: {**found, "date": provenance.date(), "load": provenance.load_average()}}
        append(path, row)
        print(
            f"{row['name']}: {name} after {time.perf_counter() - began:.0f} s: {json.dumps(found)[:400]}",
            flush=True,
        )
    return row


if __name__ == "__main__":
    main()
