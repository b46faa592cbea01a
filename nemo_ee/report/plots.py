# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The plots of a report, each a function from the report to a figure."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nemo_ee.report.schema import CurvePoint, Interval, Report, Spread, ThresholdResult
from nemo_ee.report.style import (
    FINAL_LINE_COLOUR,
    MARKERS,
    final_name,
    label,
    layer_colours,
    layer_name,
    new_figure,
    text_colour,
)

_POINTS, _VECTORS = "#0072b2", "#d55e00"


def per_exit_loss(report: Report) -> Figure:
    """Bars of the held-out loss per exit with 95 % intervals; the final exit last."""
    final = report.metadata.num_layers
    colours = layer_colours(report.layers, final)
    rows = [(f"exit {each.layer}", colours[each.layer], each.loss, each.loss_ci) for each in report.exits]
    last = final_name(final).replace(" (", "\n(")
    rows.append((last, colours[final], report.final_loss, report.final_loss_ci))
    figure, (axes,) = new_figure(1, width=max(5.0, 1.0 * len(rows) + 2.5))
    top = max(interval.high if interval else loss for _, _, loss, interval in rows)
    for position, (_, colour, loss, interval) in enumerate(rows):
        axes.bar(position, loss, width=0.65, color=colour)
        axes.errorbar(position, loss, yerr=_bars(loss, interval), color="black", capsize=5, linewidth=1.5)
        above = (interval.high if interval else loss) + 0.02 * top
        axes.text(position, above, f"{loss:.2f}", ha="center", va="bottom", fontsize=11)
    axes.set_xticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_xlim(-0.7, len(rows) - 0.3)
    axes.set_ylim(0.0, 1.12 * top)
    axes.grid(False, axis="x")
    label(axes, "Held-out loss per exit (bars: 95 % interval)", "", "cross-entropy, nats per token")
    return figure


def loss_curves(report: Report) -> Figure | None:
    """Held-out loss and, if logged, agreement of each exit over tuning; None without a tuning curve."""
    curve = report.tuning_curve
    if not curve:
        return None
    final = report.metadata.num_layers
    early = sorted({point.layer for point in curve if point.layer is not None})
    colours = layer_colours(early, final)
    in_tokens = all(point.tokens is not None for point in curve)
    x = "tuning tokens (thousands)" if in_tokens else "optimizer steps"
    agreements = [point for point in curve if point.layer is not None and point.agreement is not None]
    figure, axes = new_figure(2 if agreements else 1)
    label(axes[0], "Held-out loss while tuning", x, "cross-entropy, nats per token")
    for marker, layer in zip(MARKERS * len(early), early, strict=False):
        look: dict[str, Any] = {"color": colours[layer], "marker": marker, "markersize": 5, "linewidth": 1.8}
        points = [point for point in curve if point.layer == layer]
        losses = [point.loss for point in points]
        axes[0].plot(_progress(points, in_tokens), losses, label=f"exit {layer}", **look)
        if agreements:
            points = [point for point in agreements if point.layer == layer]
            axes[1].plot(_progress(points, in_tokens), [point.agreement or 0.0 for point in points], **look)
    if agreements:
        label(axes[1], "Agreement while tuning", x, "share equal to the final exit's argmax")
        axes[1].set_ylim(0.0, min(1.0, 1.15 * max(point.agreement or 0.0 for point in agreements)) or 1.0)
    points = [point for point in curve if point.layer is None]
    if points:
        # Tuning leaves the final exit alone, so one line over the whole width says it all.
        look = {"color": FINAL_LINE_COLOUR, "linestyle": "--", "linewidth": 2.0}
        axes[0].axhline(points[-1].loss, label=final_name(final), **look)
    legend_below(figure, axes[0])
    return figure


