# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""From checkpoints and held-out text to a report on disk."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nemo_ee.checkpoint import archive
from nemo_ee.checkpoint.exits import adapter
from nemo_ee.config import EarlyExitConfig
from nemo_ee.data.checks import check_indexed_dataset
from nemo_ee.errors import CheckpointError, ConfigError, Fault
from nemo_ee.evaluation.held_out import held_out_sequences, measure_quality
from nemo_ee.evaluation.settings import EvaluationConfig, SweepConfig
from nemo_ee.evaluation.sweep import Sweep, document_prompts
from nemo_ee.evaluation.teacher_forced import TextScores, score_text
from nemo_ee.files.output import claim
from nemo_ee.generation.generate import generating
from nemo_ee.generation.prompts import tokenize_prompts
from nemo_ee.models.checks.model_checks import read_early_exit
from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel
from nemo_ee.report import provenance
from nemo_ee.report.schema import Metadata, Report
from nemo_ee.report.tuning_curve import read_tuning_curve
from nemo_ee.report.write import REPORT, write_report
from nemo_ee.running.prompt_file import Turns, read_prompt_file
from nemo_ee.running.restore import restore_model

ANY_VOCABULARY = 1 << 31


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
    if trainer.world_size != 1:
        rule = f"x trainer.num_nodes={trainer.num_nodes}: an evaluation runs in one process"
        raise ConfigError(Fault("trainer.devices", trainer.num_devices, rule, "set both to 1"))
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
        quality = measure_quality(_scorer(model), _counted(batches, bar), config.seed)
        bar.set_description("generation")
        names = None if chats is None else [turns[-1]["content"] for turns in chats]
        sweep = Sweep(model, prompts, settings, config.seed, bar.update, names)
        thresholds = sweep.run()
    report = Report(
        _metadata(config, model),
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


def restore(config: EvaluationConfig, trainer: Any) -> MegatronGPTEarlyExitModel:
    """The model with its exits, in eval mode.

    Raises:
        CheckpointError: see `EarlyExitAdapterMixin.restore_with_exits`.
    """
    return restore_model(config.gpt_model_file, config.adapter_file, trainer, {"precision": config.precision})


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
    base = archive.read_config(config.gpt_model_file)
    if config.adapter_file is not None:
        early_exit: EarlyExitConfig = read_early_exit(adapter.read_adapter_config(config.adapter_file))
    else:
        early_exit = read_early_exit(base)
    if not early_exit.layers:
        raise CheckpointError(f"{config.gpt_model_file}: has no exits to evaluate; set adapter_file")
    exits = config.generation.exits
    faults = []
    if exits is not None and (not exits or not set(exits) <= set(early_exit.layers)):
        rule = f"not all of the model's exits {list(early_exit.layers)}"
        faults.append(Fault("generation.exits", list(exits), rule, "name exit layers that exist, or null"))
    limit = base.encoder_seq_length
    if config.data.seq_length > limit:
        rule = f"exceeds the model's encoder_seq_length={limit}"
        faults.append(Fault("data.seq_length", config.data.seq_length, rule, f"use at most {limit}"))
    longest = config.generation.prompt_tokens + config.generation.tokens_to_generate
    documents = config.generation.prompts is None and config.generation.chat_prompts_file is None
    if documents and longest > limit:
        rule = f"with generation.tokens_to_generate exceeds the model's {limit} positions"
        faults.append(Fault("generation.prompt_tokens", config.generation.prompt_tokens, rule, "use fewer"))
    if faults:
        raise ConfigError(*faults)
    data, keys = config.data, dict(key="data.prefix", length_key="data.seq_length")
    check_indexed_dataset(data.prefix, data.seq_length, ANY_VOCABULARY, "held-out text", **keys)


def _scorer(model: MegatronGPTEarlyExitModel):
    device = model.gpt.output_weight().device

    def score(tokens: Tensor, labels: Tensor) -> TextScores:
        with generating(model):
            return score_text(model.gpt, tokens.to(device), labels.to(device))

    return score


def _counted(batches: tuple[Tensor, ...], bar: tqdm) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        bar.update()


def _metadata(config: EvaluationConfig, model: MegatronGPTEarlyExitModel) -> Metadata:
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
