# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A pre-training run with exits beside one without, read back from their directories, as a Markdown page."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_ee.checkpoint import archive
from nemo_ee.errors import DataError
from nemo_ee.report.page import page, table, with_quartiles
from nemo_ee.report.schema import CurvePoint, Spread
from nemo_ee.report.statistics import spread
from nemo_ee.report.step_times import read_step_times
from nemo_ee.report.tuning_curve import read_tuning_curve

LOSS_WEIGHTS = "early_exit.training.loss_weights"
MAY_DIFFER = (LOSS_WEIGHTS, "tokenizer", "nemo_version", "target")
"""Dotted keys: what the comparison is about, and what a checkpoint writes down about itself."""
CAPTIONS = {
    "final_exit.png": "The final exit, with and without exits below it",
    "exits.png": "Every exit of the run with exits",
}


@dataclass(frozen=True)
class PretrainingRun:
    """One finished run.

    Attributes:
        directory: that `exp_manager` made.
        config: the `model` section that it was trained with, plain containers.
        curve: its validations, in ascending order of step, the final exit last.
        step_time: seconds per step, over the steps whose time was logged.
    """

    directory: Path
    config: Mapping[str, Any]
    curve: tuple[CurvePoint, ...]
    step_time: Spread

    @property
    def num_layers(self) -> int:
        """Of the model; the final exit reads the last one."""
        return self.config["num_layers"]

    @property
    def layers(self) -> tuple[int, ...]:
        """Exit layers, ascending, the final one not among them."""
        return tuple(self.config["early_exit"]["layers"])

    @property
    def tokens_per_step(self) -> int:
        """Of all processes."""
        return self.config["global_batch_size"] * self.config["encoder_seq_length"]

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps done at each validation, ascending; logs number them from 0."""
        return tuple(point.step + 1 for point in self.curve if point.layer is None)

    def losses(self, layer: int | None) -> tuple[float, ...]:
        """Validation losses [nats per token] of an exit, None for the final one, as `steps`."""
        return tuple(point.loss for point in self.curve if point.layer == layer)

    def agreements(self, layer: int) -> tuple[float, ...]:
        """Shares of tokens at which an exit agrees with the final one, as `steps`; nan where not logged."""
        points = (point for point in self.curve if point.layer == layer)
        return tuple(math.nan if point.agreement is None else point.agreement for point in points)

    def last(self, layer: int | None) -> CurvePoint:
        """An exit's last validation."""
        return [point for point in self.curve if point.layer == layer][-1]


@dataclass(frozen=True)
class Comparison:
    """Two runs that differ in the weights of the exits' losses alone.

    Attributes:
        with_exits: trained with them.
        plain: all weights 0, which trains the backbone as if it had no exits.
    """

    with_exits: PretrainingRun
    plain: PretrainingRun

    @property
    def differences(self) -> tuple[float, ...]:
        """Of the final exit's validation losses, with exits minus plain [nats per token], as `steps`."""
        pairs = zip(self.with_exits.losses(None), self.plain.losses(None), strict=True)
        return tuple(ours - theirs for ours, theirs in pairs)


def read_run(directory: str | Path, key: str) -> PretrainingRun:
    """Reads a finished run back.

    Args:
        directory: that `exp_manager` made: logs, and `checkpoints` with the `.nemo`.
        key: what the user sets to it.

    Raises:
        DataError: no `.nemo` or several, or no validations in the logs.
        CheckpointError: the `.nemo` is damaged.
    """
    found = sorted(Path(directory).glob("checkpoints/*.nemo"))
    if len(found) != 1:
        remedy = "give the directory of a run that has ended"
        raise DataError(f"{key}={directory}: must hold one checkpoints/NAME.nemo, has {len(found)}; {remedy}")
    config = OmegaConf.to_container(archive.read_config(found[0]))
    assert isinstance(config, dict)
    curve = read_tuning_curve(directory, key)
    if not any(point.layer is None for point in curve):
        remedy = "train with trainer.val_check_interval smaller than trainer.max_steps"
        raise DataError(f"{key}={directory}: must have logged validations; {remedy}")
    return PretrainingRun(Path(directory), config, curve, spread(read_step_times(directory, key)))


def compare(with_exits: PretrainingRun, plain: PretrainingRun) -> Comparison:
    """Puts two runs beside each other.

    Raises:
        DataError: they differ in more than the exits' loss weights, or were not validated in the same steps.
    """
    weights = plain.config["early_exit"]["training"].get("loss_weights")
    if not weights or any(weights):
        raise DataError(
            f"plain={plain.directory}: must have been trained with model.{LOSS_WEIGHTS} all 0, not {weights}"
        )
    ours, theirs = _flat(with_exits.config), _flat(plain.config)
    other = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    if other:
        shown = ", ".join(f"model.{name} ({ours.get(name)} and {theirs.get(name)})" for name in other[:5])
        raise DataError(f"plain={plain.directory}: must differ in model.{LOSS_WEIGHTS} alone, not in {shown}")
    if with_exits.steps != plain.steps:
        raise DataError(
            f"plain={plain.directory}: must have been validated in the same steps, not {plain.steps} beside "
            f"{with_exits.steps}; train both with the same trainer.max_steps and trainer.val_check_interval"
        )
    return Comparison(with_exits, plain)