def speed_vs_agreement(report: Report) -> Figure | None:
    """Speed against agreement and against perplexity, a point per threshold, of another look where it is one per exit;
    None without thresholds."""
    if not report.thresholds:
        return None
    figure, (left, right) = new_figure(2, height=4.8)
    for axes, values, intervals in (
        (
            left,
            [result.agreement for result in report.thresholds],
            [r.agreement_ci for r in report.thresholds],
        ),
        (right, [result.perplexity for result in report.thresholds], [None] * len(report.thresholds)),
    ):
        speeds = [result.speedup for result in report.thresholds]
        line = [
            (s.median, v)
            for r, s, v in zip(report.thresholds, speeds, values, strict=True)
            if r.is_one_number
        ]
        axes.plot(*zip(*line, strict=True), color="#b0c4d8", linewidth=1.2, zorder=1) if line else None
        for result, value, interval in zip(report.thresholds, values, intervals, strict=True):
            axes.errorbar(
                result.speedup.median,
                value,
                xerr=_quartile_bars(result.speedup),
                yerr=_bars(value, interval),
                fmt="o" if result.is_one_number else "D",
                color=_POINTS if result.is_one_number else _VECTORS,
                markersize=7,
                capsize=3,
                linewidth=1.2,
            )
        axes.axvline(1.0, color=FINAL_LINE_COLOUR, linestyle=":", linewidth=1.5, label="speed of full depth")
        axes.margins(x=0.14, y=0.16)
        _name_thresholds(axes, report.thresholds, values, above=axes is left)
    depth = sorted(result.full_depth_perplexity for result in report.thresholds)[len(report.thresholds) // 2]
    right.axhline(
        depth, color=FINAL_LINE_COLOUR, linestyle="--", linewidth=1.5, label="perplexity of full depth's text"
    )
    x = "tokens/s relative to full depth (bars: quartiles)"
    label(left, "Agreement with full depth", x, "share of equal tokens (bars: 95 % interval)")
    label(right, "Full model's perplexity of the text", x, "perplexity")
    legend_below(figure, right)
    return figure


def exit_histogram(report: Report) -> Figure | None:
    """Stacked shares of tokens per exit, one bar per threshold; None without thresholds."""
    if not report.thresholds:
        return None
    final = report.metadata.num_layers
    layers = sorted({layer for result in report.thresholds for layer in result.share_per_exit} | {final})
    colours = layer_colours(report.layers, final)
    figure, (axes,) = new_figure(1, width=max(5.5, 0.8 * len(report.thresholds) + 3.5))
    for position, result in enumerate(report.thresholds):
        bottom = 0.0
        for layer in layers:
            share = 100.0 * result.share_per_exit.get(layer, 0.0)
            axes.bar(position, share, bottom=bottom, width=0.7, color=colours[layer], edgecolor="white")
            if share >= 6.0:
                shade = text_colour(colours[layer])
                axes.text(position, bottom + share / 2, f"{share:.0f}", ha="center", va="center", color=shade)
            bottom += share
    names = [layer_name(layer, final, [each.layer for each in report.exits]) for layer in layers]
    handles = [
        axes.bar([0], [0], color=colours[n], label=name) for n, name in zip(layers, names, strict=True)
    ]
    axes.set_xticks(
        range(len(report.thresholds)), [result.name.replace(" (", "\n(") for result in report.thresholds]
    )
    axes.set_xlim(-0.6, len(report.thresholds) - 0.4)
    axes.set_ylim(0.0, 100.0)
    axes.grid(False, axis="x")
    label(axes, "Where tokens leave", "confidence threshold", "share of generated tokens, %")
    figure.legend(handles=handles[::-1], loc="outside right center", fontsize=11, frameon=False)
    return figure


PLOTS: dict[str, Callable[[Report], Figure | None]] = {
    "per_exit_loss.png": per_exit_loss,
    "loss_curves.png": loss_curves,
    "speed_vs_agreement.png": speed_vs_agreement,
    "exit_histogram.png": exit_histogram,
}


def _progress(points: Sequence[CurvePoint], in_tokens: bool) -> list[float]:
    return [(point.tokens or 0) / 1000.0 if in_tokens else float(point.step) for point in points]


def _bars(value: float, interval: Interval | None) -> list[list[float]] | None:
    return None if interval is None else [[max(0.0, value - interval.low)], [max(0.0, interval.high - value)]]


def _quartile_bars(value: Spread) -> list[list[float]]:
    return [[max(0.0, value.median - value.q25)], [max(0.0, value.q75 - value.median)]]


def _name_thresholds(
    axes: Axes, results: Sequence[ThresholdResult], values: Sequence[float], above: bool
) -> None:
    """Writes each threshold to the right of its point; points that nearly coincide share one label."""
    x_range, y_range = (high - low or 1.0 for low, high in (axes.get_xlim(), axes.get_ylim()))
    groups: list[list[int]] = []
    for index, (result, value) in enumerate(zip(results, values, strict=True)):
        for group in groups:
            x, y = results[group[0]].speedup.median, values[group[0]]
            if abs(result.speedup.median - x) < 0.06 * x_range and abs(value - y) < 0.05 * y_range:
                group.append(index)
                break
        else:
            groups.append([index])
    for group in groups:
        axes.annotate(
            ", ".join(results[index].name for index in group),
            (results[group[0]].speedup.median, values[group[0]]),
            xytext=(7, 7 if above else -16),
            textcoords="offset points",
            fontsize=11,
        )


def legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(handles), 7), fontsize=11, frameon=False
    )
