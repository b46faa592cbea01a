# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A calibration in words: a summary for the terminal, and a Markdown page."""

from collections.abc import Mapping

from nemo_ee.calibration.promise import POINT_ESTIMATE, percent
from nemo_ee.calibration.schema import CalibrationReport, ExitReliability, PathRecord
from nemo_ee.decoding.leaving import is_asked
from nemo_ee.report.page import page, provenance, table, with_interval

SHOWN_POINTS = 20
"""Rows of the table of the path, at most; the JSON file has all of it."""


def summary(report: CalibrationReport) -> str:
    """For the terminal."""
    lines = [f"exit {layer}: threshold {_shown_threshold(each)}" for layer, each in _thresholds(report)]
    if report.chosen is not None:
        lines.append(f"measured on {_documents(report)}: {_measured(report, report.chosen)}")
    return "\n".join([*lines, report.promise])


def to_markdown(report: CalibrationReport, images: Mapping[str, str]) -> str:
    """The page.

    Args:
        report: what it is about.
        images: names of plots that lie beside the page, to their captions.
    """
    sections = [
        f"# Calibrated exit thresholds: {report.metadata.adapter or report.metadata.model}",
        _verdict(report),
        _setting(report),
        _path(report),
        _prices(report),
        _reliability(report.reliability),
    ]
    return page(sections, images)


def _thresholds(report: CalibrationReport) -> list[tuple[int, float]]:
    return list(zip(report.layers, report.thresholds, strict=True))


def _shown_threshold(threshold: float) -> str:
    return f"{threshold:g}" if is_asked(threshold) else "1 (not asked)"


def _documents(report: CalibrationReport) -> str:
    return f"the {report.test.documents:,} {'documents' if report.delta is None else 'test documents'}"


def _verdict(report: CalibrationReport) -> str:
    rows = [[str(layer), _shown_threshold(threshold)] for layer, threshold in _thresholds(report)]
    text = table(["exit layer", "threshold"], rows)
    if report.chosen is None:
        return f"{text}\n\n**{report.promise}**"
    return (
        f"{text}\n\n{report.promise}\n\nMeasured on {_documents(report)}: {_measured(report, report.chosen)}. These "
        "numbers are estimates and promise nothing; they are slightly too good, as the same documents chose the "
        "point. The speed-up is what the prices of passes make of where tokens leave, one text at a time."
    )


def _measured(report: CalibrationReport, point: PathRecord) -> str:
    early = 1.0 - point.share_per_exit[report.metadata.num_layers]
    return (
        f"agreement {with_interval(point.agreement, report.agreement_ci, 4)}, {percent(early)} of tokens leave "
        f"early, {point.mean_layers:.1f} of {report.metadata.num_layers} layers on average, an expected speed-up of "
        f"{point.speedup:.3f}"
    )


def _setting(report: CalibrationReport) -> str:
    about = report.metadata
    asked = f"{report.target_agreement:g}, {POINT_ESTIMATE[0].lower()}{POINT_ESTIMATE[1:]}"
    rows = [
        ["model", f"{about.model} ({about.num_layers} layers)"],
        ["exits", about.adapter or "part of the model"],
        ["confidence", report.confidence_rule],
        [
            "target agreement",
            asked if report.delta is None else f"{report.target_agreement:g}, delta {report.delta:g}",
        ],
        ["text", report.text],
    ]
    if report.delta is None:
        rows.append(["of it", f"{report.test.documents:,} documents, {report.test.tokens:,} tokens"])
    else:
        rows += [
            [
                "of it drew the path",
                f"{report.tuning.documents:,} documents, {report.tuning.tokens:,} tokens",
            ],
            ["of it tested the path", f"{report.test.documents:,} documents, {report.test.tokens:,} tokens"],
        ]
    return table(["", "value"], [*rows, *provenance(about)], numbers=False)


def _prices(report: CalibrationReport) -> str:
    prices = report.prices
    rows = [
        [f"all layers, {n} token{'s' if n > 1 else ''}", _milliseconds(each)]
        for n, each in prices.layers.items()
    ]
    rows += [[f"asking exit {n}", _milliseconds(each)] for n, each in prices.heads.items()]
    rows += [
        ["the output layer", _milliseconds(prices.output)],
        ["a token at full depth", _milliseconds(prices.full_depth)],
    ]
    return f"## Prices of passes\n\n{prices.source}.\n\n" + table(["pass", "ms"], rows)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3f}"


def _path(report: CalibrationReport) -> str:
    tested = report.delta is not None
    header = ["point", *(f"threshold {n}" for n in report.layers), "speed-up", "agreement"]
    header += ["at worst", "lower bound", "p"] * tested + [
        *(f"leave at {n}" for n in report.layers),
        "layers",
    ]
    rows = []
    for number in _shown(len(report.path), report.number):
        point = report.path[number - 1]
        tests = [
            f"{point.agreement_at_worst:.4f}",
            f"{point.agreement_bound or 0.0:.4f}",
            f"{point.p_value or 0.0:.2g}",
        ]
        rows.append(
            [
                f"{number} (chosen)" if number == report.number else str(number),
                *(f"{threshold:g}" for threshold in point.thresholds),
                f"{point.speedup:.3f}",
                f"{point.agreement:.4f}",
                *(tests if tested else []),
                *(percent(point.share_per_exit[layer]) for layer in report.layers),
                f"{point.mean_layers:.1f}",
            ]
        )
    if tested:
        how = (
            f"{len(report.path)} points from strict to lenient, drawn on the tuning documents and tested in this "
            f"order up to the first whose p-value exceeds {report.delta:g}: {report.kept} are certified, and the "
            "fastest of them is chosen. The rows are some of them, measured on the test documents. *At worst* counts "
            "a token as different if any exit would let another token go, so it holds whichever exits are asked; the "
            "lower bound is of that, for each point taken alone."
        )
    else:
        how = (
            f"{len(report.path)} points from strict to lenient, drawn and measured on all documents; the first "
            f"{report.kept} agree as often as is asked for, and the fastest of them is chosen. **Nothing is promised.**"
        )
    note = (
        f"For more and more disagreements, the thresholds that make a token fastest by the prices below. {how} A "
        "threshold of 1 leaves the exit out: it is not asked, and its head costs nothing."
    )
    return "## The frontier: agreement against speed-up\n\n" + note + "\n\n" + table(header, rows)


def _shown(points: int, chosen: int) -> list[int]:
    """Evenly spaced numbers from 1 to `points`, the chosen one and its neighbours among them."""
    count = min(points, SHOWN_POINTS - 3)
    spaced = {1 + (points - 1) * n // max(1, count - 1) for n in range(count)}
    return sorted(n for n in spaced | {chosen - 1, chosen, chosen + 1} if 1 <= n <= points)


def _reliability(exits: tuple[ExitReliability, ...]) -> str:
    rows = [
        [str(each.layer), f"{each.agreement:.3f}", f"{each.mean_confidence:.3f}", f"{each.ece:.3f}"]
        for each in exits
    ]
    note = (
        "Over all documents, every token at one exit. ECE is the expected calibration error: how far confidence "
        "is from the share of tokens that equal the final exit's, on average. The guarantee does not depend on it."
    )
    header = ["exit layer", "agreement", "mean confidence", "ECE"]
    return "## Reliability\n\n" + note + "\n\n" + table(header, rows)
