# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The plots of a calibration, each a function from the report to a figure."""

from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nemo_ee.calibration.schema import CalibrationReport, ExitReliability
from nemo_ee.report.plots import legend_below
from nemo_ee.report.style import FINAL_LINE_COLOUR, label, layer_colours, layer_name, new_figure

MEASURED, CHOSEN = "#0072b2", "#d55e00"
PATH_STEPS = "point of the path, strict to lenient"


def frontier(report: CalibrationReport) -> Figure:
    """Agreement against the expected speed-up, point by point of the path; full depth is where both are 1."""
    speeds = [1.0, *(point.speedup for point in report.path)]
    figure, (axes,) = new_figure(1, width=8.0)
    measured = [1.0, *(point.agreement for point in report.path)]
    axes.plot(speeds, measured, color=MEASURED, marker=".", label="measured")
    if report.delta is not None:
        bounds = [1.0, *(point.agreement_bound or 0.0 for point in report.path)]
        name = f"lower bound, {1 - report.delta:.0%}".replace("%", " %")
        axes.plot(speeds, bounds, color=MEASURED, linestyle="--", label=name)
    axes.axhline(report.target_agreement, color="black", linewidth=1.2, linestyle=":", label="target")
    if report.chosen is not None:
        name = "chosen" if report.guaranteed else "chosen (point estimate, no guarantee)"
        axes.plot(report.chosen.speedup, report.chosen.agreement, "o", color=CHOSEN, markersize=9, label=name)
    axes.set_ylim(max(0.0, min(report.target_agreement, measured[-1]) - 0.05), 1.01)
    label(
        axes,
        "What exits can gain",
        "speed-up over full depth, by the prices of passes",
        "agreement with the final exit",
    )
    legend_below(figure, axes)
    return figure


def path_exits(report: CalibrationReport) -> Figure:
    """Thresholds, and where tokens leave, along the path."""
    steps, final = range(1, len(report.path) + 1), report.metadata.num_layers
    colours = layer_colours(report.layers, final)
    figure, (left, right) = new_figure(2)
    for number, layer in enumerate(report.layers):
        thresholds = [point.thresholds[number] for point in report.path]
        left.plot(steps, thresholds, color=colours[layer], linewidth=2.0, drawstyle="steps-post")
    left.set_ylim(0.0, 1.02)
    label(left, "Thresholds", PATH_STEPS, "leave above this confidence")
    layers = sorted({*report.layers, final})
    shares = [[100 * point.share_per_exit[layer] for point in report.path] for layer in layers]
    right.stackplot(
        steps,
        shares,
        colors=[colours[n] for n in layers],
        labels=[layer_name(n, final, report.layers) for n in layers],
    )
    right.set_ylim(0.0, 100.0)
    label(right, "Where tokens leave", PATH_STEPS, "share of tokens, % (estimate)")
    for axes in (left, right):
        axes.set_xlim(1, max(2, len(report.path)))
        _mark_chosen(axes, report)
    legend_below(figure, right)
    return figure


def reliability(report: CalibrationReport, exit_: ExitReliability) -> Figure:
    """One exit's agreement against its confidence, and how often it has which confidence."""
    colour = layer_colours(report.layers, report.metadata.num_layers)[exit_.layer]
    threshold = report.thresholds[report.layers.index(exit_.layer)]
    figure, (left, right) = new_figure(2)
    left.plot([0, 1], [0, 1], color=FINAL_LINE_COLOUR, linestyle=":", linewidth=1.5, label="calibrated")
    filled = [each for each in exit_.bins if each.tokens]
    x, y = [each.mean_confidence for each in filled], [each.agreement for each in filled]
    intervals = [each.agreement_ci for each in filled]
    below = [0.0 if ci is None else max(0.0, value - ci.low) for value, ci in zip(y, intervals, strict=True)]
    above = [0.0 if ci is None else max(0.0, ci.high - value) for value, ci in zip(y, intervals, strict=True)]
    left.errorbar(
        x, y, yerr=[below, above], color=colour, marker="o", capsize=4, linewidth=1.8, label="measured"
    )
    left.set_xlim(0.0, 1.0)
    left.set_ylim(0.0, 1.02)
    label(left, f"Exit {exit_.layer}: ECE {exit_.ece:.3f}", "confidence", "agreement (bars: 95 % interval)")
    widths = [each.high - each.low for each in exit_.bins]
    total = sum(each.tokens for each in exit_.bins)
    shares = [100 * each.tokens / total for each in exit_.bins]
    right.bar(
        [each.low for each in exit_.bins], shares, widths, align="edge", color=colour, edgecolor="white"
    )
    right.set_xlim(0.0, 1.0)
    label(right, "How sure it is", "confidence", "share of tokens, %")
    for axes in (left, right):
        axes.axvline(threshold, color=CHOSEN, linewidth=1.5, linestyle="--", label=f"threshold {threshold:g}")
    legend_below(figure, left)
    return figure


def plots(report: CalibrationReport) -> dict[str, tuple[str, partial[Figure]]]:
    """File name -> caption and what draws it. A path without points has no plots."""
    drawn: dict[str, tuple[str, partial[Figure]]] = {}
    if report.path:
        drawn["frontier.png"] = ("Agreement against speed-up", partial(frontier, report))
        drawn["path_exits.png"] = ("Thresholds and exits along the path", partial(path_exits, report))
    for exit_ in report.reliability:
        caption = f"Reliability of exit {exit_.layer}"
        drawn[f"reliability_exit_{exit_.layer}.png"] = (caption, partial(reliability, report, exit_))
    return drawn


def _mark_chosen(axes: Axes, report: CalibrationReport) -> None:
    if report.number:
        axes.axvline(report.number, color=CHOSEN, linewidth=1.5, label="chosen")
