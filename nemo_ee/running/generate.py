# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A generation run: from checkpoints and prompts to marked text and JSONL."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from nemo_ee.decoding.pass_prices import read_prices
from nemo_ee.decoding.request import parse_request
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.files.output import claim, replaced_file
from nemo_ee.generation.generating import position_limit
from nemo_ee.generation.inference_config import in_own_keys
from nemo_ee.generation.prompts import tokenize_prompts
from nemo_ee.running.display import DIM, RESET, marked, summary, token_pieces
from nemo_ee.running.prompt_file import Prompt
from nemo_ee.running.restore import check_processes, layout, read_exits, restore_model
from nemo_ee.running.settings import GenerateConfig
from nemo_ee.runtime.collective import on_first_rank


def run(config: GenerateConfig, trainer: Any) -> None:
    """Restores, generates, prints, and writes `output_file`, which appears in one step.

    Args:
        config: what to generate with.
        trainer: of `tensor_model_parallel_size` processes.

    Raises:
        ConfigError, CheckpointError: before the model is built.
        GenerationError: a prompt that cannot be continued; before anything is generated or written.
        OutputError: another process is writing there, or nothing can be written there.
    """
    prompts = config.read_prompts()
    check(config, trainer.world_size)
    with ExitStack() as claims:
        if trainer.global_rank == 0 and config.output_file is not None:
            claims.enter_context(claim(config.output_file))
        _run(config, trainer, prompts)


def _run(config: GenerateConfig, trainer: Any, prompts: list[Prompt]) -> None:
    model = restore_model(config.gpt_model_file, config.adapter_file, trainer, layout(config, trainer))
    first = trainer.global_rank == 0
    colour = config.color == "always" or (
        config.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    records = []
    for record in generate(model, config, prompts):
        records.append(record)
        if first:
            show(record, model, colour)
    if first and config.output_file is not None:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        with replaced_file(config.output_file) as part:
            # What came in as half a character, from a command line that is no UTF-8, has a spelling in JSON.
            part.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
        print(f"wrote {config.output_file}")


def check(config: GenerateConfig, processes: int) -> None:
    """What the settings and the files' configurations show to be wrong.

    Raises:
        ConfigError, CheckpointError: see `run`.
    """
    check_processes(config, processes)
    if config.output_file is not None and not Path(config.output_file).absolute().parent.is_dir():
        rule = "its directory does not exist"
        raise ConfigError(Fault("output_file", config.output_file, rule, "create it, or write elsewhere"))
    if config.output_file is not None and Path(config.output_file).is_dir():
        raise ConfigError(Fault("output_file", config.output_file, "is a directory", "name a file in it"))
    base, early_exit = read_exits(config)
    read_prices(config.prices_file, base.num_layers, early_exit.layers, config.weights, config.output_layer)
    try:
        parse_request(**config.generate_arguments(), config=early_exit)
    except ConfigError as error:
        raise in_own_keys(error, "inference") from None


def generate(model: Any, config: GenerateConfig, prompts: list[Prompt]) -> Iterator[dict[str, Any]]:
    """One record per prompt, in their order: prompt, text, tokens, finish_reason, exit_layers, confidences, if asked
    for logprobs and prompt_logprobs, seconds of its batch.

    All prompts are tokenized, and so checked, before the first batch runs, and before memory for them is
    reserved.
    """
    inputs = [[{"role": "user", "content": text}] for text in prompts] if config.chat else prompts
    tokenizer, add_bos = model.text_tokenizer, config.inference.add_BOS
    limit = position_limit(model.cfg)
    ids = on_first_rank(lambda: tokenize_prompts(inputs, tokenizer, add_bos, limit))
    rows = min(config.batch_size, len(prompts))
    longest = min(max(map(len, ids)) + config.inference.tokens_to_generate, limit)
    model.prepare_decoding(
        config.weights,
        rows=rows,
        max_length=longest,
        prices_file=config.prices_file,
        output_layer=config.output_layer,
    )
    generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)
    arguments = config.generate_arguments()
    for start in range(0, len(prompts), config.batch_size):
        batch = inputs[start : start + config.batch_size]
        began = time.perf_counter()
        output = model.generate(batch, **arguments, generator=generator)
        seconds = time.perf_counter() - began
        for i, exits in enumerate(output["early_exit"]):
            ids = output["token_ids"][i]
            new = ids[len(ids) - len(exits["exit_layers"]) :]
            yield {
                "prompt": prompts[start + i],
                "text": tokenizer.decode(new),
                "tokens": token_pieces(new, tokenizer, ids[: len(ids) - len(new)]),
                "token_ids": new,
                "finish_reason": output["finish_reason"][i],
                **exits,
                **{
                    name: output[name][i]
                    for name in ("logprobs", "prompt_logprobs")
                    if output[name] is not None
                },
                "batch_seconds": round(seconds, 3),
                "batch_tokens": sum(len(row["exit_layers"]) for row in output["early_exit"]),
            }


def show(record: dict[str, Any], model: Any, colour: bool) -> None:
    """Prints one record: the prompt, the continuation with the exit of every token, and its shares."""
    final, exits = model.gpt.config.num_layers, model.early_exit.layers
    dim, reset = (DIM, RESET) if colour else ("", "")
    speed = record["batch_tokens"] / max(record["batch_seconds"], 1e-3)
    line = summary(record["exit_layers"], record["confidences"], final, colour, exits)
    prompt = record["prompt"]
    print(f"{dim}prompt: {prompt if isinstance(prompt, str) else model.text_tokenizer.decode(prompt)}{reset}")
    print(marked(record["tokens"], record["exit_layers"], final, colour, exits))
    print(f"{dim}({line}{dim}; {speed:.1f} tokens/s in its batch){reset}\n", flush=True)
