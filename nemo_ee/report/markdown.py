# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The report as a Markdown page: tables that stand on their own, then the plots."""

from nemo_ee.report.schema import ExitQuality, Interval, Report, Spread, ThresholdResult

CAPTIONS = {
    "per_exit_loss.png": "Held-out loss per exit, with 95 % intervals",
    "loss_curves.png": "Loss and agreement per exit while tuning",
    "speed_vs_agreement.png": "What each threshold gains and costs",
    "exit_histogram.png": "Where tokens leave",
    "sample_text.png": "Generated text, coloured by exit layer",
}


def to_markdown(report: Report, images: tuple[str, ...] = ()) -> str:
    """Renders the report.

    Args:
        report: the measurements.
        images: names of plots that lie beside the page, each a key of ``CAPTIONS``.
    """
    sections = [f"# Early-exit report: {_escape(report.metadata.model)}", _metadata(report), _exits(report)]
    if report.thresholds:
        sections += [_thresholds(report), _shares(report)]
    sections += [f"## {CAPTIONS[name]}\n\n![{CAPTIONS[name]}]({name})" for name in images]
    return "\n\n".join(sections) + "\n"


def _metadata(report: Report) -> str:
    about = report.metadata
    rows = [
        ("model", f"{about.model} ({about.num_layers} layers)"),
        ("adapter", about.adapter or "none, the exits are part of the model"),
        ("device", about.device),
        ("torch, dtype", f"{about.torch_version}, {about.dtype}"),
        ("seed", str(about.seed)),
        ("commit", about.commit),
        ("date", about.date),
        ("command", f"`{about.command}`"),
    ]
    return table(["", "value"], [[name, value] for name, value in rows], numbers=False)


EXIT_COLUMNS = [
    "exit layer",
    "loss, nats/token",
    "agreement with final exit",
    "strict",
    "mean confidence",
    "tokens",
]


def _exits(report: Report) -> str:
    rows = [_exit_row(quality) for quality in report.exits]
    tokens = f"{report.exits[0].tokens:,}" if report.exits else ""
    final = _with_interval(report.final_loss, report.final_loss_ci, 3)
    rows.append([f"{report.metadata.num_layers} (final)", final, "1", "1", "", tokens])
    note = (
        "Brackets: 95 % confidence interval, bootstrap over sequences. Strict: positions where a shortlist's "
        "bucket is most probable count as disagreement. The loss of a shortlist exit counts its bucket's "
        "probability for tokens off the shortlist."
    )
    return (
        "## Held-out text\n\nEvery token at one exit, teacher-forced. "
        + note
        + "\n\n"
        + table(EXIT_COLUMNS, rows)
    )


def _exit_row(quality: ExitQuality) -> list[str]:
    return [
        str(quality.layer),
        _with_interval(quality.loss, quality.loss_ci, 3),
        _with_interval(quality.agreement, quality.agreement_ci, 3),
        "" if quality.strict_agreement is None else f"{quality.strict_agreement:.3f}",
        f"{quality.mean_confidence:.3f}",
        f"{quality.tokens:,}",
    ]


def _thresholds(report: Report) -> str:
    header = [
        "threshold",
        "agreement with full depth",
        "perplexity (full depth's)",
        "tokens/s",
        "full depth, tokens/s",
        "speed-up",
        "tokens",
    ]
    note = (
        "Agreement is teacher-forced on full depth's continuation. Perplexity is the full model's, of the "
        "text generated at the threshold. Speeds are medians with quartiles, measured alternately in one run."
    )
    rows = [_threshold_row(result) for result in report.thresholds]
    after = f"Greedy texts after {report.prompts}. " if report.prompts else ""
    page = f"## Generation\n\n{after}{note}\n\n" + table(header, rows)
    if report.exits_on_own_text:
        own = [_exit_row(quality) for quality in report.exits_on_own_text]
        page += "\n\nEvery token of full depth's texts at one exit:\n\n" + table(EXIT_COLUMNS, own)
    return page


def _threshold_row(result: ThresholdResult) -> list[str]:
    return [
        f"{result.threshold:g}",
        _with_interval(result.agreement, result.agreement_ci, 3),
        f"{result.perplexity:.2f} ({result.full_depth_perplexity:.2f})",
        _with_quartiles(result.tokens_per_second, 1),
        _with_quartiles(result.full_depth_tokens_per_second, 1),
        _with_quartiles(result.speedup, 2),
        f"{result.tokens:,}",
    ]


def _shares(report: Report) -> str:
    layers = report.layers
    final = report.metadata.num_layers
    header = ["threshold", *(f"{layer} (final)" if layer == final else f"exit {layer}" for layer in layers)]
    rows = [
        [
            f"{result.threshold:g}",
            *(f"{100 * result.share_per_exit.get(layer, 0.0):.1f} %" for layer in layers),
        ]
        for result in report.thresholds
    ]
    return "## Share of tokens per exit\n\n" + table(header, rows)


def table(header: list[str], rows: list[list[str]], numbers: bool = True) -> str:
    rule = ["---:" if numbers else "---"] * len(header)
    lines = [header, rule, *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _with_interval(value: float, interval: Interval | None, digits: int) -> str:
    if interval is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _with_quartiles(value: Spread, digits: int) -> str:
    return f"{value.median:.{digits}f} ({value.q25:.{digits}f} to {value.q75:.{digits}f})"
