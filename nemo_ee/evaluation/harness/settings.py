# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The settings of a run of lm-evaluation-harness, read once from `conf/lm_eval_early_exit.yaml` and its overrides."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from nemo_ee.config import check_thresholds
from nemo_ee.decoding.cpu.lean_weights import WEIGHT_KINDS
from nemo_ee.decoding.cpu.output_search import OUTPUT_LAYERS
from nemo_ee.decoding.request import ExitOptions
from nemo_ee.errors import Fault
from nemo_ee.schema import Positive, Settings, choice

LONGEST_SWEEP = 101
"""That a sweep may count: steps of a hundredth."""


@dataclass(frozen=True)
class LmEvalConfig(Settings):
    """A run of the harness: one way to decode, or a sweep over thresholds.

    Attributes:
        gpt_model_file: the base, or a model merged with its exits, a `.nemo`; may be null without `tasks`.
        adapter_file: the exits alone; null if they are part of the model.
        tasks: names; empty only writes the tasks of `tasks_dir`.
        tasks_dir: of task files beside the harness's own. Those of `LOCAL_TASKS` are written there where missing.
        downloads_dir: where files of packages are kept that local tasks are made of.
        exclude_file: JSONL of chats that exits were tuned on, whose questions are left out of local tasks.
        limit: examples per task, the first ones; null for all.
        num_fewshot: solved examples in front of each; null for what a task says.
        gen_kwargs: of tasks that generate, beside what a task says; see `read_gen_kwargs`.
        chat: ask in the tokenizer's chat template.
        system: what the system says in chats; null for nothing.
        early_exit: when tokens may leave; not for a sweep.
        thresholds: of a sweep, each for all exits, or how many, evenly from 1 to 0; full depth is always measured
            beside. Null for no sweep.
        task_thresholds: task -> the same, where it has others.
        exits: exit layers that a sweep uses; null for all.
        batch_size: texts at a time; a sweep generates one at a time.
        max_length: positions in use; null for the model's.
        max_gen_toks: of tasks that say no length.
        output_dir: of results.
        seed: of few-shot examples, of what is drawn, and of the bootstrap.
        weights: how decoding holds them, see `prepare_decoding`.
        output_layer: see `prepare_decoding`.
        prices_file: JSON, see `prepare_decoding`.
        precision: of weights and activations: 32, bf16 or 16.
    """

    gpt_model_file: str | None = None
    adapter_file: str | None = None
    tasks: tuple[str, ...] = ()
    tasks_dir: str = "lm_eval_tasks"
    downloads_dir: str = "downloads"
    exclude_file: str | None = None
    limit: Positive | None = None
    num_fewshot: int | None = None
    gen_kwargs: Mapping | None = None
    chat: bool = False
    system: str | None = None
    early_exit: ExitOptions = field(default_factory=ExitOptions)
    thresholds: int | tuple[float, ...] | None = None
    task_thresholds: Mapping | None = None
    exits: tuple[int, ...] | None = None
    batch_size: Positive = 1
    max_length: int | None = None
    max_gen_toks: Positive = 256
    output_dir: str = "lm_eval_results"
    seed: int = 1234
    weights: Annotated[str, choice(*WEIGHT_KINDS)] = "native"
    output_layer: Annotated[str, choice(*OUTPUT_LAYERS)] = "exact8"
    prices_file: str | None = None
    precision: str | int = 32

    def faults(self) -> list[Fault]:
        """See `Settings`."""
        found = []
        if self.tasks and self.gpt_model_file is None:
            found.append(
                Fault("gpt_model_file", None, "is required for tasks", "set gpt_model_file=model.nemo")
            )
        if len(set(self.tasks)) != len(self.tasks):
            found.append(Fault("tasks", list(self.tasks), "must each be named once", "leave one out"))
        if self.num_fewshot is not None and self.num_fewshot < 0:
            found.append(Fault("num_fewshot", self.num_fewshot, "must be 0 or more", "use 0, or null"))
        if self.system is not None and not self.chat:
            found.append(Fault("system", self.system, "is for chats alone", "set chat=true, or system=null"))
        return found + _sweep_faults(self)

    def thresholds_of(self, task: str) -> tuple[float, ...]:
        """Of a sweep over a task, the highest first where they are counted."""
        given = (self.task_thresholds or {}).get(task, self.thresholds)
        if isinstance(given, int):
            return tuple(round(1.0 - i / (given - 1), 6) for i in range(given))
        return tuple(map(float, given))


def _sweep_faults(config: LmEvalConfig) -> list[Fault]:
    if config.thresholds is None:
        of_sweeps = {"exits": config.exits, "task_thresholds": config.task_thresholds}
        rule, remedy = "is of a sweep, and there are no thresholds", "set early_exit.exits, or thresholds"
        return [Fault(name, value, rule, remedy) for name, value in of_sweeps.items() if value]
    found = _threshold_faults("thresholds", config.thresholds)
    for task, given in (config.task_thresholds or {}).items():
        found += _threshold_faults(f"task_thresholds.{task}", given)
        if task not in config.tasks:
            rule = f"{task} is none of tasks={list(config.tasks)}"
            found.append(Fault("task_thresholds", dict(config.task_thresholds or {}), rule, "leave it out"))
    if config.early_exit != ExitOptions():
        given = {name: value for name, value in vars(config.early_exit).items() if value is not None}
        rule = "a sweep sets thresholds itself, and asks exits for every token"
        found.append(Fault("early_exit", given, rule, "leave it out, or set thresholds=null"))
    if config.batch_size != 1:
        rule = "a sweep times one text at a time"
        found.append(Fault("batch_size", config.batch_size, rule, "set batch_size=1"))
    return found


def _threshold_faults(key: str, given: Any) -> list[Fault]:
    remedy = "give e.g. [1.0,0.8,0.6], or how many, from 2 on"
    if isinstance(given, int) and not isinstance(given, bool):
        rule = f"must be from 2 to {LONGEST_SWEEP}"
        return [] if 2 <= given <= LONGEST_SWEEP else [Fault(key, given, rule, remedy)]
    if not isinstance(given, list | tuple) or not given:
        return [Fault(key, given, "must be thresholds", remedy)]
    faults = [fault for value in given for fault in check_thresholds(value, 1, key)]
    if not faults and len(set(map(float, given))) != len(given):
        faults.append(Fault(key, given, "must each be named once", remedy))
    return faults
