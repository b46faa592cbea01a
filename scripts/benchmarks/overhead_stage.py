# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What every process of training_overhead.py runs: one pipeline stage, stepped with and without exits."""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pipeline_costs import Size

PLAIN, EXITS = "plain", "exits"
STD = 0.02
CHUNK_TOKENS = 1024
"""Tokens whose logits an exit holds at one time: the default of `model.early_exit.training`."""


@dataclass(frozen=True)
class Job:
    """One case.

    Attributes:
        size: of the model and its batch.
        stages: P.
        mlp: whether exits have an MLP besides norm and projection.
        steps: timed steps of either kind.
        threads: of a process.
        bf16: weights and activations; else float32.
    """

    size: Size
    stages: int
    mlp: bool
    steps: int
    threads: int
    bf16: bool


@dataclass
class Found:
    """What one stage measured; seconds per step, in the order of steps; bytes.

    Attributes:
        schedule: kind of step -> forward and backward passes of the global batch.
        step: kind of step -> the same and the optimizer.
        peak: kind of step -> most memory of tensors at any time of the schedule beyond what was there before
            it: activations, gradients, temporaries; not weights and the optimizer's state.
        exit_gradients: bytes of the gradients of this stage's exits.
        exits: exit layers of this stage.
        losses: of the first weights on the first batch: the final exit's of either kind, and each exit's.
    """

    schedule: dict[str, list[float]] = field(default_factory=lambda: {PLAIN: [], EXITS: []})
    step: dict[str, list[float]] = field(default_factory=lambda: {PLAIN: [], EXITS: []})
    peak: dict[str, int] = field(default_factory=dict)
    exit_gradients: int = 0
    exits: tuple[int, ...] = ()
    losses: dict[str, float] = field(default_factory=dict)


def measure(job: Job) -> Found:
    """Steps the same weights with and without exits, in turn. In every rank of a pipeline."""
    torch.set_num_threads(job.threads)
    stage = _Stage(job)
    found = Found(exits=stage.gpt.exit_layers)
    found.exit_gradients = sum(p.numel() * p.element_size() for p in stage.gpt.exits.parameters())
    batch = stage.batch(0)
    for kind in (PLAIN, EXITS):  # also the warm-up
        found.losses |= stage.losses(kind, batch)
        found.peak[kind] = stage.peak(kind, batch)
    for pair in range(job.steps + 1):
        batch = stage.batch(pair)
        for kind in (PLAIN, EXITS) if pair % 2 == 0 else (EXITS, PLAIN):
            schedule, step = stage.timed(kind, batch)
            if pair:
                found.schedule[kind].append(schedule)
                found.step[kind].append(step)
    return found


