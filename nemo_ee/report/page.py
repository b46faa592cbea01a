# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What all Markdown pages are made of: tables, numbers with what surrounds them, pictures."""

from collections.abc import Iterable, Mapping, Sequence

from nemo_ee.report.schema import Interval, Metadata, Spread

LONGEST = 100
"""Characters of a cell that others of its column are padded for."""


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True, padded: bool = False
) -> str:
    """A table in Markdown.

    Args:
        header: names of the columns.
        rows: texts of their cells.
        numbers: whether cells are set to the right.
        padded: whether columns are in line in a terminal, too.
    """
    rule = ["---:" if numbers else "---"] * len(header)
    lines = [[*header], rule, *([escaped(cell) for cell in row] for row in rows)]
    widths = [0] * len(header)
    if padded:
        widths = [
            max(len(cell) for cell in column if len(cell) < LONGEST) for column in zip(*lines, strict=True)
        ]
    cells = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def escaped(text: str) -> str:
    """As a cell or a heading has it."""
    return text.replace("|", "\\|").replace("\n", " ")


def page(sections: Iterable[str], images: Mapping[str, str]) -> str:
    """Sections, and then plots that lie beside the page: file name -> caption."""
    plots = (f"## {caption}\n\n![{caption}]({name})" for name, caption in images.items())
    return "\n\n".join([*sections, *plots]) + "\n"


def provenance(about: Metadata) -> list[tuple[str, str]]:
    """Rows that say with what, when and how numbers were measured."""
    return [
        ("device", about.device),
        ("torch, dtype", f"{about.torch_version}, {about.dtype}"),
        ("seed", str(about.seed)),
        ("commit", about.commit),
        ("date", about.date),
        ("command", f"`{about.command}`"),
    ]


def with_interval(value: float, interval: Interval | None, digits: int) -> str:
    """A value with its confidence interval, if there is one."""
    if interval is None:
        return f"{value:,.{digits}f}"
    return f"{value:,.{digits}f} [{interval.low:,.{digits}f}, {interval.high:,.{digits}f}]"


def with_quartiles(value: Spread, digits: int) -> str:
    """A median with the quartiles around it."""
    return f"{value.median:,.{digits}f} ({value.q25:,.{digits}f} to {value.q75:,.{digits}f})"
