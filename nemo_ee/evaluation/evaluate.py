# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""From checkpoints and held-out text to a report on disk."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from nemo_ee.data.checks import check_indexed_dataset
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.evaluation.exit_thresholds import resolved_thresholds
from nemo_ee.evaluation.held_out import held_out_sequences, measure_quality
from nemo_ee.evaluation.scored_model import ANY_VOCABULARY, check_files, restore, score_with
from nemo_ee.evaluation.settings import EvaluationConfig, SweepConfig
from nemo_ee.evaluation.sweep import BATCH, Sweep, document_prompts
from nemo_ee.files.output import claim
from nemo_ee.generation.prompts import tokenize_prompts
from nemo_ee.report.provenance import metadata
from nemo_ee.report.schema import Report
from nemo_ee.report.tuning_curve import read_tuning_curve
from nemo_ee.report.write import REPORT, write_report
from nemo_ee.running.prompt_file import Turns, read_prompt_file


def evaluate(config: EvaluationConfig, trainer: Any) -> list[Path]:
    """Evaluates and writes the report.

    Args:
        config: what to evaluate, and on what.
        trainer: of one process, of precision `config.precision`.

    Returns:
        The files written.

    Raises:
        ConfigError, CheckpointError, DataError: before the model is built, as far as the inputs show it.
        GenerationError: a prompt that cannot be continued.
        OutputError: another process is writing there, or nothing can be written there.
    """
    curve = read_tuning_curve(config.tuning_log_dir, key="tuning_log_dir") if config.tuning_log_dir else ()
    _check(config)
    chats = _chats(config)
    with claim(Path(config.output_dir, REPORT)):
        return _evaluate(config, trainer, curve, chats)


def _evaluate(config: EvaluationConfig, trainer: Any, curve: tuple, chats: list[Turns] | None) -> list[Path]:
    model = restore(config, trainer)
    settings = config.generation
    data = config.data
    sequences = held_out_sequences(data.prefix, data.sequences, data.seq_length, model.true_vocab_size)
    if settings.prompts is None and chats is None:
        prompts = document_prompts(data, settings.num_prompts, settings.prompt_tokens)
    else:
        limit = model.cfg.encoder_seq_length
        asked = list(settings.prompts) if chats is None else chats
        prompts = tokenize_prompts(asked, model.text_tokenizer, None, limit)
    batches = sequences.split(data.batch_size)
    steps = len(batches) + Sweep.generations(settings, len(prompts))
    with tqdm(total=steps, file=sys.stderr, desc="held-out text", dynamic_ncols=True) as bar:
        quality = measure_quality(score_with(model), _counted(batches, bar), config.seed)
        bar.set_description("generation")
        names = None if chats is None else [turns[-1]["content"] for turns in chats]
        sweep = Sweep(model, prompts, settings, config.seed, bar.update, names)
        model.prepare_decoding(rows=BATCH)
        thresholds = sweep.run()
        model.release_decoding()
    report = Report(
        metadata(config, model),
        quality.exits,
        quality.final_loss,
        quality.final_loss_ci,
        thresholds,
        curve,
        sweep.samples(),
        _described(settings, len(prompts)),
        sweep.quality.exits,
    )
    return write_report(report, config.output_dir)


def _chats(config: EvaluationConfig) -> list[Turns] | None:
    """The chats to answer.

    Raises:
        ConfigError: their file cannot be read.
    """
    path = config.generation.chat_prompts_file
    return None if path is None else read_prompt_file(path, "generation.chat_prompts_file")


def _described(settings: SweepConfig, prompts: int) -> str:
    """What was generated after, in words."""
    if settings.chat_prompts_file is not None:
        return f"{prompts} prompts of {Path(settings.chat_prompts_file).name}, in the chat template"
    if settings.prompts is not None:
        return f"{prompts} texts that were given"
    return f"the first {settings.prompt_tokens} tokens of {prompts} held-out documents"


def _check(config: EvaluationConfig) -> None:
    """What the files' own configurations and sizes show to be wrong."""
    base, early_exit, faults = check_files(
        config, "evaluate", "generation.exits", config.generation.exits, config.data.seq_length
    )
    resolved_thresholds(config.generation, early_exit, faults)
    limit = base.encoder_seq_length
    longest = config.generation.prompt_tokens + config.generation.tokens_to_generate
    documents = config.generation.prompts is None and config.generation.chat_prompts_file is None
    if documents and longest > limit:
        rule = f"with generation.tokens_to_generate exceeds the model's {limit} positions"
        faults.append(Fault("generation.prompt_tokens", config.generation.prompt_tokens, rule, "use fewer"))
    if faults:
        raise ConfigError(*faults)
    data, keys = config.data, dict(key="data.prefix", length_key="data.seq_length")
    check_indexed_dataset(data.prefix, data.seq_length, ANY_VOCABULARY, "held-out text", **keys)


def _counted(batches: tuple[Tensor, ...], bar: tqdm) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        bar.update()
