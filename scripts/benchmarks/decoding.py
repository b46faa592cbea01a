# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Decoding speed on the same weights: ours at full depth, with early exits and lossless; NeMo's; Hugging Face's.

    python scripts/benchmarks/decoding.py --model base.nemo --adapter exits.nemo --hf smollm2/ --data text_validation

All ways run in one process and take turns, with a fixed number of new tokens, greedily. Every cell (a batch
size and a prompt length) also has the memory bandwidth measured, and each pass of our decoder by itself, so
that what was measured stands beside what it could be. NeMo's loop, 8-bit weights and Hugging Face's assistant
run at batch 1 only, and large batches of long prompts with one threshold only. The same command runs on a
GPU. Results go to OUTPUT/decoding.json cell by cell; started again, the script does those that are missing
(all with --again), then writes OUTPUT/decoding.md and .png.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_ee.files.output import write_text
from nemo_ee.runtime.script import user_errors

EPSILON = {"32": 1e-3, "bf16": 0.5}
"""Logits closer than that are equal but for rounding, in which all ways may differ."""


def numbers(kind: type) -> Callable[[str], list]:
    """Parses `1,4,16`."""

    def parse(text: str) -> list:
        return sorted({kind(each) for each in text.split(",")})

    return parse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="the base, or a model merged with its exits, a .nemo")
    parser.add_argument("--adapter", help="the exits alone, a .nemo")
    parser.add_argument("--hf", required=True, help="directory of the same base in Hugging Face's format")
    parser.add_argument("--data", required=True, help="prefix of an indexed dataset, for prompts")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="directory")
    parser.add_argument("--batches", type=numbers(int), default=[1, 4, 16])
    parser.add_argument("--prompts", type=numbers(int), default=[32, 512], help="tokens")
    parser.add_argument("--thresholds", type=numbers(float), default=[0.5, 0.7, 0.9])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=32, help="per prompt, at least 2")
    parser.add_argument("--assistant-early-exit", type=int, default=20, help="Hugging Face's drafting layer")
    parser.add_argument(
        "--precision", choices=tuple(EPSILON), default="32", help="of weights and computation"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--again", action="store_true", help="measure cells that have results, too")
    parser.add_argument("--quick", action="store_true", help="a smoke test: one small cell, once")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batches, arguments.prompts, arguments.repeats = [1], [8], 1
        arguments.thresholds, arguments.new_tokens = [0.5], 6
    if arguments.new_tokens < 2 or min(*arguments.batches, *arguments.prompts, arguments.repeats) < 1:
        parser.error("--new-tokens must be 2 or more; batches, prompts and repeats 1 or more")
    return arguments


def load(path: Path, settings: dict) -> list[dict]:
    """The results so far.

    Raises:
        SystemExit: they were measured with other settings.
    """
    rows = json.loads(path.read_text()) if path.exists() else []
    if any(row["settings"] != settings for row in rows):
        raise SystemExit(
            f"error: {path}: has results of other settings; choose another --output, or remove it"
        )
    return rows


def save(path: Path, rows: list[dict]) -> None:
    write_text(path, json.dumps(rows, indent=1) + "\n")


def restore(arguments: argparse.Namespace) -> Any:
    """Our model with its exits.

    Raises:
        CheckpointError: a checkpoint without exits, or exits of another base.
        GenerationError: texts longer than the model can read.
    """
    from omegaconf import OmegaConf

    from nemo_ee.errors import CheckpointError, GenerationError
    from nemo_ee.inference.generate import position_limit
    from nemo_ee.inference.run import restore as restore_ours
    from nemo_ee.inference.settings import GenerateConfig
    from nemo_ee.models.trainer_builder import EarlyExitTrainerBuilder

    precision = 32 if arguments.precision == "32" else "bf16"
    trainer = {"devices": 1, "num_nodes": 1, "precision": precision, "logger": False}
    trainer |= {"enable_checkpointing": False, "enable_progress_bar": False}
    builder = EarlyExitTrainerBuilder(
        OmegaConf.create({"trainer": trainer, "model": {"precision": precision}})
    )
    config = GenerateConfig(
        arguments.model, arguments.adapter, megatron_amp_O2=precision == "bf16", precision=precision
    )
    model = restore_ours(config, builder.create_trainer())
    if not model.early_exit.layers:
        raise CheckpointError(f"{arguments.model}: has no exits; give --adapter")
    longest = arguments.prompts[-1] + arguments.new_tokens
    if longest > position_limit(model.cfg):
        raise GenerationError(
            f"--prompts with --new-tokens: the model has {position_limit(model.cfg)} positions"
        )
    read_all(model)
    return model


def read_all(model: Any) -> None:
    """Reads files that are mapped into memory now, not in a call that is measured."""
    for each in model.parameters():
        each.sum()


def restore_both(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Our model, and Hugging Face's; see `restore`."""
    from decoding_ways import load_hugging_face

    model = restore(arguments)
    other = load_hugging_face(arguments.hf, model.gpt.output_weight().dtype)
    read_all(other)
    return model, other


def measure(
    name: str, batch: int, prompt: int, models: tuple[Any, Any], arguments: argparse.Namespace
) -> dict:
    """Measures one cell; returns its row of the results.

    Raises:
        GenerationError: the models are not the same.
    """
    import torch
    from decoding_cell import check_same_weights, chosen_ways, read_prompts, run_cell
    from decoding_ways import all_ways

    from nemo_ee.evaluation import provenance

    model, other = models
    begin = time.monotonic()
    count, repeats = arguments.new_tokens, arguments.repeats
    prompts, kind = read_prompts(arguments.data, batch * repeats, prompt, model.true_vocab_size)
    ways = chosen_ways(
        all_ways(model, other, arguments.thresholds, arguments.assistant_early_exit), batch, prompt
    )
    row = run_cell(model, ways, prompts, batch, count, repeats)
    check_same_weights(row, EPSILON[arguments.precision])
    return {
        "name": name,
        "settings": settings(arguments),
        "batch": batch,
        "prompt": prompt,
        "prompts": kind,
        "exits": list(model.early_exit.layers),
        "layers": model.cfg.num_layers,
        **row,
        "epsilon": EPSILON[arguments.precision],
        "seconds": time.monotonic() - begin,
        "command": provenance.command(),
        "commit": provenance.commit(),
        "device": provenance.device(),
        "torch": torch.__version__,
        "load": provenance.load_average(),
        "date": provenance.date(),
    }


def settings(arguments: argparse.Namespace) -> dict:
    """What results must have in common to stand on one page."""
    kept = ("thresholds", "repeats", "new_tokens", "assistant_early_exit", "precision", "device", "quick")
    files = {key: Path(getattr(arguments, key) or "").name for key in ("model", "adapter", "hf", "data")}
    return {**{key: getattr(arguments, key) for key in kept}, **files}


def main() -> None:
    arguments = parse_arguments()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    path = arguments.output / "decoding.json"
    rows = load(path, settings(arguments))
    order = {f"batch {b}, prompt {p}": (b, p) for p in arguments.prompts for b in arguments.batches}
    missing = [name for name in order if arguments.again or name not in {row["name"] for row in rows}]
    with user_errors():
        import torch
        from decoding_report import write_page

        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("error: --device cuda: there is no GPU; use cpu")
        models = restore_both(arguments) if missing else None
        for name in missing:
            print(f"{name}: …", flush=True)
            row = measure(name, *order[name], models, arguments)
            rows = [each for each in rows if each["name"] != name] + [row]
            save(path, rows)
            print(f"{name}: done in {row['seconds']:.0f} s", flush=True)
        rows.sort(key=lambda row: (row["prompt"], row["batch"]))
        print(write_page(rows, arguments.output))


if __name__ == "__main__":
    main()
