# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's training strategy for models with exits: idle stages and plain torch optimizers work too."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy
from nemo.core.optim.optimizers import init_optimizer_states
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO
from torch.optim import Optimizer

from nemo_ee.checkpoint.keys import is_extra_state
from nemo_ee.checkpoint.load import check_training_checkpoint, check_values, damage_named, has_fp8_state
from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint, handed_over
from nemo_ee.errors import CheckpointError, RankMissingError
from nemo_ee.models.fused_adam import inner_optimizers, is_torch_adam, keep_kernels, megatron_optimizers
from nemo_ee.runtime import collective
from nemo_ee.runtime.children import writing_checkpoint


class _Launcher(_SubprocessScriptLauncher):
    """Lightning's, which runs a script anew in every other process."""

    @property
    def is_interactive_compatible(self) -> bool:
        """Whether it does without a script."""
        return self.num_processes * self.num_nodes == 1


class EarlyExitDDPStrategy(NLPDDPStrategy):
    """NeMo's strategy, without torch's DDP wrapper.

    NeMo reduces gradients itself; the wrapper would only refuse a pipeline stage that has nothing to train.
    The parameters are made equal over the data-parallel group instead, as the wrapper does.
    """

    def _configure_launcher(self) -> None:
        """Lightning's; in a notebook, too, where there is one process and so nothing to start."""
        super()._configure_launcher()
        if self._launcher is not None:
            self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        """NeMo's: all processes meet.

        Raises:
            RankMissingError: some did not come in time.
        """
        try:
            super().setup_environment()
        except torch.distributed.DistStoreError as error:
            came = re.search(r"(\d+)/(\d+) clients joined", str(error))
            what = f"{came[1]} of {came[2]} processes came" if came else str(error)
            raise RankMissingError(
                f"{what} within model.distributed_timeout_minutes; start them all (srun, torchrun), with the same "
                "MASTER_ADDR and MASTER_PORT"
            ) from error

    def configure_ddp(self) -> None:
        """Leaves the model unwrapped. Collectives: broadcasts trainable parameters over data parallelism."""
        if self.lightning_module.with_distributed_adam:
            super().configure_ddp()
            return
        self._model = self.model
        source = parallel_state.get_data_parallel_src_rank(with_context_parallel=True)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        for parameter in self.lightning_module.parameters():
            if parameter.requires_grad:
                torch.distributed.broadcast(parameter.data, source, group=group)

    def load_checkpoint(self, checkpoint_path: str | Path, load_optimizer_states: bool = True) -> dict:
        """NeMo's, of a checkpoint that has this model's weights and no others. Collective over the world.

        NeMo and megatron-core unpickle what they read without looking: they get a copy of what was checked.

        Raises:
            CheckpointError: it is damaged, holds other things than training writes, or NaN; see `TorchDistCheckpoint`,
                `check_training_checkpoint` and `check_values`.
        """
        module = self.lightning_module
        checkpoint = collective.on_all_ranks(lambda: TorchDistCheckpoint(checkpoint_path))
        (part,) = module.get_model_module_list()
        check_training_checkpoint(part, module.sharded_state_dict(), checkpoint)
        collective.on_first_rank(checkpoint.check_stored_sizes)
        try:
            with handed_over(checkpoint, objects=True) as folder, damage_named(checkpoint):
                loaded = super().load_checkpoint(str(folder), load_optimizer_states)
        except (CheckpointingException, KeyError) as error:  # weights fit, so it is the optimizer's state
            optim, o2 = self.lightning_module.cfg.optim.name, self.lightning_module.megatron_amp_O2
            raise CheckpointError(
                f"{checkpoint_path}: holds another optimizer's state than that of model.optim.name={optim} with "
                f"model.megatron_amp_O2={o2}; go on with those it was written with, or start from the run's .nemo "
                "with model.restore_from_path"
            ) from error
        state = loaded.get("state_dict", {})  # a stage that has nothing to load has none
        if not has_fp8_state(module):  # which Transformer Engine would unpickle
            state.update({key: None for key in state if is_extra_state(key)})
        check_values(
            part, {key.removeprefix("model."): value for key, value in state.items()}, checkpoint.name
        )
        return loaded

    def save_checkpoint(self, checkpoint: dict, filepath: str | Path, storage_options: Any = None) -> None:
        """NeMo's; processes that megatron-core starts for it end with this one, and not before."""
        background = isinstance(self.checkpoint_io, AsyncFinalizableCheckpointIO)
        with nullcontext() if background else writing_checkpoint():
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def _integrate_original_checkpoint_data(self, checkpoint: dict) -> dict:
        """NeMo's, for `restore_from_ckpt`: settings of the new run; a step counter stays with its moments."""
        self.lightning_module.check_resumed(checkpoint)  # while it says what it was written with
        steps = {group["step"] for group in self._get_param_group(checkpoint) if "step" in group}
        checkpoint = super()._integrate_original_checkpoint_data(checkpoint)
        for group in self._get_param_group(checkpoint) if steps else ():
            group["step"] = max(steps)
        return checkpoint

    def optimizer_sharded_state_dict(
        self, unsharded_optim_state: dict | None = None, is_loading: bool = False
    ) -> dict:
        """NeMo's, for torch's Adam and AdamW too, by themselves or within Megatron's and NeMo's wrappers.

        NeMo takes torch's step counters for sharded tensors. They are one number here, `common_step`: the
        highest of all ranks. Megatron's distributed optimizer reads them, also of an optimizer that has made
        no step yet.

        Collectives: one all-reduce over the world for torch's, unless Megatron's optimizer is distributed.
        """
        optimizers = self._torch_optimizers()
        for optimizer in optimizers:
            init_optimizer_states(optimizer)
            _complete_adam_states(optimizer)
        counts = any(map(is_torch_adam, optimizers))  # Apex's count by group
        if self.lightning_module.with_distributed_adam or not counts:
            return super().optimizer_sharded_state_dict(unsharded_optim_state, is_loading)
        with _without_steps(optimizers) as steps:
            state = super().optimizer_sharded_state_dict(unsharded_optim_state, is_loading)
        step = torch.tensor(max(steps, default=0.0), device=self.root_device)
        torch.distributed.all_reduce(step, torch.distributed.ReduceOp.MAX)
        state["common_step"] = step.item()
        return state

    def load_optimizer_state_dict(self, checkpoint: dict) -> None:
        """Gives every parameter its step counter back, then loads as Lightning does."""
        if self.lightning_module.use_mcore_dist_optim:
            self._load_distributed(checkpoint)
            return
        (optimizer,) = self._torch_optimizers()
        for state in checkpoint["optimizer_states"]:
            step = state.pop("common_step", None)
            inner = state.get("optimizer", state)
            keep_kernels(inner.get("param_groups", []), optimizer)
            inner.setdefault("state", {})  # a stage without exits has none, and empty mappings are not stored
            if step is not None:
                inner["state"] = {
                    index: {**entry, "step": torch.tensor(step)}
                    for index, entry in inner["state"].items()
                    if entry
                }
        super().load_optimizer_state_dict(checkpoint)

    def _load_distributed(self, checkpoint: dict) -> None:
        """What Megatron's optimizer loads at once, in two parts: it looks for torch's counters among moments."""
        (state,) = checkpoint["optimizer_states"]
        state["optimizer"]["param_groups"] = self._own_order(state["optimizer"]["param_groups"])
        shards, kind = state.pop("param_state", None), state.pop("param_state_sharding_type", None)
        super().load_optimizer_state_dict(checkpoint)
        optimizer = self.lightning_module.optimizers(use_pl_optimizer=False)
        for part in megatron_optimizers(optimizer) if shards is not None else ():
            load = {
                "fully_sharded_model_space": part.load_parameter_state_from_fs_model_space,
                "dp_zero_gather_scatter": part.load_parameter_state_from_dp_zero,
            }[kind]
            with _without_steps(self._torch_optimizers()):
                load(shards)

    def _own_order(self, saved: list[dict]) -> list[dict]:
        """Saved parameter groups in the order of this rank's.

        A checkpoint has rank 0's, but Megatron orders each pipeline stage's by its first parameters: taken by
        place, matrices would lose their weight decay to vectors.
        """

        def kind(group: dict) -> tuple:
            return group["wd_mult"], group["lr_mult"], group["is_expert_parallel"], group["is_decoupled_lr"]

        found = {kind(group): group for group in saved}
        (mine,) = self._torch_optimizers()
        ordered = [found[kind(group)] for group in mine.param_groups]
        keep_kernels(ordered, mine)
        return ordered

    def _torch_optimizers(self) -> list[Optimizer]:
        return inner_optimizers(self.lightning_module.optimizers(use_pl_optimizer=False))


def _complete_adam_states(optimizer: Optimizer) -> None:
    """Step counters of 0 where NeMo's `init_optimizer_states` made moments alone: torch asks for both."""
    if not is_torch_adam(optimizer):
        return
    for group in optimizer.param_groups:
        on_device = group["capturable"] or group["fused"]
        for parameter in group["params"]:
            if (state := optimizer.state[parameter]) and "step" not in state:
                state["step"] = torch.tensor(0.0, device=parameter.device if on_device else None)


@contextmanager
def _without_steps(optimizers: list[Optimizer]) -> Iterator[list[float]]:
    """Takes the step counters out of the states while within; yields their values."""
    taken = [
        (state, state.pop("step"))
        for optimizer in optimizers
        if is_torch_adam(optimizer)
        for state in optimizer.state.values()
        if "step" in state
    ]
    try:
        yield [float(step) for _, step in taken]
    finally:
        for state, step in taken:
            state["step"] = step.clone()  # Megatron loads one tensor for all, which each would then count up
