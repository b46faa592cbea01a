# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What an exit costs per token with each projection, in tuning and in decoding, timed alternately."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_ee.config import HeadConfig
from nemo_ee.core.confidence import summarise_rows
from nemo_ee.megatron.exit_init import initialise_projections
from nemo_ee.megatron.gpt import ExitHeads, StageStates
from nemo_ee.megatron.heads import ExitHead, exit_config
from nemo_ee.megatron.tuning_step import MicroBatch, exit_step
from nemo_ee.report.schema import Spread
from nemo_ee.report.statistics import spread

PROJECTIONS = {
    "full (tied)": {"projection": "tied"},
    "4k shortlist": {"shortlist_size": 4096},
    "8k shortlist": {"shortlist_size": 8192},
    "16k shortlist": {"shortlist_size": 16384},
}
TOKENS = 512


@dataclass(frozen=True)
class ExitCost:
    """Of one exit with one projection.

    Attributes:
        projection: which.
        tuning: forward and backward of one exit, the final exit's logits included, ms per token.
        decoding: the exit on one token: its modules, logits, confidence and most probable token, ms.
    """

    projection: str
    tuning: Spread
    decoding: Spread


def measure_costs(cfg: Any, repeats: int) -> list[ExitCost]:
    """Times the default head with every projection that fits the vocabulary.

    Args:
        cfg: of the tuning script.
        repeats: rounds; in each round every projection is timed once.
    """
    from nemo_ee.models.megatron_gpt_ee_tuning_model import MegatronGPTEETuningModel
    from nemo_ee.models.trainer_builder import EarlyExitTrainerBuilder

    trainer = EarlyExitTrainerBuilder(cfg).create_trainer()
    model = MegatronGPTEETuningModel.restore_base(cfg, trainer)
    gpt, config, default = model.gpt, model.gpt.config, model.early_exit
    length, batch = cfg.model.data.seq_length, max(1, TOKENS // cfg.model.data.seq_length)
    layer = default.layers[-1]
    hidden = torch.randn(length, batch, config.hidden_size, dtype=config.params_dtype)
    hidden = hidden.to(model.device_of_batches)
    states = StageStates(hidden, {layer: hidden}, None)
    tokens = torch.randint(model.true_vocab_size, (batch, length), device=hidden.device)
    text = MicroBatch(tokens, tokens, torch.ones_like(tokens, dtype=torch.float32), tokens)
    heads = {}
    for name, changes in PROJECTIONS.items():
        head = replace(default.head, **{"projection": "shortlist", **changes})
        if head.projection == "shortlist" and head.shortlist_size > model.true_vocab_size:
            continue
        gpt.exits = ExitHeads({str(layer): _build(head, layer, model)})
        initialise_projections(gpt, torch.arange(head.shortlist_size), None)
        heads[name] = gpt.exits
    times: dict[tuple[str, str], list[float]] = {(n, w): [] for n in heads for w in ("tuning", "decoding")}
    early_exit = replace(default, layers=(layer,), tuning=replace(default.tuning, loss_weights=None))
    for _ in range(repeats + 1):
        for name, exits in heads.items():
            gpt.exits = exits
            head = exits[str(layer)]

            def tune() -> None:
                exit_step(
                    gpt, text, states, hidden, model.teacher_projection, early_exit, 1e-3, model.compute_dtype
                )

            tune_time = _seconds(tune) / tokens.numel()
            times[name, "tuning"].append(1000 * tune_time)
            times[name, "decoding"].append(1000 * _decoding_seconds(head, gpt, hidden))
    return [
        ExitCost(name, spread(times[name, "tuning"][1:]), spread(times[name, "decoding"][1:]))
        for name in heads
    ]


def _build(head: HeadConfig, layer: int, model: Any) -> ExitHead:
    config = exit_config(model.gpt.config, torch.float32)
    return ExitHead(config, head, layer, model.true_vocab_size, model.padded_vocab_size, False).to(
        model.device_of_batches
    )


def _decoding_seconds(head: ExitHead, gpt: Any, hidden: torch.Tensor, calls: int = 20) -> float:
    """Mean over a few calls, fp32 weights, one token."""
    x = hidden[:1, :1].float()
    weight = gpt.output_weight().float()
    rows = head.projection.emittable_rows()

    def predict() -> None:
        for _ in range(calls):
            summarise_rows(head.projection.local_logits(head.readout(x)[:, 0], weight), rows)

    with torch.inference_mode():
        return _seconds(predict) / calls


def _seconds(work: Callable[[], None]) -> float:
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
