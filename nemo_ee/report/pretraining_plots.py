# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The plots of a comparison of two pre-training runs."""

from matplotlib.figure import Figure

from nemo_ee.report.plots import legend_below
from nemo_ee.report.pretraining import Comparison
from nemo_ee.report.style import FINAL_LINE_COLOUR, MARKERS, final_name, label, layer_colours, new_figure

WITH_EXITS, PLAIN = "#0072b2", "#d55e00"
"""Told apart with every common colour-vision deficiency; markers and dashes differ, too."""
STEPS, LOSS = "optimizer steps", "cross-entropy, nats per token"


def final_exit(comparison: Comparison) -> Figure:
    """Validation losses of both runs' final exits over steps, and their difference."""
    run, plain = comparison.with_exits, comparison.plain
    figure, (losses, difference) = new_figure(2)
    losses.plot(
        run.steps, run.losses(None), color=WITH_EXITS, marker="o", linewidth=2.0, label="trained with exits"
    )
    losses.plot(
        plain.steps,
        plain.losses(None),
        color=PLAIN,
        marker="s",
        markerfacecolor="white",
        linestyle="--",
        linewidth=2.0,
        label="plain, exit loss weights 0",
    )
    label(losses, "Validation loss of the final exit", STEPS, LOSS)
    difference.axhline(0.0, color=FINAL_LINE_COLOUR, linestyle=":", linewidth=1.5)
    difference.plot(run.steps, comparison.differences, color=WITH_EXITS, marker="o", linewidth=2.0)
    furthest = max(0.05, *(abs(value) for value in comparison.differences))
    difference.set_ylim(-1.2 * furthest, 1.2 * furthest)
    label(difference, "With exits minus plain (below 0: exits help)", STEPS, "difference, nats per token")
    legend_below(figure, losses)
    return figure


def exits(comparison: Comparison) -> Figure:
    """Validation loss of every exit of the run with exits over steps, and agreement with its final exit."""
    run = comparison.with_exits
    colours = layer_colours(run.layers, run.num_layers)
    figure, (losses, agreements) = new_figure(2)
    for marker, layer in zip(MARKERS * len(run.layers), run.layers, strict=False):
        look = dict(color=colours[layer], marker=marker, markersize=5, linewidth=1.8)
        losses.plot(run.steps, run.losses(layer), label=f"exit {layer}", **look)
        agreements.plot(run.steps, run.agreements(layer), **look)
    losses.plot(
        run.steps,
        run.losses(None),
        color=FINAL_LINE_COLOUR,
        linestyle="--",
        linewidth=2.0,
        label=final_name(run.num_layers),
    )
    label(losses, "Validation loss of every exit", STEPS, LOSS)
    label(agreements, "Agreement with the final exit", STEPS, "share of equal most probable tokens")
    agreements.set_ylim(0.0, 1.03)
    legend_below(figure, losses)
    return figure


PLOTS = {"final_exit.png": final_exit, "exits.png": exits}
