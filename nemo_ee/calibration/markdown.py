# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A calibration in words: its guarantee, a summary for the terminal, and a Markdown page."""

from collections.abc import Mapping

from nemo_ee.calibration.schema import CalibrationReport, ExitReliability, PathRecord
from nemo_ee.report.page import page, provenance, table, with_interval

SHOWN_POINTS = 20
"""Rows of the table of the path, at most; the JSON file has all of it."""


def guarantee(target: float, delta: float, seq_length: int, documents: int) -> str:
    """What certified thresholds promise, and on which assumptions.

    Args:
        target: agreement.
        delta: probability of an unlucky choice of test documents.
        seq_length: predicted tokens per document at most.
        documents: that tested it.
    """
    return (
        f"With a probability of at least {_percent(1 - delta)} over the choice of the {documents:,} test documents, "
        f"the agreement with the final exit is at least {target:g}: of all tokens of further documents, up to the "
        f"first {seq_length} predicted ones of each, a share of at most {1 - target:.4g} in the long run differs "
        "from the token that the full model would emit. It holds exactly for this number of documents, however "
        "their tokens depend on each other, if (1) test documents and further documents are independent draws "
        "from one source, by which neither the model nor its exits were trained or chosen; (2) choices are "
        "greedy, in the precision and by the confidence of this calibration, with an exact KV policy and no "
        "max_pending; (3) each is made after the text itself (teacher-forced), not after text that was generated "
        "with early exits. It is about this one calibration: k that were planned beforehand all keep their "
        f"targets with a probability of at least 1 - k x {delta:g}; one that was planned after results on the "
        "same documents were seen promises nothing."
    )


def no_guarantee(target: float, delta: float) -> str:
    """What is stored where nothing could be certified, and why."""
    return (
        f"No thresholds could be certified for an agreement of {target:g} at delta={delta:g}: no point of "
        "the path passed its test. The stored thresholds are 1.0: no token leaves early, so that every token is "
        "the final exit's. Tune the exits further, or try a lower target_agreement or more documents: others than "
        "these, as what was seen of them must not choose what is tested on them."
    )


def summary(report: CalibrationReport) -> str:
    """For the terminal."""
    lines = [
        f"exit {layer}: threshold {threshold:g}"
        for layer, threshold in zip(report.layers, report.thresholds, strict=True)
    ]
    if report.chosen is not None:
        lines.append(
            f"measured on the {report.test.documents:,} test documents: {_measured(report, report.chosen)}"
        )
    return "\n".join([*lines, report.guarantee])


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
        _reliability(report.reliability),
    ]
    return page(sections, images)


def _verdict(report: CalibrationReport) -> str:
    rows = [
        [str(layer), f"{threshold:g}"]
        for layer, threshold in zip(report.layers, report.thresholds, strict=True)
    ]
    text = table(["exit layer", "threshold"], rows)
    if report.chosen is None:
        return f"{text}\n\n**{report.guarantee}**"
    return (
        f"{text}\n\n{report.guarantee}\n\nMeasured on the test documents: {_measured(report, report.chosen)}. These "
        "numbers are estimates and promise nothing; they are slightly too good, as the same documents chose the "
        "point. Layers are those that run before a token is emitted. What a token leaves out is caught up on "
        "together with a later token, so this is about latency rather than about arithmetic."
    )


def _measured(report: CalibrationReport, point: PathRecord) -> str:
    early = 1.0 - point.share_per_exit[report.metadata.num_layers]
    return (
        f"agreement {with_interval(point.agreement, report.agreement_ci, 4)}, {_percent(early)} of tokens leave "
        f"early, {point.mean_layers:.1f} of {report.metadata.num_layers} layers on average"
    )


def _setting(report: CalibrationReport) -> str:
    about = report.metadata
    rows = [
        ["model", f"{about.model} ({about.num_layers} layers)"],
        ["exits", about.adapter or "part of the model"],
        ["confidence", report.confidence_rule],
        ["target agreement, delta", f"{report.target_agreement:g}, {report.delta:g}"],
        [
            "text that drew the path",
            f"{report.tuning.documents:,} documents, {report.tuning.tokens:,} tokens",
        ],
        ["text that tested it", f"{report.test.documents:,} documents, {report.test.tokens:,} tokens"],
        *provenance(about),
    ]
    return table(["", "value"], rows, numbers=False)


def _path(report: CalibrationReport) -> str:
    final = report.metadata.num_layers
    header = ["point", *(f"threshold {n}" for n in report.layers), "p", "agreement", "lower bound"]
    header += [*(f"leave at {n}" for n in report.layers), "layers"]
    rows = []
    for number in _shown(len(report.path), report.certified):
        point = report.path[number - 1]
        rows.append(
            [
                f"{number} (chosen)" if number == report.certified else str(number),
                *(f"{threshold:g}" for threshold in point.thresholds),
                f"{point.p_value:.2g}",
                f"{point.agreement:.4f}",
                f"{point.agreement_bound:.4f}",
                *(_percent(point.share_per_exit[layer]) for layer in report.layers),
                f"{point.mean_layers:.1f}",
            ]
        )
    note = (
        f"{len(report.path)} points from strict to lenient, drawn on the tuning documents and tested in this order "
        f"up to the first whose p-value exceeds {report.delta:g}: {report.certified} are certified. The rows are "
        f"some of them, measured on the test documents; {final} layers are full depth. The lower bound is for "
        "each point taken alone."
    )
    return "## The path of thresholds\n\n" + note + "\n\n" + table(header, rows)


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


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
