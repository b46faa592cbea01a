# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Pre-training runs of the tiny model in any layout, and of their reference, `tests.support.plain_objective`.

Weights depend on names alone; float64, but for the final exit's loss, which megatron-core computes in float32.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from tests.support.tiny_gpt import fill, tiny_model_config
from tests.support.tuning import OPTIMIZER, SEQUENCE, Layout, back_from_teardown, data_section, tuning_trainer


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        early_exit: the configuration's section.
        overrides: further keys of the model's configuration, dots as ``__``.
        steps: optimizer steps.
        initialise: run the configured initialisation instead of weights by name.
        own_schedule: run nemo_ee's schedule also where no bubbles are filled.
        loss_scale: of half precision, imitated; gradients are divided by it before they are returned.
        without_targets: NeMo's own step function runs, so the module is a plain GPT.
        micro_batches: of every step, for the reference; None takes Megatron's number.
        trainer: further settings of the trainer.
    """

    early_exit: dict[str, Any]
    overrides: dict[str, Any] = field(default_factory=dict)
    steps: int = 2
    initialise: bool = False
    own_schedule: bool = False
    loss_scale: float = 1.0
    without_targets: bool = False
    micro_batches: tuple[int, ...] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What one rank saw.

    Attributes:
        gradients: of the first step, before clipping: global name -> the whole parameter's gradient.
        final: global name -> whole parameter after the last step.
        losses: the final exit's loss of every step.
        statistics: what every step logged under names that begin with `train_`.
        logged: what the trainer logged at the end.
        copies: this stage's copies of the output weight after each step, where they are whole then.
    """

    gradients: dict[str, torch.Tensor]
    final: dict[str, torch.Tensor]
    losses: list[float]
    statistics: list[dict[str, float]]
    logged: dict[str, float]
    copies: list[torch.Tensor]


def pretraining_config(prefixes: dict, case: Case, layout: Layout) -> Any:
    """A complete model section for `MegatronGPTEEPretrainingModel`."""
    overrides = dict(
        micro_batch_size=2,
        global_batch_size=8,
        encoder_seq_length=SEQUENCE,
        make_vocab_size_divisible_by=7,  # 201 tokens: other padding at every TP
        optim=OPTIMIZER,
        data=data_section(prefixes),
        **layout.overrides(),
    )
    config = tiny_model_config(tp=layout.tp, pp=layout.pp, **{**overrides, **case.overrides})
    config.early_exit = case.early_exit
    return config


def pretrain(
    prefixes: dict,
    cases: dict[str, Case],
    layout: Layout,
    plain: bool = False,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Outcome]:
    """Runs every case in this rank's job, one after the other; `plain` runs the reference."""
    return {name: pretrain_one(prefixes, case, layout, plain, dtype) for name, case in cases.items()}


def pretrain_one(
    prefixes: dict,
    case: Case,
    layout: Layout,
    plain: bool,
    dtype: torch.dtype,
    whole_gradients: bool = True,
) -> Outcome:
    """One run through Trainer.fit."""
    from tests.support.plain_objective import PlainObjective

    trainer = tuning_trainer(layout, case.steps, gradient_clip_val=0.5, **case.trainer)
    if dtype == torch.float64:
        torch.cuda.FloatTensor = torch.cuda.DoubleTensor  # NeMo's clipping asserts float32 gradients
    config = pretraining_config(prefixes, case, layout)
    if plain:
        config.activations_checkpoint_granularity = None
    model = (PlainObjective() if plain else Recorder())(config, trainer)
    model.to(dtype)
    for part in model.gpt.modules():
        if getattr(part, "config", None) is not None:
            part.config.params_dtype = part.config.pipeline_dtype = dtype
    fill(model)
    model.first_weights.complete = not case.initialise
    model.keep_gradients, model.counts = whole_gradients, case.micro_batches
    if case.own_schedule:
        from nemo_ee.config import BubbleFillingConfig
        from nemo_ee.models.bubble_filling import BubbleFilling

        model.filling = BubbleFilling(BubbleFillingConfig(), model.gpt)
    scale = 1.0 if plain else case.loss_scale
    if scale != 1.0:
        model.gpt.config.grad_scale_func = lambda loss: loss * scale
    if case.without_targets:
        from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

        model.get_forward_output_and_loss_func = partial(
            MegatronGPTModel.get_forward_output_and_loss_func, model
        )
        model.metrics.finish = lambda _: {}
        trainer.limit_val_batches = 0
    trainer.fit(model)
    back_from_teardown(model)
    return Outcome(
        {name: gradient / scale for name, gradient in model.first_gradients.items()},
        whole_parameters(model.gpt),
        model.seen_losses,
        model.statistics,
        {key: float(value) for key, value in trainer.logged_metrics.items()},
        model.copies,
    )


