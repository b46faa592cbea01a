# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One tuning step against the sum of its parts, timed in turn in one process.

    python scripts/benchmarks/tuning_step.py --output results                  # a small random model
    python scripts/benchmarks/tuning_step.py --model model.nemo --text data/train --layers 10,20

The step is the whole of what `Trainer.fit` does per global batch: loading, `fwd_bwd_step`, clipping, optimizer,
logging. The parts, timed after each step on a batch like it, are the backbone's forward pass to the depth that the
objective needs, and the exits' forward and backward; with distillation the final exit's logits count for the exits.
"""

import gc
import resource
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from harness import main, seconds, synchronise
from report import columns, table
from tuning_runs import CE, KL, fit, tuning

CASES = {
    "CE, backbone up to the last exit": ("model.early_exit.init=copy", *CE),
    "KL, full depth": KL,
    "default (KL + argmax), full depth": (),
}
OPTIONS = {
    "model": (None, "the base, a .nemo; without one, a small random model"),
    "text": (None, "prefix of an indexed dataset; without one, random tokens"),
    "layers": ("4,8", "of exits"),
    "steps": (20, "timed steps per case; 3 more warm up"),
    "set": ((), "changes to the configuration of every case"),
}
WARM_UP = 3


def cases(arguments: Namespace) -> list[dict]:
    """Objectives."""
    return [{"case": name} for name in CASES]


def measure(case: Mapping, arguments: Namespace) -> dict:
    """Runs one case through `Trainer.fit`."""
    from lightning.pytorch.callbacks import Callback
    from torch.utils.data import default_collate

    from nemo_ee.training.tuning_step import exit_step
    from tests.support.small_base import small_files

    times: dict[str, Any] = {key: [] for key in ("step, ms", "backbone, ms", "exits, ms", "step / parts")}

    class Stopwatch(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            synchronise()
            self.begin = time.perf_counter()

        def on_train_batch_end(
            self, trainer: Any, model: Any, _outputs: Any, _batch: Any, index: int
        ) -> None:
            synchronise()
            step, (backbone, exits) = time.perf_counter() - self.begin, parts(trainer, model, index)
            found = (1000 * step, 1000 * backbone, 1000 * exits, step / (backbone + exits))
            for key, value in zip(times, found if index >= WARM_UP else (), strict=False):
                times[key].append(value)

    def parts(trainer: Any, model: Any, index: int) -> tuple[float, float]:
        size, text = model.cfg.micro_batch_size, trainer.train_dataloader.dataset
        samples = [text[(index * size + i) % len(text)] for i in range(size)]
        batch, needs_final, found = model.to_micro_batch(default_collate(samples)), model.wants_teacher, []

        def backbone() -> None:
            with torch.no_grad():
                given = batch.tokens, batch.position_ids, batch.attention_mask, needs_final
                found.append(model.gpt.forward_states(*given))

        def exits() -> None:
            final = found[0].output if needs_final else None
            scale = 1.0 / batch.loss_mask.sum()
            exit_step(model.gpt, batch, found[0], final, scale, model.compute_dtype)

        return seconds(backbone), seconds(exits)

    given, steps = (arguments.model, arguments.text), arguments.steps + WARM_UP
    model, text = (
        given if all(given) else (mine or small for mine, small in zip(given, small_files(), strict=True))
    )
    common = ["trainer.limit_val_batches=0", "model.optim.sched.warmup_steps=1", f"trainer.max_steps={steps}"]
    common += ["model.early_exit.ridge.tokens=1024", *arguments.set, *CASES[case["case"]]]
    cfg, gpu = tuning(model, arguments.layers, common, text, text), torch.cuda.is_available()
    assert cfg.model.micro_batch_size == cfg.model.global_batch_size, "the parts are timed on one micro-batch"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    times["layers"] = fit(cfg, Stopwatch()).gpt.config.num_layers
    times["peak RSS, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    times["peak CUDA, MiB"] = torch.cuda.max_memory_allocated() / 2**20 if gpu else None
    gc.collect()
    tokens = cfg.model.micro_batch_size * cfg.model.data.seq_length
    return {"ways": {"": times}, "about case": {"precision": str(cfg.trainer.precision), "tokens": tokens}}


def page(rows: Sequence[dict]) -> tuple[dict, None]:
    """What the template needs; there is no plot."""
    digits = dict.fromkeys(("layers", "step, ms", "backbone, ms", "exits, ms", "step / parts"), 0)
    digits |= {"step / parts": 2, "peak RSS, MiB": 0, "peak CUDA, MiB": 0}
    base = rows[0]["settings"]["model"] or "A small random model"
    return {"base": base, **rows[0]["about case"], "table": table(rows, columns(digits), way=None)}, None


if __name__ == "__main__":
    main("tuning_step")
