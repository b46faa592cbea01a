# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""From a checkpoint and held-out text to the checkpoint with calibrated thresholds, and a report."""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nemo_ee.calibration.documents import Documents, read_documents
from nemo_ee.calibration.exit_decisions import TokenScores
from nemo_ee.calibration.markdown import guarantee, no_guarantee
from nemo_ee.calibration.reliability import measure_reliability
from nemo_ee.calibration.risk_control import documents_needed, log_wealth
from nemo_ee.calibration.schema import CalibrationReport, PathRecord, TextSplit
from nemo_ee.calibration.scoring import score_documents, score_with
from nemo_ee.calibration.settings import CalibrationConfig
from nemo_ee.calibration.store import ThresholdStore, check_folder
from nemo_ee.calibration.threshold_choice import (
    Choice,
    PathPoint,
    Requirement,
    certify,
    nothing_leaves,
    plan,
    split_documents,
)
from nemo_ee.calibration.write import REPORT, write_report
from nemo_ee.checkpoint import archive
from nemo_ee.checkpoint.exits import adapter
from nemo_ee.data.checks import check_indexed_dataset
from nemo_ee.errors import CheckpointError, ConfigError, DataError, Fault
from nemo_ee.evaluation.evaluate import ANY_VOCABULARY, restore
from nemo_ee.evaluation.settings import EvaluationConfig, HeldOutConfig
from nemo_ee.evaluation.teacher_forced import CONFIDENCE_RULE
from nemo_ee.files.output import claim
from nemo_ee.models.checks.model_checks import read_early_exit
from nemo_ee.report import provenance
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
    data, requirement = (
        config.data,
        Requirement(config.target_agreement, config.delta, config.data.seq_length),
    )
    documents = read_documents(data.prefix, data.documents, data.seq_length, ANY_VOCABULARY, config.seed)
    tuning, test = split_documents(len(documents.tokens), data.tuning_share, config.seed)
    check_enough(documents, len(test), requirement, data.tuning_share)
    if trainer.world_size != 1:
        rule = f"x trainer.num_nodes={trainer.num_nodes}: a calibration runs in one process"
        raise ConfigError(Fault("trainer.devices", trainer.num_devices, rule, "set both to 1"))
    model = _restore(config, trainer)
    keys = dict(key="data.prefix", length_key="data.seq_length")
    check_indexed_dataset(data.prefix, 1, model.true_vocab_size, "held-out text", **keys)
    model.warn_of_untuned_exits()
    with tqdm(total=len(documents.tokens), file=sys.stderr, desc="documents", dynamic_ncols=True) as bar:
        score = score_with(model)
        scores = score_documents(score, documents, layers, model.cfg.num_layers, data.batch_size, bar.update)
    to_plan, to_test = scores.of_documents(tuning), scores.of_documents(test)
    choice = certify(plan(to_plan, requirement, config.levels, len(test)), to_test, requirement)
    report = make_report(config, _metadata(config, model), scores, to_test, choice)
    written = store.write(report.thresholds, config.exits)
    return report, [written, *write_report(report, config.report_dir)]


def check_enough(documents: Documents, tested: int, requirement: Requirement, tuning_share: float) -> None:
    """Raises DataError if no outcome could certify anything: a test that can only fail is none.

    Args:
        documents: that will be scored.
        tested: how many of them test the path.
        requirement: what is asked.
        tuning_share: of the documents.
    """
    sizes, largest = documents.sizes, requirement.largest
    needed = math.log(1.0 / requirement.delta)
    growth = log_wealth(sizes * 0.0, sizes, requirement.risk, 1.0 / largest) / len(sizes)
    if tested * growth >= needed:
        return
    least = documents_needed(sizes, requirement.risk, requirement.delta, largest)
    total = math.ceil(least / (1.0 - tuning_share))
    rule = (
        f"{tested} test documents cannot certify target_agreement={requirement.agreement:g} with "
        f"delta={requirement.delta:g}, even without a single disagreement: that takes {least} of these lengths, "
        f"so {total} in all with data.tuning_share={tuning_share:g}, and more where tokens disagree"
    )
    remedy = "give more text, a lower target_agreement or a larger delta"
    if documents.available > len(sizes):
        remedy = f"the text has {documents.available}: raise data.documents"
    raise DataError(str(Fault("data.documents", len(sizes), rule, remedy)))


