# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tuning runs of the tiny model through Trainer.fit, in any parallel layout, with all that is to be compared.

Everything is in float64 unless asked otherwise, so that layouts can be told apart from rounding. Weights
depend on names alone (`tests.support.tiny_gpt.fill`), so every layout starts from the same model.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.tiny_gpt import VOCABULARY, tiny_model_config, tiny_trainer

SEQUENCE = 16
EOS = 0
OPTIMIZER = dict(
    name="adamw",
    lr=3e-3,
    weight_decay=0.01,
    betas=[0.9, 0.95],
    sched=dict(name="CosineAnnealing", warmup_steps=2, constant_steps=0, min_lr=1e-4, max_steps=20),
)


@dataclass(frozen=True)
class Layout:
    """How ranks are arranged; `first` and `last` are numbers of layers of uneven pipelines."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: bool = False
    first: int | None = None
    last: int | None = None

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def overrides(self) -> dict[str, Any]:
        """Of `tiny_model_config`."""
        return dict(
            sequence_parallel=self.sp,
            num_layers_in_first_pipeline_stage=self.first,
            num_layers_in_last_pipeline_stage=self.last,
        )


@dataclass(frozen=True)
class Case:
    """One tuning run.

    Attributes:
        early_exit: the configuration's section.
        overrides: further keys of the model's configuration, dots as ``__``.
        initialise: run the configured initialisation instead of weights by name.
        steps: optimizer steps.
    """

    early_exit: dict[str, Any]
    overrides: dict[str, Any] = field(default_factory=dict)
    initialise: bool = False
    steps: int = 10


@dataclass
class Outcome:
    """What one rank saw of a run.

    Attributes:
        train: per step, exit layer -> (loss, divergence, agreement, confidence, objective).
        validation: the same, per validation batch and at last the epoch's means.
        logged: the trainer's logged metrics at the end.
        initial: the exits' parameters of this stage before the first step, whole, by name.
        final: the same after the last step.
        backbone_unchanged: whether every byte outside the exits is the same as before.
        optimizer: names of parameters with optimizer state -> that state.
        rates: learning rate of every step.
        layers: transformer layers of this stage.
    """

    train: list[dict[int, tuple]]
    validation: list[dict[int, tuple]]
    logged: dict[str, float]
    initial: dict[str, torch.Tensor]
    final: dict[str, torch.Tensor]
    backbone_unchanged: bool
    optimizer: dict[str, dict[str, torch.Tensor]]
    rates: list[float]
    layers: int


def write_text(folder: Path, documents: int = 60, vocabulary: int = VOCABULARY) -> dict[str, list[str]]:
    """Writes indexed text of few frequent and many rare words, two splits; returns `data_prefix`."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(7)
    shares = 1.0 / np.arange(1, vocabulary) ** 0.8
    prefixes = {}
    for split in ("train", "validation"):
        prefix = folder / split
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for _ in range(documents):
            length = int(generator.integers(8, 40))
            words = generator.choice(np.arange(1, vocabulary), size=length, p=shares / shares.sum())
            builder.add_document([*words.tolist(), EOS], [length + 1])
        builder.finalize(f"{prefix}.idx")
        prefixes[split] = [str(prefix)]
    return {**prefixes, "test": None}


def data_section(prefixes: dict) -> dict[str, Any]:
    """The `data` section of a run."""
    return dict(
        data_prefix=prefixes,
        data_impl="mmap",
        splits_string=None,
        seq_length=SEQUENCE,
        num_workers=0,
        dataloader_type="single",
        index_mapping_dir=None,
        eod_mask_loss=True,  # numbers of counting tokens differ between micro-batches
        reset_position_ids=False,
        reset_attention_mask=False,
        validation_drop_last=True,
    )


def resume_in(folder: str, trainer: Any) -> None:
    """NeMo's exp_manager: checkpoints in a folder, and going on from the last one there."""
    from nemo.utils.exp_manager import exp_manager
    from omegaconf import OmegaConf

    settings = dict(
        explicit_log_dir=folder,
        create_tensorboard_logger=False,
        create_checkpoint_callback=True,
        resume_if_exists=True,
        resume_ignore_no_checkpoint=True,
        use_datetime_version=False,
        log_tflops_per_sec_per_gpu=False,
        checkpoint_callback_params=dict(
            monitor="val_loss",
            mode="min",
            save_top_k=1,
            save_last=True,
            save_nemo_on_train_end=False,
            filename="run--{val_loss:.3f}-{step}-{consumed_samples}",
        ),
    )
    exp_manager(trainer, OmegaConf.create(settings))


