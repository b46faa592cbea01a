# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""From a checkpoint and held-out text to the checkpoint with calibrated thresholds, and a report."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nemo_ee.calibration.documents import Documents, continue_documents, read_chats, read_documents
from nemo_ee.calibration.exit_decisions import TokenScores
from nemo_ee.calibration.promise import described, promise
from nemo_ee.calibration.reliability import measure_reliability
from nemo_ee.calibration.risk_control import documents_needed, log_wealth
from nemo_ee.calibration.schema import CalibrationReport, PathRecord, PricesRecord, TextSplit
from nemo_ee.calibration.scoring import score_documents
from nemo_ee.calibration.settings import CalibrationConfig
from nemo_ee.calibration.store import ThresholdStore, check_folder
from nemo_ee.calibration.threshold_choice import (
    Choice,
    PathPoint,
    Requirement,
    certify,
    estimate,
    nothing_leaves,
    plan,
    split_documents,
)
from nemo_ee.calibration.write import PRICES, REPORT, write_report
from nemo_ee.data.chats.json_lines import JsonLines
from nemo_ee.data.checks import check_indexed_dataset
from nemo_ee.decoding.pass_prices import PassPrices
from nemo_ee.errors import ConfigError, DataError, Fault
from nemo_ee.evaluation.scored_model import ANY_VOCABULARY, check_files, restore, score_with
from nemo_ee.evaluation.settings import SweepConfig
from nemo_ee.evaluation.sweep import FULL_DEPTH, Sweep
from nemo_ee.evaluation.teacher_forced import CONFIDENCE_RULE
from nemo_ee.files.output import claim
from nemo_ee.models.fine_tuning_files import chat_template_of
from nemo_ee.report.provenance import metadata
from nemo_ee.report.schema import Metadata
from nemo_ee.report.statistics import bootstrap_mean


def calibrate(config: CalibrationConfig, trainer: Any) -> tuple[CalibrationReport, list[Path]]:
    """Chooses thresholds, writes them with the checkpoint, and the report.

    Args:
        config: what to calibrate, and on what.
        trainer: of one process, of precision `config.precision`.

    Returns:
        The report, and the files written: the checkpoint first.

    Raises:
        ConfigError, CheckpointError: before the model is built, as far as the inputs show it.
        DataError: likewise; also if so few documents could not certify anything.
        OutputError: another process is writing there, or nothing can be written there.
    """
    layers = exits_in_use(config)
    others = {"gpt_model_file": config.gpt_model_file} if config.adapter_file else {}
    store = ThresholdStore(config.source, config.output_file, others, config.overwrite)
    check_folder("report_dir", config.report_dir)
    with claim(config.output_file), claim(Path(config.report_dir, REPORT)):
        return _calibrate(config, trainer, layers, store)


def _calibrate(
    config: CalibrationConfig, trainer: Any, layers: tuple[int, ...], store: ThresholdStore
) -> tuple[CalibrationReport, list[Path]]:
    data = config.data
    requirement = Requirement(config.target_agreement, config.delta, data.seq_length)
    documents = None
    if data.prefix is not None:
        taken = data.seq_length if data.prompt_tokens is None else data.prompt_tokens
        documents = read_documents(data.prefix, data.documents, taken, ANY_VOCABULARY, config.seed)
        sizes = documents.sizes if data.prompt_tokens is None else documents.sizes * 0 + data.seq_length
        check_enough(config, sizes, documents.available, requirement)
    elif data.chats_file is not None:
        try:
            JsonLines(data.chats_file)
        except DataError as error:
            raise DataError(f"data.chats_file={data.chats_file}: {error}") from error
    model = restore(config, trainer)
    if data.prefix is not None:
        keys = dict(key="data.prefix", length_key="data.seq_length")
        check_indexed_dataset(data.prefix, 1, model.true_vocab_size, "held-out text", **keys)
    model.warn_of_untuned_exits()
    documents = _text(config, model, documents)
    check_enough(config, documents.sizes, documents.available, requirement)
    with tqdm(total=len(documents.tokens), file=sys.stderr, desc="documents", dynamic_ncols=True) as bar:
        score = score_with(model)
        scores = score_documents(score, documents, layers, model.cfg.num_layers, data.batch_size, bar.update)
    of_passes = _prices(config, model)
    prices = of_passes.greedy  # agreement is of greedy tokens
    tested = scores
    if config.guarantee:
        tuning, test = split_documents(len(documents.tokens), data.tuning_share, config.seed)
        to_plan, tested = scores.of_documents(tuning), scores.of_documents(test)
        planned = plan(to_plan, requirement, config.levels, len(test), prices)
        choice = certify(planned, tested, requirement, prices)
    else:
        choice = estimate(scores, requirement, config.levels, prices)
    report = make_report(config, metadata(config, model), scores, tested, choice, prices)
    written = store.write(report.thresholds, config.exits)
    of_passes.write(Path(config.report_dir, PRICES))
    return report, [written, *write_report(report, config.report_dir), Path(config.report_dir, PRICES)]


