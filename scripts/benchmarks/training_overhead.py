# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What training exits along costs: a GPT's step with exits against the same step without.

    python scripts/benchmarks/training_overhead.py                           # all cases
    python scripts/benchmarks/training_overhead.py --cases pp4-minimal       # one

One model per case, stepped with exits and without in turn, through Megatron's own schedule: the same weights, the same
batches. `minimal` exits are a norm and a projection of their own, `mlp` exits have an MLP before them. Starts a process
per pipeline stage: gloo on a CPU, NCCL with a GPU per stage otherwise; cases that need more GPUs are left out.
"""

import gc
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from harness import main, run_ranks, seconds
from report import Column, columns, plot, ratio, table

CASES = {f"pp{p}-{head}": (p, head == "mlp") for p in (1, 2, 4) for head in ("minimal", "mlp")}
OPTIONS = {
    "cases": (list(CASES), ""),
    "steps": (8, "timed steps of either kind; one more warms up"),
    "precision": ("32", "of weights and activations", "32", "bf16"),
    "layers": (12, ""),
    "hidden": (512, ""),
    "vocabulary": (8192, ""),
    "sequence": (256, "tokens"),
    "exits": ([3, 6], "layers"),
    "micro_batch": (1, "sequences of a micro-batch"),
    "micro_batches": (8, "of a step"),
}
AXES, NEMO, PLAIN, EXITS = ("cases",), False, "without exits", "with exits"
CHUNK_TOKENS, MIB = 1024, 2**20
"""Tokens whose logits an exit holds at one time: the default of `model.early_exit.training`."""


def cases(arguments: Namespace) -> list[dict]:
    """Those that there are GPUs for, if there are any."""
    if unknown := set(arguments.cases) - set(CASES):
        raise SystemExit(f"error: --cases: {', '.join(sorted(unknown))}: unknown; use {', '.join(CASES)}")
    gpus = torch.cuda.device_count()
    return [{"case": name} for name in CASES if name in arguments.cases and not 0 < gpus < CASES[name][0]]


def flops_ratio(size: Namespace, mlp: bool) -> float:
    """FLOPs of matrix products and attention with exits over those without; a backward pass has twice a forward's."""
    layer = 24 * size.hidden**2 + 2 * size.sequence * size.hidden
    projection = 2 * size.hidden * size.vocabulary
    head = projection + (16 * size.hidden**2 if mlp else 0)
    return 1 + len(size.exits) * head / (size.layers * layer + projection)


