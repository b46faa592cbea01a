# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What benchmarks of tuning share: the tuning script's configuration, a run of it, and its exits' quality."""

from collections.abc import Iterable
from typing import Any

from harness import ROOT

TUNING = "model.early_exit.tuning"


def configuration(name: str, changes: Iterable[str]) -> Any:
    """A configuration of conf/ with changes, as a script composes it."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose(name, list(changes))


def tuning(model: str, layers: str, train: str, validation: str, changes: Iterable[str]) -> Any:
    """The tuning script's configuration, for measuring."""
    text = f"{{train:[{train}],validation:[{validation}],test:[{validation}]}}"
    common = [f"model.restore_from_path={model}", f"model.early_exit.layers=[{layers}]"]
    common += [f"model.data.data_prefix={text}", "model.validate_at_start=false", "exp_manager=null"]
    return configuration("megatron_gpt_ee_tuning", [*common, *changes])


def fit(cfg: Any, *callbacks: Any) -> Any:
    """A run of tuning; returns the model."""
    from nemo_ee.models.megatron_gpt_ee_tuning_model import MegatronGPTEETuningModel
    from nemo_ee.models.trainer_builder import EarlyExitTrainerBuilder

    trainer = EarlyExitTrainerBuilder(cfg).create_trainer(list(callbacks))
    model = MegatronGPTEETuningModel.restore_base(cfg, trainer)
    trainer.fit(model)
    return model


def held_out_quality(model: Any, prefix: str, sequences: int, length: int) -> list[dict]:
    """`ExitQuality` of each exit on held-out text, as plain values with intervals."""
    from dataclasses import asdict

    from nemo_ee.evaluation.held_out import held_out_sequences, measure_quality
    from nemo_ee.evaluation.teacher_forced import score_text
    from nemo_ee.inference.generate import generating

    def score(tokens: Any, labels: Any) -> Any:
        with generating(model):
            return score_text(model.gpt, tokens, labels)

    ids = held_out_sequences(prefix, sequences, length, model.true_vocab_size)
    batches = ids.to(model.gpt.output_weight().device).split(4)
    return [asdict(each) for each in measure_quality(score, batches, seed=0).exits]


def with_interval(quality: dict, metric: str = "agreement") -> dict[str, float]:
    """{value, low, high} of a report's value and interval."""
    around = quality[f"{metric}_ci"] or {"low": quality[metric], "high": quality[metric]}
    return {"value": quality[metric], **around}