def make_report(
    config: CalibrationConfig, metadata: Metadata, scores: TokenScores, test: TokenScores, choice: Choice
) -> CalibrationReport:
    """Everything that was found.

    Args:
        config: of the calibration.
        metadata: where the numbers come from.
        scores: of all documents.
        test: of the test documents.
        choice: what the tests said.
    """
    chosen, interval = choice.chosen, None
    target, delta, length = config.target_agreement, config.delta, config.data.seq_length
    tested = TextSplit(len(test.sizes), len(test.documents))
    thresholds, promise = nothing_leaves(scores.layers), no_guarantee(target, delta)
    if chosen is not None:
        thresholds, promise = chosen.planned.thresholds, guarantee(target, delta, length, tested.documents)
        sizes = chosen.outcome.sizes
        _, interval = bootstrap_mean(sizes - chosen.outcome.disagreements, sizes, seed=config.seed)
    return CalibrationReport(
        metadata=metadata,
        guarantee=promise,
        target_agreement=target,
        delta=delta,
        confidence_rule=CONFIDENCE_RULE,
        layers=scores.layers,
        thresholds=thresholds,
        certified=choice.certified,
        agreement_ci=interval,
        seq_length=length,
        tuning=TextSplit(len(scores.sizes) - tested.documents, len(scores.documents) - tested.tokens),
        test=tested,
        path=tuple(_record(point, scores, delta) for point in choice.points),
        reliability=measure_reliability(scores, config.bins, config.seed),
    )


def _record(point: PathPoint, scores: TokenScores, delta: float) -> PathRecord:
    shares = zip(scores.depths.tolist(), point.outcome.share_per_exit.tolist(), strict=True)
    return PathRecord(
        thresholds=point.planned.thresholds,
        p_value=point.p_value,
        agreement=point.outcome.agreement,
        agreement_bound=point.agreement_bound(delta),
        share_per_exit=dict(shares),
        mean_layers=point.outcome.mean_layers,
    )


def exits_in_use(config: CalibrationConfig) -> tuple[int, ...]:
    """The exits to calibrate, from what the files' own configurations say.

    Raises:
        CheckpointError: a file that cannot be read, or has no exits.
        ConfigError: listing every setting that does not fit the files.
    """
    base = archive.read_config(config.gpt_model_file)
    with_exits = base if config.adapter_file is None else adapter.read_adapter_config(config.adapter_file)
    early_exit = read_early_exit(with_exits)
    if not early_exit.layers:
        raise CheckpointError(f"{config.gpt_model_file}: has no exits to calibrate; set adapter_file")
    faults, usual = [], early_exit.inference.exits
    layers = config.exits or (early_exit.layers if usual is None else usual)
    if not layers:
        rule = f"the checkpoint uses none of its exits {list(early_exit.layers)}"
        faults.append(Fault("exits", None, rule, "name those to calibrate"))
    if config.exits is not None and not set(config.exits) <= set(early_exit.layers):
        rule = f"not all of the model's exits {list(early_exit.layers)}"
        faults.append(Fault("exits", list(config.exits), rule, "name exit layers that exist, or null"))
    if early_exit.inference.confidence != CONFIDENCE_RULE:
        rule = f"text is scored by {CONFIDENCE_RULE} alone, so its thresholds would mean something else"
        key, remedy = (
            "model.early_exit.inference.confidence",
            f"calibrate a checkpoint that has {CONFIDENCE_RULE}",
        )
        faults.append(Fault(key, early_exit.inference.confidence, rule, remedy))
    limit, length = base.encoder_seq_length, config.data.seq_length
    if length > limit:
        rule = f"exceeds the model's encoder_seq_length={limit}"
        faults.append(Fault("data.seq_length", length, rule, f"use at most {limit}"))
    if faults:
        raise ConfigError(*faults)
    return layers


def _restore(config: CalibrationConfig, trainer: Any) -> Any:
    files = dict(gpt_model_file=config.gpt_model_file, adapter_file=config.adapter_file)
    data = HeldOutConfig(config.data.prefix)
    return restore(EvaluationConfig(**files, data=data, precision=config.precision), trainer)


def _metadata(config: CalibrationConfig, model: Any) -> Metadata:
    return Metadata(
        model=Path(config.gpt_model_file).name,
        num_layers=model.cfg.num_layers,
        adapter=None if config.adapter_file is None else Path(config.adapter_file).name,
        commit=provenance.commit(),
        device=f"{provenance.device()}, load average {provenance.load_average()}",
        torch_version=torch.__version__,
        dtype=str(model.torch_dtype).removeprefix("torch."),
        seed=config.seed,
        date=provenance.date(),
        command=provenance.command(),
    )