def measure(case: Mapping, arguments: Namespace) -> dict:
    """Measures one case; a step begins on all stages at one time and ends with the last one."""
    stages, mlp = CASES[case["case"]]
    threads = 1 if torch.cuda.is_available() else max(1, len(os.sched_getaffinity(0)) // stages)
    ranks, ways = run_ranks(measure_stage, stages, arguments, stages, mlp, threads), {}
    for kind in (PLAIN, EXITS):
        for part in ("schedule", "step"):
            times = zip(*(rank["times"][kind, part] for rank in ranks), strict=True)
            ways.setdefault(kind, {})[part] = [max(each) for each in times]
    ways[EXITS] |= {"FLOPs": flops_ratio(arguments, mlp), "processes": f"{stages} x {threads}"}
    memory = {f"stage {number}": rank["memory"] for number, rank in enumerate(ranks)}
    losses = {name: loss for rank in ranks for name, loss in rank["losses"].items()}
    return {"ways": ways, "memory": memory, "losses": {"": losses}}


def measure_stage(size: Namespace, stages: int, mlp: bool, threads: int) -> dict:
    """Steps the same weights with and without exits, in turn, in every rank of a pipeline. Returns times of the
    schedule, and with the optimizer's step, in seconds; memory, MiB; losses, nats per token."""
    from tests.support.memory_peak import memory_peak
    from tests.support.training_stage import training_stage

    torch.set_num_threads(threads)
    gpt, losses, times = training_stage(size, stages, mlp), {}, {}
    memory: dict[str, Any] = {"exits": ", ".join(map(str, gpt.exit_layers)) or "none"}

    def start() -> None:
        gpt.zero_grad(set_to_none=True)
        gc.collect()
        torch.distributed.barrier()

    for kind in (PLAIN, EXITS):  # also the warm-up
        start()
        memory[kind], found = memory_peak(lambda: run(gpt, size, kind, 0))  # noqa: B023
        losses |= {f"final, {kind}" if name == "final" else name: value for name, value in found.items()}
    exits = list(gpt.exits.parameters())
    gradients = sum(each.numel() * each.element_size() for each in exits) / MIB
    memory |= {"gradients": gradients, "beyond": memory[EXITS] - memory[PLAIN] - gradients}
    backbone = [p for n, p in gpt.named_parameters() if not n.startswith("exits.")]
    fused, parts = torch.cuda.is_available(), filter(None, (backbone, exits))
    optimizers = [torch.optim.AdamW(part, lr=1e-4, fused=fused) for part in parts]
    for pair in range(size.steps + 1):
        for kind in (PLAIN, EXITS) if pair % 2 == 0 else (EXITS, PLAIN):
            start()
            schedule = seconds(lambda: run(gpt, size, kind, pair))  # noqa: B023
            used = optimizers[: 1 if kind == PLAIN else 2]
            step = schedule + seconds(lambda: [each.step() for each in used])  # noqa: B023
            for part, took in (("schedule", schedule), ("step", step)) if pair else ():
                times.setdefault((kind, part), []).append(took)
    return {"times": times, "memory": memory, "losses": losses}


def run(gpt: Any, size: Namespace, kind: str, seed: int) -> dict[str, float]:
    """Forward and backward passes of a global batch of random tokens; nats per token, also of this stage's exits."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from nemo_ee.config import ExitObjective
    from nemo_ee.training.deferred_loss import ExitTargets
    from nemo_ee.training.exit_loss import Statistic

    device, found = next(gpt.parameters()).device, {}
    shape = (size.micro_batches, size.micro_batch, size.sequence + 1)
    ids = torch.randint(size.vocabulary, shape, generator=torch.Generator().manual_seed(seed)).to(device)
    objective = ExitObjective(loss_chunk_tokens=CHUNK_TOKENS)
    weights = {n: n / size.layers for n in size.exits}

    def record(result: Any) -> None:
        for n, stats in result.stats.items():
            found.setdefault(f"exit {n}", []).append(stats[Statistic.LOSS] / stats[Statistic.TOKENS])

    def loss(losses: torch.Tensor) -> tuple:
        mean = losses.float().mean()
        return mean, {"loss": mean.detach().clone()}

    def forward_step(batches: Iterator, model: Any) -> tuple:
        tokens = next(batches)
        inputs, labels, targets = tokens[:, :-1], tokens[:, 1:].contiguous(), None
        positions = torch.arange(inputs.shape[1], device=device).expand_as(inputs)
        if kind == EXITS:
            mask, scale = torch.ones(labels.shape, device=device), 1.0 / size.micro_batches
            targets = ExitTargets(labels, mask, weights, objective, lambda: scale, record)
        return model(inputs, positions, None, labels=labels, exit_targets=targets), loss

    how = {"seq_length": size.sequence, "micro_batch_size": size.micro_batch, "model": gpt}
    how |= {"forward_step_func": forward_step, "data_iterator": iter(ids)}
    if final := get_forward_backward_func()(num_microbatches=size.micro_batches, **how):
        found["final"] = [each["loss"] for each in final]
    return {name: float(sum(values) / len(values)) for name, values in found.items()}


def page(rows: Sequence[dict]) -> tuple[dict, Any]:
    """What the template needs, and the plot."""
    size, times = rows[0]["settings"], [Column("processes x threads", "processes")]
    for name, key in (("passes", "schedule"), ("step", "step")):
        times += [Column(f"{name}, s", key), Column(f"{name}, ratio", key, 3, PLAIN)]
    times.append(Column("FLOPs, ratio", "FLOPs", 3))
    memory = columns({"exits": 0, PLAIN: 1, EXITS: 1, "gradients": 1, "beyond": 1})
    losses = columns(dict.fromkeys(sorted({name for row in rows for name in row["losses"][""]}), 4))
    tokens, points = min(size["micro_batch"] * size["sequence"], CHUNK_TOKENS), []
    for name, ways in ((row["case"]["case"], row["ways"]) for row in rows):
        flops = dict.fromkeys(("value", "low", "high"), ways[EXITS]["FLOPs"])
        points += [(name, "measured", ratio(ways, EXITS, PLAIN, "schedule")), (name, "FLOPs", flops)]
    values = {"logits": 4 * tokens * size["vocabulary"] / MIB, "times": table(rows, times)}
    values["memory"] = table(rows, memory, "memory", way="stage")
    values["losses"] = table(rows, losses, "losses", way=None)
    return values, plot(points, "passes with exits over passes without", 1.0)


if __name__ == "__main__":
    main("training_overhead")