class _Stage:
    """This process's stage: its module, its optimizers, Megatron's schedule."""

    def __init__(self, job: Job):
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.transformer.transformer_config import TransformerConfig

        from nemo_ee.config import EarlyExitConfig, HeadConfig, TuningConfig
        from nemo_ee.megatron.gpt import EarlyExitGPTModel

        self.job, size = job, job.size
        parallel_state.initialize_model_parallel(pipeline_model_parallel_size=job.stages)
        tensor_parallel.model_parallel_cuda_manual_seed(1234 + torch.distributed.get_rank())
        torch.manual_seed(1234 + torch.distributed.get_rank())
        self.device = torch.device("cuda", torch.cuda.current_device()) if _gpu() else torch.device("cpu")
        dtype = torch.bfloat16 if job.bf16 else torch.float32
        config = TransformerConfig(
            num_layers=size.layers,
            hidden_size=size.hidden,
            num_attention_heads=size.heads,
            ffn_hidden_size=4 * size.hidden,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            normalization="RMSNorm",
            add_bias_linear=False,
            init_method_std=STD,
            bf16=job.bf16,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            pipeline_model_parallel_size=job.stages,
            deallocate_pipeline_outputs=True,
            use_cpu_initialization=not _gpu(),
        )
        head = HeadConfig(mlp=job.mlp, norm=True, linear=False, projection="untied", train_projection=True)
        self.gpt = EarlyExitGPTModel(
            config,
            early_exit=EarlyExitConfig(layers=size.exits, head=head),
            padded_vocab_size=size.vocabulary,
            vocab_size=size.vocabulary,
            exits_dtype=dtype,
            trains_backbone=True,
            pre_exit=True,
            max_sequence_length=size.sequence,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            parallel_output=True,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
        ).to(self.device)
        for exit_head in self.gpt.exits.values():
            torch.nn.init.normal_(exit_head.projection.weight, std=STD)
        self.gpt.train()
        exits = list(self.gpt.exits.parameters())
        backbone = [p for n, p in self.gpt.named_parameters() if not n.startswith("exits.")]
        optimizer = partial(torch.optim.AdamW, lr=1e-4, fused=_gpu())
        self.optimizers = {PLAIN: [optimizer(backbone)]}
        self.optimizers[EXITS] = self.optimizers[PLAIN] + ([optimizer(exits)] if exits else [])
        self.objective = TuningConfig(
            ce_weight=1.0, kl_weight=0.0, argmax_weight=0.0, loss_chunk_tokens=CHUNK_TOKENS
        )
        self.weights = {n: n / size.layers for n in size.exits}
        self.schedule = get_forward_backward_func()
        self.recorded: dict[int, list[float]] = {n: [] for n in self.gpt.exit_layers}

    def batch(self, seed: int) -> list[torch.Tensor]:
        """Random tokens [B, S + 1] per micro-batch; the same on every stage."""
        size, generator = self.job.size, torch.Generator().manual_seed(seed)
        shape = (size.micro_batches, size.micro_batch, size.sequence + 1)
        return list(torch.randint(size.vocabulary, shape, generator=generator).to(self.device))

    def forward_step(self, kind: str, record: Callable, batches: Iterator, model: torch.nn.Module) -> tuple:
        """Megatron's forward step function."""
        from nemo_ee.megatron.deferred_loss import ExitTargets

        tokens = next(batches)
        inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
        positions = torch.arange(inputs.shape[1], device=self.device).expand_as(inputs)
        targets = None
        if kind == EXITS:
            mask = torch.ones(labels.shape, device=self.device)
            scale = 1.0 / self.job.size.micro_batches
            targets = ExitTargets(labels, mask, self.weights, self.objective, lambda: scale, record)
        output = model(inputs, positions, None, labels=labels, exit_targets=targets)
        return output, _mean

    def run(self, kind: str, batch: list, record: Callable) -> list:
        """Forward and backward passes of a global batch."""
        size = self.job.size
        return self.schedule(
            forward_step_func=partial(self.forward_step, kind, record),
            data_iterator=iter(batch),
            model=self.gpt,
            num_microbatches=size.micro_batches,
            seq_length=size.sequence,
            micro_batch_size=size.micro_batch,
        )

    def start(self) -> None:
        """Lets all stages begin a step at one time, without gradients."""
        self.gpt.zero_grad(set_to_none=True)
        gc.collect()
        _synchronise()
        torch.distributed.barrier()

    def losses(self, kind: str, batch: list) -> dict[str, float]:
        """Nats per token of the final exit (on the last stage) and of this stage's exits."""
        sums: dict[str, list[float]] = {}

        def record(result: Any) -> None:
            for n, stats in result.stats.items():
                sums.setdefault(f"exit {n}", []).append(float(stats[0] / result.tokens))

        self.start()
        final = [float(each["loss"]) for each in self.run(kind, batch, record)]
        if final:
            sums[f"final, {kind}"] = final
        return {name: sum(values) / len(values) for name, values in sums.items()}

    def peak(self, kind: str, batch: list) -> int:
        """Bytes, see `Found.peak`: what torch's allocator gave out, on a GPU and on a CPU."""
        self.start()
        if _gpu():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.run(kind, batch, _ignore)
            return torch.cuda.max_memory_allocated() - before
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
            self.run(kind, batch, _ignore)
        return _highest(recorded)

    def timed(self, kind: str, batch: list) -> tuple[float, float]:
        """Seconds of the schedule, and with the optimizer's step."""
        self.start()
        begin = time.perf_counter()
        self.run(kind, batch, _ignore)
        _synchronise()
        schedule = time.perf_counter() - begin
        for optimizer in self.optimizers[kind]:
            optimizer.step()
        _synchronise()
        return schedule, time.perf_counter() - begin


def _highest(recorded: Any) -> int:
    """The highest sum of the CPU allocator's allocations and releases in a profile.

    Memory from before the profile is not in it: its release is no event.
    """
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    highest = now = 0
    for _, change in changes:
        now += change
        highest = max(highest, now)
    return highest


def _mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict]:
    mean = losses.float().mean()
    return mean, {"loss": mean.detach().clone()}


def _ignore(_result: Any) -> None:
    """Statistics are not part of what is timed."""


def _gpu() -> bool:
    return torch.cuda.is_available()


def _synchronise() -> None:
    if _gpu():
        torch.cuda.synchronize()
