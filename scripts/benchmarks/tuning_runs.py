# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What benchmarks of tuning share: configurations of the scripts, a run of tuning, and the quality of its exits."""

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
from harness import ROOT

from nemo_ee.runtime.script import user_errors

TUNING = "model.early_exit.tuning"
CE = ("model.early_exit.tuning.ce_weight=1", f"{TUNING}.kl_weight=0", f"{TUNING}.argmax_weight=0")
KL = (f"{TUNING}.kl_weight=1", f"{TUNING}.argmax_weight=0")


def configuration(name: str, changes: Iterable[str]) -> Any:
    """A configuration of conf/ with changes, as a script composes it."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose(name, list(changes))


def tuning(model: str, layers: str, changes: Iterable[str], train: str = "", validation: str = "") -> Any:
    """The tuning script's configuration, for measuring; on no articles without their prefixes."""
    text = [f"model.data.data_prefix={{train:[{train}],validation:[{validation}],test:[{validation}]}}"]
    common = [f"model.restore_from_path={model}", f"model.early_exit.layers=[{layers}]"]
    common += ["model.validate_at_start=false", "exp_manager=null", *(text if train else [])]
    return configuration("megatron_gpt_ee_tuning", [*common, *changes])


def fit(cfg: Any, *callbacks: Any) -> Any:
    """A run of tuning; returns the model."""
    from nemo_ee.models.megatron_gpt_ee_tuning_model import MegatronGPTEETuningModel
    from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder

    trainer = EarlyExitTrainerBuilder(cfg).create_trainer(list(callbacks))
    model = MegatronGPTEETuningModel.restore_base(cfg, trainer)
    trainer.fit(model)
    return model


def held_out_quality(model: Any, prefix: str, sequences: int, length: int) -> list[dict]:
    """`ExitQuality` of each exit on held-out text, as plain values with intervals."""
    from nemo_ee.evaluation.held_out import held_out_sequences, measure_quality
    from nemo_ee.evaluation.teacher_forced import score_text
    from nemo_ee.generation.generating import generating

    def score(tokens: Any, labels: Any) -> Any:
        with generating(model):
            return score_text(model.gpt, tokens, labels)

    ids = held_out_sequences(prefix, sequences, length, model.true_vocab_size)
    batches = ids.to(model.gpt.output_weight().device).split(4)
    return [asdict(each) for each in measure_quality(score, batches, seed=0).exits]


def with_interval(quality: dict) -> dict[str, float]:
    """{value, low, high} of an agreement."""
    value = quality["agreement"]
    return {"value": value, **(quality["agreement_ci"] or {"low": value, "high": value})}


def in_child(work: Callable, *arguments: Any, threads: int | None = None) -> Any:
    """Calls in a process of its own: Megatron's batch sizes are a process's for good."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_called, threads, work, *arguments).result()


def _called(threads: int | None, work: Callable, *arguments: Any) -> Any:
    if threads is not None:
        torch.set_num_threads(threads)
    with user_errors():
        return work(*arguments)