def tuning_config(prefixes: dict, case: Case, layout: Layout) -> Any:
    """A complete model section for `MegatronGPTEETuningModel`."""
    overrides = dict(
        micro_batch_size=2,
        global_batch_size=8,
        make_vocab_size_divisible_by=7,  # 201 tokens: other padding at every TP
        optim=OPTIMIZER,
        data=data_section(prefixes),
        **layout.overrides(),
    )
    for key, value in case.overrides.items():
        overrides[key] = value
    config = tiny_model_config(tp=layout.tp, pp=layout.pp, **overrides)
    config.early_exit = case.early_exit
    return config


def tune(
    prefixes: dict, cases: dict[str, Case], layout: Layout, dtype: torch.dtype = torch.float64
) -> dict[str, Outcome]:
    """Runs every case in this rank's job, one after the other."""
    return {name: tune_one(prefixes, case, layout, dtype) for name, case in cases.items()}


def tune_one(prefixes: dict, case: Case, layout: Layout, dtype: torch.dtype = torch.float64) -> Outcome:
    """One run through Trainer.fit, validation at its end."""
    trainer = tuning_trainer(layout, case.steps)
    model = prepared(prefixes, case, layout, trainer, dtype)
    before = backbone_hash(model)
    trainer.fit(model)
    return outcome_of(model, trainer, before)


def trainer_settings(steps: int) -> dict[str, Any]:
    """Of a trainer that validates at the end and clips gradients."""
    return dict(
        max_steps=steps,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        gradient_clip_val=0.5,
        log_every_n_steps=1,
    )


def tuning_trainer(layout: Layout, steps: int, **settings: Any) -> Any:
    """See `trainer_settings`."""
    return tiny_trainer(layout.world_size, **{**trainer_settings(steps), **settings})


def prepared(prefixes: dict, case: Case, layout: Layout, trainer: Any, dtype: torch.dtype) -> Any:
    """The model to fit, its weights set by name."""
    from tests.support.tiny_gpt import fill

    if dtype == torch.float64:
        torch.cuda.FloatTensor = torch.cuda.DoubleTensor  # NeMo's clipping asserts float32 gradients
    model = recorder()(tuning_config(prefixes, case, layout), trainer)
    model.to(dtype)
    if dtype == torch.float64:
        for part in model.gpt.modules():
            if getattr(part, "config", None) is not None:
                part.config.params_dtype = part.config.pipeline_dtype = dtype
    fill(model)
    model.first_weights.complete = not case.initialise
    return model


def outcome_of(model: Any, trainer: Any, before: str) -> Outcome:
    """What is to be compared after a fit; `before` is the backbone's hash before it."""
    state = model.optimizers(use_pl_optimizer=False).state
    back_from_teardown(model)
    return Outcome(
        train=model.seen[True],
        validation=model.seen[False],
        logged={key: float(value) for key, value in trainer.logged_metrics.items()},
        initial=model.initial,
        final=whole_exits(model.gpt),
        backbone_unchanged=before == backbone_hash(model),
        optimizer={
            name: {key: value.clone() for key, value in state[parameter].items()}
            for name, parameter in model.gpt.named_parameters()
            if parameter in state
        },
        rates=model.rates,
        layers=len(model.gpt.decoder.layers),
    )


def back_from_teardown(model: Any) -> None:
    """After a fit Lightning leaves the model on the CPU, where NCCL gathers nothing."""
    if torch.cuda.is_available():
        model.cuda()