def _prices(config: CalibrationConfig, model: Any) -> PassPrices:
    """Of decoding with this model: of the file, or on this machine."""
    model.prepare_decoding(config.weights, prices_file=config.prices_file)
    prices = model.decoding_model().prices
    assert prices is not None, "the whole model, with exits"
    model.release_decoding()
    return prices


def _text(config: CalibrationConfig, model: Any, documents: Documents | None) -> Documents:
    """What is scored: documents as they are or continued, or chats."""
    data, limit = config.data, model.cfg.encoder_seq_length
    if documents is None:
        template = chat_template_of(model.text_tokenizer)
        if template is None:
            rule = "the checkpoint's tokenizer has no chat template"
            raise ConfigError(Fault("data.chats_file", data.chats_file, rule, "give data.prefix instead"))
        path = str(data.chats_file)
        return read_chats(path, template, data.documents, data.seq_length, limit, config.seed)
    if data.prompt_tokens is None:
        return documents

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        sweep = Sweep(model, prompts, SweepConfig(tokens_to_generate=tokens), config.seed)
        return [text.tokens for text in sweep.generate(prompts, FULL_DEPTH)]

    with tqdm(total=len(documents.tokens), file=sys.stderr, desc="full depth", dynamic_ncols=True) as bar:
        return continue_documents(
            documents, data.prompt_tokens, data.seq_length, data.batch_size, generate, bar.update
        )


def check_enough(
    config: CalibrationConfig, sizes: np.ndarray, available: int, requirement: Requirement
) -> None:
    """Raises DataError if no outcome could certify anything: a test that can only fail is none.

    Args:
        config: what is asked for; without a guarantee nothing is checked.
        sizes: [D] tokens of the documents that will be scored.
        available: documents that there are.
        requirement: what is asked of thresholds.
    """
    largest, share = requirement.largest, config.data.tuning_share
    if not config.guarantee:
        return
    tested = len(split_documents(len(sizes), share, config.seed)[1])
    needed = math.log(1.0 / requirement.delta)
    growth = log_wealth(sizes * 0.0, sizes, requirement.risk, 1.0 / largest) / len(sizes)
    if tested * growth >= needed:
        return
    least = documents_needed(sizes, requirement.risk, requirement.delta, largest)
    total = math.ceil(least / (1.0 - share))
    rule = (
        f"{tested} test documents cannot certify target_agreement={requirement.agreement:g} with "
        f"delta={requirement.delta:g}, even without a single disagreement: that takes {least} of these lengths, "
        f"so {total} in all with data.tuning_share={share:g}, and more where tokens disagree"
    )
    remedy = "give more text, a lower target_agreement or a larger delta"
    if available > len(sizes):
        remedy = f"the text has {available}: raise data.documents"
    remedy += "; or take a point estimate, of which nothing is promised: guarantee=false"
    raise DataError(str(Fault("data.documents", len(sizes), rule, remedy)))


