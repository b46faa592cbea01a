# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Generated text with every token coloured by the exit it left at, as HTML and as a picture."""

import html
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Patch, Rectangle

from nemo_ee.report.schema import Report, Sample
from nemo_ee.report.style import layer_colours, layer_name, text_colour

_COLUMNS = 92
_MAX_LINES = 45
_LINE_INCHES = 0.235
_DPI = 150
_CHARACTER_INCHES = 13 / _DPI
"""A whole number of pixels: hinting rounds a character's advance to one, and boxes must keep in step."""
_FONT_POINTS = 72.0 * _CHARACTER_INCHES / 0.602
"""DejaVu Sans Mono advances 0.602 em per character."""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Generated text by exit layer</title>
<style>
body {{ font: 16px/1.9 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
pre {{ font: 15px/1.9 monospace; white-space: pre-wrap; }}
span {{ padding: 2px 0; border-right: 1px solid white; }}
.key span {{ padding: 2px 8px; margin-right: 8px; }}
</style>
</head>
<body>
<h1>Generated text by exit layer</h1>
<p class="key">{key}</p>
{samples}
</body>
</html>
"""


def sample_html(report: Report) -> str:
    """All samples of the report; the exit and the confidence of a token show when the pointer rests on it."""
    final = report.metadata.num_layers
    colours, names = layer_colours(report.layers, final), _names(report)
    key = "".join(f"<span {_colour_style(colours[n])}>{names[n]}</span>" for n in report.layers)
    samples = "\n".join(_sample_html(sample, colours, names) for sample in report.samples)
    return _PAGE.format(key=key, samples=samples)


def _names(report: Report) -> dict[int, str]:
    exits = [each.layer for each in report.exits]
    return {layer: layer_name(layer, report.metadata.num_layers, exits) for layer in report.layers}


def _sample_html(sample: Sample, colours: dict[int, str], names: dict[int, str]) -> str:
    spans = []
    for token, layer, confidence in zip(sample.tokens, sample.exit_layers, sample.confidences, strict=True):
        title = f"{names[layer]}, confidence {confidence:.3f}"
        spans.append(f'<span {_colour_style(colours[layer])} title="{title}">{html.escape(token)}</span>')
    heading = f"<h2>threshold {html.escape(sample.threshold)}</h2>"
    return f"{heading}\n<pre>{html.escape(sample.prompt)}</pre>\n<pre>{''.join(spans)}</pre>"


def _colour_style(colour: str) -> str:
    return f'style="background:{colour};color:{text_colour(colour)}"'


def sample_figure(report: Report) -> Figure | None:
    """The samples as a picture, as many lines as fit; None without samples."""
    if not report.samples:
        return None
    final = report.metadata.num_layers
    colours = layer_colours(report.layers, final)
    rows = [row for sample in report.samples for row in _layout(sample)]
    cut = len(rows) > _MAX_LINES
    rows = rows[:_MAX_LINES]
    if cut:
        rows.append([("(the rest is in sample_text.html)", None)])
    width, height = _COLUMNS * _CHARACTER_INCHES + 0.5, (len(rows) + 3.0) * _LINE_INCHES
    figure = Figure(figsize=(width, height), dpi=_DPI)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(-2.0, width / _CHARACTER_INCHES - 2.0)
    axes.set_ylim(len(rows) + 0.5, -2.5)
    axes.axis("off")
    for line, row in enumerate(rows):
        column = 0
        for text, layer in row:
            if layer is not None:
                box = Rectangle((column, line + 0.06), len(text), 0.88, color=colours[layer], linewidth=0)
                axes.add_patch(box)
                axes.plot([column + len(text)] * 2, [line + 0.06, line + 0.94], color="white", linewidth=0.8)
            axes.text(
                column,
                line + 0.5,
                text,
                fontfamily="DejaVu Sans Mono",
                fontsize=_FONT_POINTS,
                color="black" if layer is None else text_colour(colours[layer]),
                va="center_baseline",
                parse_math=False,
            )
            column += len(text)
    handles = [Patch(color=colours[layer], label=name) for layer, name in _names(report).items()]
    axes.legend(handles=handles, loc="upper left", ncols=min(len(handles), 8), fontsize=11, frameon=False)
    return figure


def _layout(sample: Sample) -> Iterator[list[tuple[str, int | None]]]:
    """Lines of at most _COLUMNS characters, each a list of text and exit layer; uncoloured text has none."""
    yield [(f"threshold {sample.threshold}", None)]
    yield from _wrap([(f"prompt: {sample.prompt}", None)])
    yield from _wrap(list(zip(sample.tokens, sample.exit_layers, strict=True)))
    yield []


def _wrap(pieces: Sequence[tuple[str, int | None]]) -> Iterator[list[tuple[str, int | None]]]:
    row: list[tuple[str, int | None]] = []
    column = 0
    for text, layer in pieces:
        # A line break is shown, so that a token that is nothing else still has its colour.
        for index, part in enumerate(text.replace("\r", "").replace("\n", "\u21b5\n").split("\n")):
            if index:
                yield row
                row, column = [], 0
            part = _drawable(part)
            if len(part) <= _COLUMNS < column + len(part):
                yield row
                row, column = [], 0
            while column + len(part) > _COLUMNS:
                cut = part.rfind(" ", 0, _COLUMNS - column) + 1 if layer is None else 0
                cut = cut or _COLUMNS - column
                yield [*row, (part[:cut], layer)]
                part, row, column = part[cut:], [], 0
            if part:
                row.append((part, layer))
                column += len(part)
    if row:
        yield row


def _drawable(text: str) -> str:
    """Replaces what the plot's font lacks by a box; the HTML page shows it."""
    font = _mono_font()
    return "".join(c if font.get_char_index(ord(c)) else "\u25a1" for c in text.replace("\t", "    "))


def _mono_font() -> FT2Font:
    return FT2Font(findfont(FontProperties(family="DejaVu Sans Mono")))
