# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One tuning step against the sum of its parts, timed in turn in one process.

    python scripts/benchmarks/tuning_step.py                                   # a small random model
    python scripts/benchmarks/tuning_step.py --model model.nemo --layers 10,20

The step is the whole of what `Trainer.fit` does per global batch: loading, `fwd_bwd_step`, clipping,
optimizer, logging. The parts, timed after each step on a batch like it, are the backbone's forward pass to
the depth that the objective needs, and the exits' forward and backward; with distillation the final exit's
logits count as a cost of the exits. Prints a table; `--output FILE` writes it too.
"""

import argparse
import gc
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from small_model import write_small_base, write_small_text

from nemo_ee.files.output import write_text
from nemo_ee.files.scratch import scratch_folder
from nemo_ee.runtime.script import user_errors

CONF = str(Path(__file__).resolve().parents[2] / "conf")
TUNING = "model.early_exit.tuning"
CASES = {
    "CE, backbone up to the last exit": (
        "model.early_exit.init=copy",
        f"{TUNING}.ce_weight=1",
        f"{TUNING}.kl_weight=0",
        f"{TUNING}.argmax_weight=0",
    ),
    "KL, full depth": (f"{TUNING}.kl_weight=1", f"{TUNING}.argmax_weight=0"),
    "default (KL + argmax), full depth": (),
}
LIMIT = 1.25


@dataclass
class Times:
    """Seconds per step, and of its parts on a batch like it; peaks in MiB."""

    step: list[float] = field(default_factory=list)
    backbone: list[float] = field(default_factory=list)
    exits: list[float] = field(default_factory=list)
    layers_built: int = 0
    peak_rss: float = 0.0
    peak_cuda: float | None = None

    def ratios(self) -> list[float]:
        return [s / (b + e) for s, b, e in zip(self.step, self.backbone, self.exits, strict=True)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="the base, a .nemo; without one, a small random model")
    parser.add_argument("--text", help="prefix of an indexed dataset; without one, random tokens")
    parser.add_argument("--layers", default="4,8", help="exit layers")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per case; 3 more warm up")
    parser.add_argument("--set", nargs="*", default=[], help="changes to the configuration of every case")
    parser.add_argument("--output", type=Path, help="where to write the page, Markdown")
    return parser.parse_args()


def compose(arguments: argparse.Namespace, model: str, text: str, changes: tuple[str, ...]) -> Any:
    """The tuning script's configuration for one case."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    common = (
        f"model.restore_from_path={model}",
        f"model.early_exit.layers=[{arguments.layers}]",
        f"model.data.data_prefix={{train:[{text}],validation:[{text}],test:[{text}]}}",
        f"trainer.max_steps={arguments.steps + 3}",
        f"trainer.val_check_interval={arguments.steps + 3}",
        "trainer.limit_val_batches=1",
        "model.validate_at_start=false",
        "model.optim.sched.warmup_steps=1",
        "model.early_exit.ridge.tokens=1024",
        "exp_manager=null",
    )
    with initialize_config_dir(CONF, version_base=None):
        return hydra_compose("megatron_gpt_ee_tuning", [*common, *arguments.set, *changes])