def Recorder() -> type:  # noqa: N802  (a class, made late: importing NeMo takes long)
    """`MegatronGPTEEPretrainingModel` that keeps gradients, losses and training statistics."""
    from nemo_ee.models.megatron_gpt_ee_pretraining_model import MegatronGPTEEPretrainingModel

    class Recording(MegatronGPTEEPretrainingModel):
        def __init__(self, cfg: Any, trainer: Any):
            super().__init__(cfg, trainer)
            self.first_gradients: dict[str, torch.Tensor] = {}
            self.seen_losses: list[float] = []
            self.statistics: list[dict[str, float]] = []
            self.copies: list[torch.Tensor] = []
            self.keep_gradients = True

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.keep_gradients and not self.first_gradients:
                self.first_gradients = whole_parameters(self.gpt, gradients=True)

        def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            super().log(name, value, *args, **kwargs)
            if name.startswith("train_"):
                self.statistics[-1][name] = float(value)

        def training_step(self, dataloader_iter: Any) -> Any:
            self.statistics.append({})
            loss = super().training_step(dataloader_iter)
            self.seen_losses.append(float(loss))
            return loss

        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_batch_end(*args, **kwargs)
            tied = self.gpt.early_exit.head.projection == "tied"
            # Reading parameters that a step has left to be gathered would have to gather them.
            if tied and self.gpt.output_weight() is not None and not self.overlaps_gathering:
                self.copies.append(self.gpt.output_weight().detach().clone())

    return Recording


def whole_parameters(gpt: Any, gradients: bool = False) -> dict[str, torch.Tensor]:
    """This stage's trainable parameters or their gradients by global name, gathered over tensor parallelism.

    Collectives: one all-gather per parameter; asserts that replicas are equal but for rounding.
    """
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    world = parallel_state.get_tensor_model_parallel_world_size()
    numbers = {f"decoder.layers.{i}.": layer.layer_number for i, layer in enumerate(gpt.decoder.layers)}
    whole = {}
    for name, parameter in gpt.named_parameters():
        if not parameter.requires_grad:
            continue
        for local, number in numbers.items():
            if name.startswith(local):
                name = f"layer{number}." + name.removeprefix(local)
                break
        value = parameter.detach()
        if gradients:
            main = getattr(parameter, "main_grad", None)
            value = parameter.grad if main is None else main
            assert value is not None, f"{name} has no gradient"
        value = value.clone().contiguous()
        parts = [torch.empty_like(value) for _ in range(world)]
        torch.distributed.all_gather(parts, value, group=group)
        if getattr(parameter, "tensor_model_parallel", False):
            dim = parameter.partition_dim
            if "linear_fc1." in name and gpt.config.gated_linear_unit:
                halves = zip(*(part.chunk(2, dim=dim) for part in parts), strict=True)
                value = torch.cat([torch.cat(half, dim) for half in halves])
            else:
                value = torch.cat(parts, dim=dim)
            if name.endswith("projection.weight"):
                value = value[: gpt.exits[name.split(".")[1]].projection.num_kept]
        else:
            for part in parts:
                torch.testing.assert_close(part, value, rtol=1e-6, atol=1e-12)
        if name in ("output_copy", "output_layer.weight", "embedding.word_embeddings.weight"):
            assert not gradients or not value[gpt.true_vocab_size :].any(), (
                f"padding of {name} has a gradient"
            )
            value = value[: gpt.true_vocab_size]
        if name == "output_copy" or (name == "output_layer.weight" and gpt.tied_to_embedding):
            name = ("embedding.word_embeddings" if gpt.tied_to_embedding else "output_layer") + ".weight"
        whole[name] = value
    return whole


def largest_gap(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest difference relative to each tensor's largest element, and where; NaN counts as infinite."""
    worst = (0.0, "")
    for name, value in found.items():
        reference = expected[name]
        scale = reference.abs().max().item() or 1.0
        gap = (value - reference).abs().max().item() / scale
        worst = max(worst, (gap if gap == gap else float("inf"), name))
    return worst
