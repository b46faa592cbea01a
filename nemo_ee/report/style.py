# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One look for all plots, pages and terminals: the exits of a model have the same colours in each.

Figures are built without pyplot, so drawing changes no global state and needs no display.
"""

from collections.abc import Container, Iterable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

FINAL_COLOUR = "#c4c4c4"
"""Of areas that belong to the final exit: neutral, since nothing was saved there."""
FINAL_LINE_COLOUR = "#6e6e6e"
"""Of lines that belong to full depth."""
MARKERS = "osD^vPX*<>"
_DPI = 150


def layer_colours(layers: Iterable[int], final_layer: int) -> dict[int, str]:
    """A colour per layer, dark to light with depth.

    The viridis map is told apart with every common colour-vision deficiency, and in grey; its palest end is
    left out.

    Args:
        layers: exit layers, with or without the final one.
        final_layer: gets the neutral colour.
    """
    early = sorted(set(layers) - {final_layer})
    colours = (colour for colour, _ in shades(len(early)))
    return {**dict(zip(early, colours, strict=True)), final_layer: FINAL_COLOUR}


def shades(count: int) -> list[tuple[str, str]]:
    """So many colours from dark to light, and that of text on each."""
    viridis = matplotlib.colormaps["viridis"]
    found = [to_hex(viridis(0.15 + 0.6 * place / max(1, count - 1))) for place in range(count)]
    return [(colour, text_colour(colour)) for colour in found]


def text_colour(background: str) -> str:
    """Black or white, whichever is easier to read on a ``#rrggbb`` background (WCAG relative luminance)."""
    channels = [int(background[index : index + 2], 16) / 255.0 for index in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def layer_name(layer: int, final_layer: int, exits: Container[int] = ()) -> str:
    """How legends name the layer at which tokens left, of a model with these exits; see `final_name`."""
    if layer != final_layer:
        return f"exit {layer}"
    return f"layer {layer} (exit {layer} or final)" if layer in exits else final_name(layer)


def final_name(final_layer: int) -> str:
    """How legends name the final exit."""
    return f"layer {final_layer} (final)"


def new_figure(panels: int, width: float = 6.2, height: float = 4.4) -> tuple[Figure, Sequence[Axes]]:
    """A figure with panels side by side.

    Args:
        panels: how many.
        width: of one panel, in inches.
        height: in inches.
    """
    figure = Figure(figsize=(width * panels, height), dpi=_DPI, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for each in axes:
        each.grid(True, color="#dddddd", linewidth=0.8)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=11)
    return figure, axes


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Titles one panel and names both axes, with units."""
    axes.set_title(title, fontsize=13)
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
