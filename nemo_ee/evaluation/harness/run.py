# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A run of lm-evaluation-harness: from checkpoints and names of tasks to results on disk."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from nemo_ee.decoding.request import ExitOptions, parse_request
from nemo_ee.errors import CheckpointError, ConfigError, Fault
from nemo_ee.evaluation.harness.gen_kwargs import read_gen_kwargs
from nemo_ee.evaluation.harness.language_model import EarlyExitLM, check_max_length
from nemo_ee.evaluation.harness.page import SweepResult, TaskResult, WayResult, write_page
from nemo_ee.evaluation.harness.settings import LmEvalConfig
from nemo_ee.evaluation.harness.sweep import FULL_DEPTH, Answers, SweepLM, require_greedy
from nemo_ee.evaluation.harness.tasks import LOCAL_TASKS, write_tasks
from nemo_ee.evaluation.scored_model import restore
from nemo_ee.files.output import claim, write_text
from nemo_ee.generation.generating import position_limit
from nemo_ee.report.provenance import device, metadata
from nemo_ee.report.statistics import bootstrap_mean, spread
from nemo_ee.running.restore import read_exits
from nemo_ee.schema import nearest

RESULTS, ANSWERS = "results.json", "answers.jsonl"


def run(config: LmEvalConfig, trainer: Any) -> list[Path]:
    """Writes the tasks that are wanted, evaluates, prints the harness's table, and writes results.

    Args:
        config: what to evaluate, and on what.
        trainer: of one process, of precision `config.precision`.

    Returns:
        The files written, those of tasks included.

    Raises:
        ConfigError, CheckpointError, DataError: before the model is built, as far as settings and files show it.
        GenerationError: a prompt that cannot be continued.
        OutputError: another process is writing there, or nothing can be written there.
    """
    local = [name for name in config.tasks or LOCAL_TASKS if name in LOCAL_TASKS]
    if config.tasks:
        _check_model(config)
    written = write_tasks(config.tasks_dir, config.downloads_dir, local, config.exclude_file)
    if not config.tasks:
        return written
    manager = _task_manager(config)
    directory = Path(config.output_dir)
    with claim(directory / RESULTS):
        if config.thresholds is None:
            return written + _evaluate(config, trainer, manager, directory)
        answers = Answers(directory / ANSWERS, _what_answers_depend_on(config))
        return written + _sweep(config, trainer, manager, directory, answers)


def _check_model(config: LmEvalConfig) -> None:
    """What the model's files show to be wrong with the settings."""
    base, early_exit = read_exits(config)
    check_max_length(config.max_length, position_limit(base))
    wanted = read_gen_kwargs(config.gen_kwargs or {}, config.max_gen_toks)
    if config.thresholds is None:
        parse_request(None, None, dict(vars(config.early_exit)), early_exit)
        return
    require_greedy(wanted)
    if not early_exit.layers:
        raise CheckpointError(f"{config.gpt_model_file}: has no exits to sweep over; set adapter_file")
    if config.exits is not None and (not config.exits or not set(config.exits) <= set(early_exit.layers)):
        rule = f"not all of the model's exits {list(early_exit.layers)}"
        raise ConfigError(Fault("exits", list(config.exits), rule, "name exit layers that exist, or null"))


def _task_manager(config: LmEvalConfig) -> TaskManager:
    """Of the local tasks alone, where they are enough: the harness's own are many."""
    for own in (False, True):
        manager = TaskManager(include_path=config.tasks_dir, include_defaults=own)
        known = manager.all_tasks
        if not (unknown := [name for name in config.tasks if name not in known]):
            return manager
    remedy = nearest(unknown[0], known) or "lm-eval ls tasks lists the harness's own"
    rule = f"{unknown[0]} is neither a task of the harness nor one in tasks_dir={config.tasks_dir}"
    raise ConfigError(Fault("tasks", list(config.tasks), rule, remedy))


def _model(config: LmEvalConfig, trainer: Any) -> Any:
    model = restore(config, trainer)
    model.prepare_decoding(
        config.weights,
        rows=config.batch_size,
        prices_file=config.prices_file,
        output_layer=config.output_layer,
    )
    return model


def _simple_evaluate(
    config: LmEvalConfig, lm: EarlyExitLM, tasks: Sequence[Any], manager: TaskManager
) -> dict:
    return simple_evaluate(
        model=lm,
        tasks=list(tasks),
        num_fewshot=config.num_fewshot,
        batch_size=config.batch_size,
        limit=config.limit,
        system_instruction=config.system,
        apply_chat_template=config.chat,
        fewshot_as_multiturn=config.chat,
        gen_kwargs=dict(config.gen_kwargs or {}) or None,
        task_manager=manager,
        **dict.fromkeys(
            ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), config.seed
        ),
    )


def _options(config: LmEvalConfig) -> dict[str, Any]:
    return {"max_length": config.max_length, "max_gen_toks": config.max_gen_toks, "seed": config.seed}


