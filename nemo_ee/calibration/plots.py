# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The plots of a calibration, each a function from the report to a figure."""

from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nemo_ee.calibration.schema import CalibrationReport, ExitReliability
from nemo_ee.report.plots import legend_below
from nemo_ee.report.style import FINAL_LINE_COLOUR, label, layer_colours, layer_name, new_figure

MEASURED = "#0072b2"
PATH_STEPS = "point of the path, strict to lenient"


def path_agreement(report: CalibrationReport) -> Figure:
    """Agreement with its bound, and layers run, along the path."""
    steps = range(1, len(report.path) + 1)
    figure, (left, right) = new_figure(2)
    left.plot(steps, [point.agreement for point in report.path], color=MEASURED, label="measured")
    left.plot(
        steps,
        [point.agreement_bound for point in report.path],
        color=MEASURED,
        linestyle="--",
        label=f"lower bound, {1 - report.delta:.0%}".replace("%", " %"),
    )
    left.axhline(report.target_agreement, color="black", linewidth=1.2, linestyle=":", label="target")
    left.set_ylim(max(0.0, min(report.target_agreement, report.path[-1].agreement) - 0.05), 1.01)
    label(left, "Agreement with the final exit", PATH_STEPS, "share of equal tokens")
    right.plot(steps, [point.mean_layers for point in report.path], color=MEASURED)
    final = report.metadata.num_layers
    right.axhline(
        final, color=FINAL_LINE_COLOUR, linestyle="--", linewidth=1.5, label=layer_name(final, final)
    )
    right.set_ylim(0.0, 1.05 * final)
    label(right, "Layers before a token is emitted", PATH_STEPS, "mean over tokens (estimate)")
    for axes in (left, right):
        _mark_chosen(axes, report)
    if report.chosen is not None:
        right.plot(report.certified, report.chosen.mean_layers, "o", color="#d55e00", markersize=8)
        left.plot(report.certified, report.chosen.agreement, "o", color="#d55e00", markersize=8)
    _legend_of_both(figure, left, right)
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
    layers = [*report.layers, final]
    shares = [[100 * point.share_per_exit[layer] for point in report.path] for layer in layers]
    right.stackplot(
        steps, shares, colors=[colours[n] for n in layers], labels=[layer_name(n, final) for n in layers]
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
    name = layer_name(exit_.layer, report.metadata.num_layers).capitalize()
    label(left, f"{name}: ECE {exit_.ece:.3f}", "confidence", "agreement (bars: 95 % interval)")
    widths = [each.high - each.low for each in exit_.bins]
    total = sum(each.tokens for each in exit_.bins)
    shares = [100 * each.tokens / total for each in exit_.bins]
    right.bar(
        [each.low for each in exit_.bins], shares, widths, align="edge", color=colour, edgecolor="white"
    )
    right.set_xlim(0.0, 1.0)
    label(right, "How sure it is", "confidence", "share of tokens, %")
    for axes in (left, right):
        axes.axvline(
            threshold, color="#d55e00", linewidth=1.5, linestyle="--", label=f"threshold {threshold:g}"
        )
    legend_below(figure, left)
    return figure


def plots(report: CalibrationReport) -> dict[str, tuple[str, partial[Figure]]]:
    """File name -> caption and what draws it. A path without points has no plots."""
    drawn: dict[str, tuple[str, partial[Figure]]] = {}
    if report.path:
        drawn["path_agreement.png"] = ("Agreement and depth along the path", partial(path_agreement, report))
        drawn["path_exits.png"] = ("Thresholds and exits along the path", partial(path_exits, report))
    for exit_ in report.reliability:
        caption = f"Reliability of exit {exit_.layer}"
        drawn[f"reliability_exit_{exit_.layer}.png"] = (caption, partial(reliability, report, exit_))
    return drawn


def _mark_chosen(axes: Axes, report: CalibrationReport) -> None:
    if report.certified:
        axes.axvline(report.certified, color="#d55e00", linewidth=1.5, label="chosen")


def _legend_of_both(figure: Figure, left: Axes, right: Axes) -> None:
    handles: dict[str, object] = {}
    for axes in (left, right):
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=len(handles), fontsize=11, frameon=False
    )
