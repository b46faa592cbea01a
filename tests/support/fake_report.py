# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A report with invented but plausible numbers, for tests of what is drawn and written from it; reports read back."""

from pathlib import Path

from pydantic import TypeAdapter

from nemo_ee.report.schema import (
    CurvePoint,
    ExitQuality,
    Interval,
    Metadata,
    Report,
    Sample,
    Spread,
    ThresholdResult,
)

LAYERS = (10, 20)
FINAL = 30


def read_report(path: Path) -> Report:
    """What a `report.json` says, every field checked by its type."""
    return TypeAdapter(Report).validate_json(path.read_bytes())


def _around(value: float, part: float) -> Spread:
    return Spread(value, value * (1 - part), value * (1 + part))


def fake_metadata() -> Metadata:
    return Metadata(
        model="SmolLM2-135M-Instruct",
        num_layers=FINAL,
        adapter="exits.nemo",
        commit="0123abc",
        device="CPU, 2 threads",
        torch_version="2.13.0",
        dtype="fp32",
        seed=1234,
        date="2026-01-02T03:04:05Z",
        command="python scripts/evaluate_early_exit.py a=1|2",
    )


def fake_exits(layers=LAYERS) -> tuple[ExitQuality, ...]:
    exits = []
    for layer in layers:
        loss, agreement = 6.2 - 0.11 * layer, 0.25 + 0.013 * layer
        exits.append(
            ExitQuality(
                layer=layer,
                loss=loss,
                agreement=agreement,
                mean_confidence=agreement - 0.05,
                tokens=20480,
                loss_ci=Interval(loss - 0.08, loss + 0.09),
                agreement_ci=Interval(agreement - 0.012, agreement + 0.011),
            )
        )
    return tuple(exits)


def fake_threshold(threshold: float, layers=LAYERS) -> ThresholdResult:
    leaving = (1.0 - threshold) ** 0.5
    shares = {layer: leaving / len(layers) for layer in layers}
    shares[FINAL] = 1.0 - sum(shares.values())
    return ThresholdResult(
        name=f"{threshold:g}",
        thresholds=(threshold,) * len(layers),
        tokens=2560,
        share_per_exit=shares,
        agreement=1.0 - 0.5 * leaving**2,
        perplexity=4.1 + 9.0 * leaving**2,
        full_depth_perplexity=4.1,
        tokens_per_second=_around(14.0 * (0.95 + 0.6 * leaving), 0.03),
        full_depth_tokens_per_second=_around(14.0, 0.02),
        speedup=_around(0.95 + 0.6 * leaving, 0.035),
        agreement_ci=Interval(0.98 - 0.5 * leaving**2, min(1.0, 1.015 - 0.5 * leaving**2)),
    )


def fake_curve(layers=LAYERS) -> tuple[CurvePoint, ...]:
    points = []
    for step in range(0, 101, 10):
        done = 1.0 - 0.97 ** (step / 2)
        for layer in layers:
            loss = 7.5 - 0.11 * layer - 1.3 * done
            agreement = 0.18 + 0.012 * layer + 0.1 * done
            points.append(CurvePoint(step, layer, loss, step * 1024, agreement, agreement - 0.05))
        points.append(CurvePoint(step, None, 2.83, step * 1024))
    return tuple(points)


def fake_sample() -> Sample:
    text = (
        " The| Eiffel| Tower| is| a| w|rought|-|iron| lattice| tower| on| the| Champ| de| Mars| in| Paris|,"
        "| France|.|\n\n|It| costs| $|10| or| $|20| to| visit|,| and| <b>|tags| &| 日本| must| be| shown| as"
        "| they| are|.|\n|1|.| One| very| long| line| follows|:| and| it| goes| on| and| on| so| that| it"
        "| must| be| wrapped| at| the| margin| without| cutting| any| word| in| two|.| <end>"
    )
    tokens = tuple(text.split("|"))
    layers = tuple((30, 10, 20, 30, 10, 30, 20)[(index * 5 + index // 7) % 7] for index in range(len(tokens)))
    return Sample(
        "What is the Eiffel Tower?",
        "0.7",
        tokens,
        layers,
        tuple(0.9 - 0.01 * (i % 40) for i in range(len(tokens))),
    )


def fake_report(**overrides) -> Report:
    """Two exits, seven thresholds, a curve and a sample; ``overrides`` replace fields."""
    values = {
        "metadata": fake_metadata(),
        "exits": fake_exits(),
        "final_loss": 2.83,
        "final_loss_ci": Interval(2.74, 2.92),
        "thresholds": tuple(fake_threshold(t) for t in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        "tuning_curve": fake_curve(),
        "samples": (fake_sample(),),
    }
    return Report(**{**values, **overrides})
