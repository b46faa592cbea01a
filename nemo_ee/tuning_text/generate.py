# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A model answers prompts at full depth, block after block, and its answers become text for tuning."""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

from tqdm import tqdm

from nemo_ee.checkpoint.conversion.base import BaseCheckpoint
from nemo_ee.config import EarlyExitConfig
from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.decoding.request import GenerationRequest, parse_request
from nemo_ee.errors import ConfigError
from nemo_ee.files.output import claim
from nemo_ee.generation.generate import continue_sequences
from nemo_ee.generation.generating import generating, position_limit
from nemo_ee.generation.inference_config import in_own_keys
from nemo_ee.generation.prompts import tokenize_prompts
from nemo_ee.generation.stopping import StopRule
from nemo_ee.running.restore import check_processes, layout, restore_model
from nemo_ee.runtime.collective import on_first_rank
from nemo_ee.tuning_text.answer_files import AnswerFiles, Progress, check_prefix
from nemo_ee.tuning_text.prompts import Turns, read_prompts
from nemo_ee.tuning_text.settings import TuningTextConfig

BATCHES_PER_BLOCK = 4
"""Prompts are answered in blocks of so many batches. Within one, an answer that has ended makes room for the next.
Rounding depends on what else is in a pass; as a block is begun anew after an interruption, and no other prompt is in
its passes, the answers are those of an uninterrupted run to the last bit."""
NAMES = {"user": "User", "assistant": "Assistant"}
"""What NeMo's chats call the roles."""


def generate_tuning_text(config: TuningTextConfig, trainer: Any) -> AnswerFiles:
    """Answers the prompts, or goes on where a run before has ended.

    Args:
        config: what is asked, and how it is answered.
        trainer: of as many processes as the model runs on.

    Returns:
        The files, complete.

    Raises:
        ConfigError, CheckpointError, DataError: before the model is built.
        GenerationError: a prompt that the model cannot answer; before anything is generated.
        OutputError: another process is writing there, or nothing can be written there.
    """
    request = _request(config)
    check_processes(config, trainer.world_size)
    check_prefix(config.output_prefix)
    with claim(f"{config.output_prefix}.json") if trainer.global_rank == 0 else nullcontext():
        return _generate(config, request, trainer)


def _generate(config: TuningTextConfig, request: GenerationRequest, trainer: Any) -> AnswerFiles:
    first = trainer.global_rank == 0
    prompts = read_prompts(config.prompts, config.seed)
    files = AnswerFiles(config.output_prefix, _settings(config, prompts))
    if files.complete:
        if first:
            files.clear()
        return files
    model = restore_model(config.gpt_model_file, None, trainer, layout(config, trainer))
    model.start_distributed()
    tokenizer, limit = model.text_tokenizer, position_limit(model.cfg)
    ids = on_first_rank(lambda: tokenize_prompts(prompts, tokenizer, None, limit))
    size = BATCHES_PER_BLOCK * config.batch_size
    done = on_first_rank(lambda: files.progress.prompts)
    longest = min(max(map(len, ids)) + request.max_length, limit)
    model.prepare_decoding(
        config.weights, rows=config.batch_size, max_length=longest, output_layer=config.output_layer
    )
    stop = StopRule(tokenizer, ())
    with tqdm(total=len(prompts), initial=done, unit="prompt", file=sys.stderr, disable=not first) as bar:
        while done < len(prompts) and on_first_rank(lambda: _is_time(config, files.progress, size)):
            chosen = range(done, min(done + size, len(prompts)))
            began = time.perf_counter()
            lengths = [min(request.max_length, limit + 1 - len(ids[i])) for i in chosen]
            answers = [
                stop.begin(ids[i], request, length, _seed(config.seed, i))
                for i, length in zip(chosen, lengths, strict=True)
            ]
            with generating(model):
                for finished in continue_sequences(model, model.decoding_model(), answers, config.batch_size):
                    bar.update(finished)
            if first:
                seconds = time.perf_counter() - began
                asked = zip((prompts[i] for i in chosen), answers, strict=True)
                records = [
                    record for turns, each in asked if (record := _record(turns, each, tokenizer.decode))
                ]
                files.append(records, _after(files.progress, answers, records, seconds))
                bar.set_postfix_str(f"{files.progress.tokens / files.progress.seconds:.0f} tokens/s")
            done = chosen.stop
    on_first_rank(lambda: files.publish(config.validation_share))
    return files


def _request(config: TuningTextConfig) -> GenerationRequest:
    try:
        return parse_request(**config.inference.generate_arguments(), early_exit=False, config=_NO_EXITS)
    except ConfigError as error:
        raise in_own_keys(error, "inference") from None


_NO_EXITS = EarlyExitConfig(layers=())


def _settings(config: TuningTextConfig, prompts: list[Turns]) -> dict[str, Any]:
    """All that the files depend on, by the keys that the user sets."""
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    names = ("validation_share", "minutes", "batch_size", "weights", "seed", "megatron_amp_O2")
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    return {
        "gpt_model_file": f"content {BaseCheckpoint(config.gpt_model_file).hash_now()}",
        "prompts": f"{len(prompts)} of sha256 {digest}",
        **{f"inference.{name}": value for name, value in asdict(config.inference).items()},
        **{name: getattr(config, name) for name in (*names, *sizes)},
        "trainer.precision": str(config.precision),
    }


def _is_time(config: TuningTextConfig, progress: Progress, block: int) -> bool:
    """Whether another block, if it takes as long as those before, ends within the minutes."""
    if config.minutes is None or not progress.prompts:
        return True
    return progress.seconds * (1 + block / progress.prompts) <= 60.0 * config.minutes


def _seed(seed: int, place: int) -> int:
    """Of a prompt's random numbers: the same however often the run was interrupted before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{place}".encode()).digest()[:7], "big")


def _record(
    turns: Turns, answer: GeneratedSequence, decode: Callable[[list[int]], str]
) -> dict[str, Any] | None:
    """A line in the format of NeMo's chats; None for an answer without text.

    `finish_reason` is not NeMo's: `length` says that the answer was cut, and that the model did not end it there.
    """
    stopped = answer.finish_reason == "stop"
    text = decode(answer.tokens[:-1] if stopped else answer.tokens)
    if not text.strip():
        return None
    said = [(NAMES[turn["role"]], turn["content"]) for turn in turns if turn["role"] != "system"]
    return {
        "system": turns[0]["content"] if turns[0]["role"] == "system" else "",
        "mask": NAMES["user"],
        "conversations": [
            {"from": name, "value": value} for name, value in [*said, (NAMES["assistant"], text)]
        ],
        "finish_reason": answer.finish_reason,
    }


def _after(
    before: Progress, answers: list[GeneratedSequence], records: list[dict], seconds: float
) -> Progress:
    return replace(
        before,
        prompts=before.prompts + len(answers),
        answers=before.answers + len(records),
        unfinished=before.unfinished + sum(record["finish_reason"] == "length" for record in records),
        tokens=before.tokens + sum(len(each.tokens) for each in answers),
        seconds=before.seconds + seconds,
    )