def _flat(values: Mapping, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values, without those that may differ."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in MAY_DIFFER:
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def to_markdown(
    comparison: Comparison, measured_on: Mapping[str, str], images: tuple[str, ...] = tuple(CAPTIONS)
) -> str:
    """The page.

    Args:
        comparison: what it is about.
        measured_on: device, commit and so on, name to text.
        images: names of plots that lie beside the page, each a key of `CAPTIONS`.
    """
    sections = [
        "# Pre-training with early exits",
        _setting(comparison, measured_on),
        _verdict(comparison),
        _final_exit(comparison),
        _exits(comparison),
    ]
    return page(sections, {name: CAPTIONS[name] for name in images})


def _setting(comparison: Comparison, measured_on: Mapping[str, str]) -> str:
    run, plain = comparison.with_exits, comparison.plain
    config = run.config
    weights = config["early_exit"]["training"].get("loss_weights")
    shape = (
        f"{run.num_layers} layers, hidden size {config['hidden_size']}, {config['num_attention_heads']} heads"
    )
    rows = [
        ["model", f"{shape}, sequences of {config['encoder_seq_length']} tokens"],
        ["exits", f"after layers {', '.join(map(str, run.layers))}"],
        ["loss weights", "layer / number of layers" if weights is None else ", ".join(map(str, weights))],
        [
            "training",
            f"{run.steps[-1]:,} steps of {run.tokens_per_step:,} tokens each run, seed {config['seed']}",
        ],
        ["seconds per step, with exits", f"{with_quartiles(run.step_time, 2)}, median and quartiles"],
        ["seconds per step, plain", f"{with_quartiles(plain.step_time, 2)}, median and quartiles"],
        *([name, text] for name, text in measured_on.items()),
    ]
    return table(["", "value"], rows, numbers=False)


def _verdict(comparison: Comparison) -> str:
    ours, theirs = comparison.with_exits.last(None).loss, comparison.plain.last(None).loss
    difference = comparison.differences[-1]
    rounded = f"{abs(difference):.3f}"
    judged = f"{rounded} {'lower' if difference < 0 else 'higher'}" if float(rounded) else "the same"
    return (
        f"After {comparison.with_exits.steps[-1]:,} steps the final exit's validation loss is **{ours:.3f}** "
        f"nats per token with exits and **{theirs:.3f}** without: {judged} with exits.\n\n"
        "Both runs have the same seed, first weights, data order and validation text. The plain run has "
        f"`model.{LOSS_WEIGHTS}` all 0: its exits are not computed in training, so its backbone is trained "
        "as a GPT without exits is. There is one run of each; how much another seed would change is not "
        "measured."
    )


def _final_exit(comparison: Comparison) -> str:
    run, plain = comparison.with_exits, comparison.plain
    rows = [
        [f"{step:,}", f"{step * run.tokens_per_step:,}", f"{ours:.3f}", f"{theirs:.3f}", f"{difference:+.3f}"]
        for step, ours, theirs, difference in zip(
            run.steps, run.losses(None), plain.losses(None), comparison.differences, strict=True
        )
    ]
    header = ["steps", "tokens", "loss with exits", "loss, plain", "difference"]
    return "## The final exit's validation loss, nats per token\n\n" + table(header, rows)


def _exits(comparison: Comparison) -> str:
    run, plain = comparison.with_exits, comparison.plain
    rows = []
    for layer in (*run.layers, None):
        point, untrained = run.last(layer), plain.last(layer)
        rows.append(
            [
                f"{run.num_layers} (final)" if layer is None else str(layer),
                f"{point.loss:.3f}",
                f"{math.exp(point.loss):.1f}",
                "1" if layer is None else _share(point.agreement),
                _share(point.confidence),
                f"{untrained.loss:.3f}",
                "1" if layer is None else _share(untrained.agreement),
            ]
        )
    header = ["exit layer", "loss", "perplexity", "agreement with final exit", "mean confidence"]
    header += ["loss, plain", "agreement, plain"]
    note = (
        "At the last validation. Agreement is the share of tokens at which the exit's most probable token is "
        "the final exit's of the same model; confidence is the largest probability. The plain run's columns "
        "read the same layers with exits that were never trained."
    )
    return f"## Every exit\n\n{note}\n\n" + table(header, rows)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