def make_report(
    config: CalibrationConfig,
    metadata: Metadata,
    scores: TokenScores,
    test: TokenScores,
    choice: Choice,
    prices: PassPrices,
) -> CalibrationReport:
    """Everything that was found.

    Args:
        config: of the calibration.
        metadata: where the numbers come from.
        scores: of all documents.
        test: of the documents that thresholds were tested on; of a point estimate, all.
        choice: what the tests said.
        prices: by which thresholds were compared.
    """
    chosen, interval = choice.chosen, None
    tested = TextSplit(len(test.sizes), len(test.documents))
    thresholds = nothing_leaves(scores.layers)
    if chosen is not None:
        thresholds = chosen.planned.thresholds
        sizes = chosen.outcome.sizes
        _, interval = bootstrap_mean(sizes - chosen.outcome.disagreements, sizes, seed=config.seed)
    return CalibrationReport(
        metadata=metadata,
        guaranteed=config.guarantee and chosen is not None,
        promise=promise(config, choice, tested.documents),
        target_agreement=config.target_agreement,
        delta=config.delta if config.guarantee else None,
        confidence_rule=CONFIDENCE_RULE,
        layers=scores.layers,
        thresholds=thresholds,
        kept=choice.kept,
        number=choice.number,
        agreement_ci=interval,
        text=described(config.data),
        seq_length=config.data.seq_length,
        tuning=TextSplit(len(scores.sizes) - tested.documents, len(scores.documents) - tested.tokens),
        test=tested,
        prices=PricesRecord(
            prices.source,
            choice.full_depth,
            prices.output(1),
            {n: prices.head(n, 1) for n in scores.layers},
            {n: prices.segment(0, scores.num_layers, n) for n in (1, 2, 4)},
        ),
        path=tuple(_record(point, scores, choice, config.delta) for point in choice.points),
        reliability=measure_reliability(scores, config.bins, config.seed),
    )


def _record(point: PathPoint, scores: TokenScores, choice: Choice, delta: float) -> PathRecord:
    shares = zip(scores.depths.tolist(), point.outcome.share_per_exit.tolist(), strict=True)
    return PathRecord(
        thresholds=point.planned.thresholds,
        p_value=point.p_value,
        agreement=point.outcome.agreement,
        agreement_at_worst=point.outcome.agreement_at_worst,
        agreement_bound=point.agreement_bound(delta),
        share_per_exit=dict(shares),
        mean_layers=point.outcome.mean_layers,
        speedup=choice.full_depth / point.seconds,
    )


def exits_in_use(config: CalibrationConfig) -> tuple[int, ...]:
    """The exits to calibrate, from what the files' own configurations say.

    Raises:
        CheckpointError: a file that cannot be read, or has no exits.
        ConfigError: listing every setting that does not fit the files.
    """
    data = config.data
    base, early_exit, faults = check_files(config, "calibrate", "exits", config.exits, data.seq_length)
    limit = base.encoder_seq_length
    if data.prompt_tokens is not None and data.prompt_tokens + data.seq_length >= limit:
        rule = (
            f"with data.seq_length={data.seq_length} and a token more exceeds the model's {limit} positions"
        )
        faults.append(Fault("data.prompt_tokens", data.prompt_tokens, rule, "use fewer"))
    usual = early_exit.inference.exits
    layers = config.exits or (early_exit.layers if usual is None else usual)
    if not layers:
        rule = f"the checkpoint uses none of its exits {list(early_exit.layers)}"
        faults.append(Fault("exits", None, rule, "name those to calibrate"))
    if early_exit.inference.confidence != CONFIDENCE_RULE:
        rule = f"text is scored by {CONFIDENCE_RULE} alone, so its thresholds would mean something else"
        key, remedy = (
            "model.early_exit.inference.confidence",
            f"calibrate a checkpoint that has {CONFIDENCE_RULE}",
        )
        faults.append(Fault(key, early_exit.inference.confidence, rule, remedy))
    if faults:
        raise ConfigError(*faults)
    if config.prices_file is not None and Path(config.prices_file).exists():
        PassPrices.read(Path(config.prices_file), "prices_file")
    return layers