def time_case(cfg: Any, warm_up: int = 3) -> Times:
    """Runs one case through `Trainer.fit`."""
    from lightning.pytorch.callbacks import Callback
    from torch.utils.data import default_collate

    from nemo_ee.megatron.tuning_step import exit_step
    from nemo_ee.models.megatron_gpt_ee_tuning_model import MegatronGPTEETuningModel
    from nemo_ee.models.trainer_builder import EarlyExitTrainerBuilder

    times = Times()

    class Stopwatch(Callback):
        def on_train_batch_start(self, *_):
            synchronise()
            self.begin = time.perf_counter()

        def on_train_batch_end(self, trainer, model, _outputs, _batch, index):
            synchronise()
            step = time.perf_counter() - self.begin
            backbone, exits = time_parts(model, index)
            if index >= warm_up:
                times.step.append(step)
                times.backbone.append(backbone)
                times.exits.append(exits)

    def time_parts(model: Any, index: int) -> tuple[float, float]:
        size = model.cfg.micro_batch_size
        samples = [model._train_ds[(index * size + i) % len(model._train_ds)] for i in range(size)]
        batch = model.to_micro_batch(default_collate(samples))
        needs_final = model.wants_teacher
        found: dict[str, Any] = {}

        def backbone() -> None:
            with torch.no_grad():
                found["states"] = model.gpt.forward_states(
                    batch.tokens, batch.position_ids, batch.attention_mask, needs_final
                )

        def exits() -> None:
            states = found["states"]
            final = states.output if needs_final else None
            scale = 1.0 / batch.loss_mask.sum()
            exit_step(
                model.gpt,
                batch,
                states,
                final,
                model.teacher_projection,
                model.early_exit,
                scale,
                model.compute_dtype,
            )

        return seconds(backbone), seconds(exits)

    assert cfg.model.micro_batch_size == cfg.model.global_batch_size, "the parts are timed on one micro-batch"
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = EarlyExitTrainerBuilder(cfg).create_trainer([Stopwatch()])
    model = MegatronGPTEETuningModel.restore_base(cfg, trainer)
    trainer.fit(model)
    times.layers_built = model.gpt.config.num_layers
    times.peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    times.peak_cuda = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    return times


def seconds(work: Callable[[], None]) -> float:
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def page(cases: dict[str, Times], name: str, cfg: Any) -> str:
    """The results as Markdown."""
    from nemo_ee.evaluation import provenance
    from nemo_ee.report.statistics import spread

    def cell(values: list[float], factor: float = 1.0, digits: int = 0) -> str:
        s = spread([factor * value for value in values])
        return f"{s.median:.{digits}f} ({s.q25:.{digits}f} to {s.q75:.{digits}f})"

    names = ["case", "layers", "step, ms", "backbone, ms", "exits, ms", "step / parts", "peak RSS, MiB"]
    lines = ["| " + " | ".join([*names, "peak CUDA, MiB"]) + " |", "| --- |" + " ---: |" * 7]
    for case, times in cases.items():
        ratio = cell(times.ratios(), digits=2)
        cuda = "" if times.peak_cuda is None else f"{times.peak_cuda:.0f}"
        columns = [case, str(times.layers_built), cell(times.step, 1000), cell(times.backbone, 1000)]
        columns += [cell(times.exits, 1000), ratio, f"{times.peak_rss:.0f}", cuda]
        lines.append("| " + " | ".join(columns) + " |")
    tokens = cfg.model.micro_batch_size * cfg.model.data.seq_length
    steps = len(next(iter(cases.values())).step)
    table = "\n".join(lines)
    return f"""## {name}

`{provenance.command()}`

Commit {provenance.commit()}. {provenance.device()}, load average {provenance.load_average()} at the end.
{provenance.date()}. Precision {cfg.trainer.precision}, exits at {list(cfg.model.early_exit.layers)},
{tokens} tokens per step. Medians (quartiles) of {steps} steps; the ratio is taken step by step and must not
exceed {LIMIT}. Peak RSS is the process's high-water mark so far, cases from top to bottom; it includes
restoring the checkpoint.

{table}
"""


def main() -> None:
    arguments = parse_arguments()
    with user_errors(), scratch_folder("tuning_step") as scratch:
        model = arguments.model or write_small_base(scratch)
        text = arguments.text or write_small_text(scratch)
        cases = {}
        for case, changes in CASES.items():
            cfg = compose(arguments, str(model), str(text), changes)
            cases[case] = time_case(cfg)
            gc.collect()
        result = page(cases, Path(model).name if arguments.model else "small random model", cfg)
        print(result)
        if arguments.output:
            write_text(arguments.output, result)


if __name__ == "__main__":
    main()
