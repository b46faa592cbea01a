# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The report as a Markdown page: tables that stand on their own, then the plots."""

from nemo_ee.report.page import escaped, page, provenance, table, with_interval, with_quartiles
from nemo_ee.report.schema import ExitQuality, Report, ThresholdResult
from nemo_ee.report.style import layer_name

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
    sections = [
        f"# Early-exit report: {escaped(report.metadata.model)}",
        about(report),
        held_out_text(report),
    ]
    if report.thresholds:
        sections += [generation(report), _shares(report)]
    return page(sections, {name: CAPTIONS[name] for name in images})


def about(report: Report) -> str:
    """A table of where the numbers come from."""
    where = report.metadata
    rows = [
        ("model", f"{where.model} ({where.num_layers} layers)"),
        ("adapter", where.adapter or "none, the exits are part of the model"),
        *provenance(where),
    ]
    return table(["", "value"], rows, numbers=False)


EXIT_COLUMNS = [
    "exit layer",
    "loss, nats/token",
    "agreement with final exit",
    "strict",
    "mean confidence",
    "tokens",
]


def held_out_text(report: Report) -> str:
    """Every exit on text, teacher-forced."""
    rows = [_exit_row(quality) for quality in report.exits]
    tokens = f"{report.exits[0].tokens:,}" if report.exits else ""
    final = with_interval(report.final_loss, report.final_loss_ci, 3)
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
        with_interval(quality.loss, quality.loss_ci, 3),
        with_interval(quality.agreement, quality.agreement_ci, 3),
        "" if quality.strict_agreement is None else f"{quality.strict_agreement:.3f}",
        f"{quality.mean_confidence:.3f}",
        f"{quality.tokens:,}",
    ]


def generation(report: Report) -> str:
    """Every threshold's texts."""
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
        "text generated at the threshold. Speeds are medians with quartiles, measured alternately in one run, exits "
        "being asked for every token. Several thresholds are those of exits "
        f'{", ".join(str(exit_.layer) for exit_ in report.exits)}; one of 1 leaves its exit out. "Calibrated" ones '
        "are the checkpoint's."
    )
    rows = [_threshold_row(result) for result in report.thresholds]
    after = f"Greedy texts after {report.prompts}. " if report.prompts else ""
    section = f"## Generation\n\n{after}{note}\n\n" + table(header, rows)
    if report.exits_on_own_text:
        own = [_exit_row(quality) for quality in report.exits_on_own_text]
        section += "\n\nEvery token of full depth's texts at one exit:\n\n" + table(EXIT_COLUMNS, own)
    return section


def _threshold_row(result: ThresholdResult) -> list[str]:
    return [
        result.name,
        with_interval(result.agreement, result.agreement_ci, 3),
        f"{result.perplexity:.2f} ({result.full_depth_perplexity:.2f})",
        with_quartiles(result.tokens_per_second, 1),
        with_quartiles(result.full_depth_tokens_per_second, 1),
        with_quartiles(result.speedup, 2),
        f"{result.tokens:,}",
    ]


def _shares(report: Report) -> str:
    layers = report.layers
    final = report.metadata.num_layers
    exits = [each.layer for each in report.exits]
    header = ["threshold", *(layer_name(layer, final, exits) for layer in layers)]
    rows = [
        [
            result.name,
            *(f"{100 * result.share_per_exit.get(layer, 0.0):.1f} %" for layer in layers),
        ]
        for result in report.thresholds
    ]
    return "## Share of tokens per exit\n\n" + table(header, rows)