def _evaluate(config: LmEvalConfig, trainer: Any, manager: TaskManager, directory: Path) -> list[Path]:
    model = _model(config, trainer)
    exits = None if config.early_exit == ExitOptions() else dict(vars(config.early_exit))
    lm = EarlyExitLM(model, exits, config.batch_size, **_options(config))
    results = _simple_evaluate(config, lm, config.tasks, manager)
    print(make_table(results))
    written = []
    for task, samples in results.pop("samples").items():
        lines = [json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples]
        written.append(write_text(directory / f"samples_{task}.jsonl", "".join(lines)))
    results["model"] = vars(metadata(config, model))
    text = json.dumps(results, indent=1, ensure_ascii=False, default=str) + "\n"
    return [*written, write_text(directory / RESULTS, text)]


def _what_answers_depend_on(config: LmEvalConfig) -> dict[str, Any]:
    """Beside the prompts, by which answers are known, and thresholds."""
    names = ("exits", "max_length", "weights", "output_layer", "precision")
    files = {name: getattr(config, name) for name in ("gpt_model_file", "adapter_file")}
    return {
        **{name: path and _as_it_is_now(path) for name, path in files.items()},
        **{name: getattr(config, name) for name in names},
        "device": device(),
    }


def _as_it_is_now(path: str) -> str:
    """A file's name, and what tells it from another one that takes its place, as exits that were tuned anew do."""
    there = os.stat(path)
    changed = datetime.fromtimestamp(there.st_mtime, UTC).isoformat(timespec="seconds")
    return f"{path} ({there.st_size} bytes of {changed})"


def _sweep(
    config: LmEvalConfig, trainer: Any, manager: TaskManager, directory: Path, answers: Answers
) -> list[Path]:
    members = manager.load(list(config.tasks))["tasks"]
    if groups := sorted((config.task_thresholds or {}).keys() - members.keys()):
        rule = f"{groups[0]} is a group, and thresholds are of its tasks"
        fault = Fault(
            "task_thresholds", dict(config.task_thresholds or {}), rule, "name tasks, or use thresholds"
        )
        raise ConfigError(fault)
    model = _model(config, trainer)
    lm = SweepLM(model, answers, **_options(config))
    exits = model.early_exit.layers if config.exits is None else config.exits
    tasks = []
    for task, loaded in members.items():
        lm.begin(config.thresholds_of(task), exits)
        found = {}
        for name in lm.ways:
            lm.current = name
            results = _simple_evaluate(config, lm, [loaded], manager)
            found[name] = results["results"][task]
        examples, shots = results["n-samples"][task]["effective"], results["n-shot"][task]
        ways = [_way(lm, name, found[name], config.seed) for name in lm.ways]
        at_once = sum(len(each["texts"][FULL_DEPTH]["tokens"]) <= 1 for each in lm.answered())
        tasks.append(TaskResult(task, examples, shots, tuple(ways), at_once))
    where = metadata(config, model)
    excluded = config.exclude_file is not None
    result = SweepResult(where, tuple(exits), version("lm-eval"), excluded, tuple(tasks))
    return write_page(result, directory)


def _way(lm: SweepLM, name: str, scores: Mapping[str, Any], seed: int) -> WayResult:
    """What the harness scored, and what was noted of the answers."""
    threshold = None if name == FULL_DEPTH else float(name)
    values = {metric: (float(value), _error(scores, metric)) for metric, value in _metrics(scores)}
    answered = lm.answered()
    if not answered:
        return WayResult(name, threshold, values)
    texts = [each["texts"][name] for each in answered]
    full = [each["texts"][FULL_DEPTH] for each in answered]
    layers = [(int(n), count) for each in texts for n, count in each["layers"].items()]
    tokens, deepest = sum(count for _, count in layers), lm.model.cfg.num_layers
    agreeing, counted = zip(*(each["agreeing"][name] for each in answered), strict=True)
    agreement, around = bootstrap_mean(agreeing, counted, seed=seed) if any(counted) else (1.0, None)
    pairs = [(_rate(mine), _rate(theirs)) for mine, theirs in zip(texts, full, strict=True)]
    both = zip(texts, full, strict=True)
    same = [mine["tokens"] == theirs["tokens"] for mine, theirs in both if len(theirs["tokens"]) > 1]
    timed = [(mine, theirs) for mine, theirs in pairs if mine and theirs]
    return WayResult(
        name,
        threshold,
        values,
        left=sum(count for n, count in layers if n < deepest) / tokens,
        layers=sum(n * count for n, count in layers) / (deepest * tokens),
        agreement=agreement,
        agreement_ci=around,
        same=fmean(same) if same else None,
        tokens_per_second=spread([mine for mine, _ in timed]) if timed else None,
        speedup=spread([mine / theirs for mine, theirs in timed]) if timed else None,
    )


def _rate(text: Mapping[str, Any]) -> float | None:
    """Tokens per second behind prompt and first step; None of a text that ends there."""
    tokens, seconds = text["steps"]
    return tokens / seconds if tokens and seconds else None


def _metrics(scores: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """`metric,filter` and numbers among what the harness says of a task."""
    named = ((name, value) for name, value in scores.items() if "," in name and "_stderr," not in name)
    return ((name, value) for name, value in named if isinstance(value, int | float))


def _error(scores: Mapping[str, Any], metric: str) -> float | None:
    name, _, kind = metric.partition(",")
    error = scores.get(f"{name}_stderr,{kind}")
    return float(error) if isinstance(error, int | float) else None