def recorder() -> type:
    """`MegatronGPTEETuningModel` that keeps what it logs, and its exits' first weights."""
    from nemo_ee.models.megatron_gpt_ee_tuning_model import MegatronGPTEETuningModel

    class Recorder(MegatronGPTEETuningModel):
        def __init__(self, cfg: Any, trainer: Any):
            super().__init__(cfg, trainer)
            self.seen: dict[bool, list] = {True: [], False: []}
            self.initial: dict[str, torch.Tensor] = {}
            self.rates: list[float] = []

        def training_step(self, dataloader_iter: Any) -> Any:
            self.rates.append(self._optimizer.param_groups[0]["lr"])
            return super().training_step(dataloader_iter)

        def objective(self, means: dict) -> torch.Tensor:
            row = {
                n: (m.loss, m.divergence, m.agreement, m.confidence, m.objective) for n, m in means.items()
            }
            self.seen[bool(self.trainer.training)].append(row)
            return super().objective(means)

        def on_train_start(self) -> None:
            super().on_train_start()
            self.initial = whole_exits(self.gpt)

    return Recorder


def whole_exits(gpt: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers of this stage's exits, gathered over tensor parallelism, without padding.

    Collectives: one all-gather per sharded parameter; asserts that replicas are equal.
    """
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    world = parallel_state.get_tensor_model_parallel_world_size()
    whole = {}
    kept = (
        gpt.exits.state_dict()
    )  # lookups that a projection derives have rows of padding, which depend on TP
    buffers = [(name, buffer) for name, buffer in gpt.exits.named_buffers() if name in kept]
    for name, tensor in [*gpt.exits.named_parameters(), *buffers]:
        value = tensor.detach().clone().contiguous()
        parts = [torch.empty_like(value) for _ in range(world)]
        torch.distributed.all_gather(parts, value, group=group)
        if getattr(tensor, "tensor_model_parallel", False):
            if "linear_fc1." in name and gpt.config.gated_linear_unit:
                halves = zip(*(part.chunk(2, dim=tensor.partition_dim) for part in parts), strict=True)
                value = torch.cat([torch.cat(half, tensor.partition_dim) for half in halves])
            else:
                value = torch.cat(parts, dim=tensor.partition_dim)
            if name.endswith("projection.weight"):
                value = value[: gpt.exits[name.split(".")[0]].projection.num_kept]
        else:
            for part in parts:
                assert torch.equal(part, value), f"{name} differs between tensor-parallel ranks"
        whole[name] = value
    return whole


def backbone_hash(model: Any) -> str:
    """Of every tensor of this rank that does not belong to an exit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.gpt.state_dict().items()):
        if not name.startswith("exits.") and isinstance(tensor, torch.Tensor):
            digest.update(
                name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()


def largest_difference(found: list[Outcome], expected: Outcome) -> dict[str, float]:
    """Largest absolute differences of losses, statistics and parameters between ranks' outcomes and one's."""
    worst = dict(train=0.0, validation=0.0, initial=0.0, final=0.0)
    for outcome in found:
        for what in ("train", "validation"):
            mine, other = getattr(outcome, what), getattr(expected, what)
            assert len(mine) == len(other), f"{what}: {len(mine)} against {len(other)} batches"
            for step, reference in zip(mine, other, strict=True):
                assert step.keys() == reference.keys(), f"{what}: {step.keys()} against {reference.keys()}"
                for n, values in step.items():
                    gaps = [abs(a - b) for a, b in zip(values, reference[n], strict=True)]
                    worst[what] = worst_of(worst[what], *gaps)
        for what in ("initial", "final"):
            for name, value in getattr(outcome, what).items():
                gap = (value - getattr(expected, what)[name]).abs().max().item() if value.numel() else 0.0
                worst[what] = worst_of(worst[what], gap)
    return worst


def worst_of(*gaps: float) -> float:
    """The largest, or NaN if one is: Python's `max` drops NaN unless it comes first."""
    return float(np.max(gaps))


def restored_for_tuning(
    kind: type, base: str, early_exit: dict, tp: int = 1, pp: int = 1, trainer: Any = None, **overrides: Any
) -> Any:
    """A tuning model restored from the `.nemo` of a backbone; `overrides` as for `tiny_model_config`."""
    from omegaconf import OmegaConf

    config = kind.add_exits(kind.restore_from(base, return_config=True), early_exit)
    settings = dict(optim=OPTIMIZER, micro_batch_size=2, global_batch_size=4)
    for key, value in {**settings, **overrides}.items():
        OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
    config.tensor_model_parallel_size, config.pipeline_model_parallel_size = tp, pp
    return kind.restore_from(base, override_config_path=config, trainer=trainer or tiny_trainer(tp * pp))
