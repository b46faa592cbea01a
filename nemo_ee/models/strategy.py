# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's training strategy for models with exits: idle stages and plain torch optimizers work too."""

from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    optim_state_to_sharding_state,
)
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy
from nemo.core.optim.optimizers import init_optimizer_states

from nemo_ee.checkpoint.load import check_training_checkpoint


class EarlyExitDDPStrategy(NLPDDPStrategy):
    """NeMo's strategy, without torch's DDP wrapper.

    NeMo reduces gradients itself; the wrapper would only refuse a pipeline stage that has nothing to train.
    The parameters are made equal over the data-parallel group instead, as the wrapper does.
    """

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

        Raises:
            CheckpointError: see `check_training_checkpoint`.
        """
        check_training_checkpoint(self.lightning_module.sharded_state_dict(), checkpoint_path)
        return super().load_checkpoint(checkpoint_path, load_optimizer_states)

    def optimizer_sharded_state_dict(
        self, unsharded_optim_state: dict | None = None, is_loading: bool = False
    ) -> dict:
        """State of a plain torch optimizer, sharded as its parameters are.

        NeMo's version needs Apex for a name it imports, and takes torch's step counters for sharded tensors.
        They are one number here, `common_step`: the highest of all ranks.

        Collectives: one all-reduce over the world.
        """
        if self.lightning_module.with_distributed_adam or self.lightning_module.megatron_amp_O2:
            return super().optimizer_sharded_state_dict(unsharded_optim_state, is_loading)
        optimizer = self.lightning_module.optimizers(use_pl_optimizer=False)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        init_optimizer_states(optimizer)
        _complete_adam_states(optimizer)
        state = optimizer.state_dict()
        steps = [float(entry.get("step", 0.0)) for entry in state["state"].values()]
        state["state"] = {
            index: {key: value for key, value in entry.items() if key != "step"}
            for index, entry in state["state"].items()
        }
        step = torch.tensor(max(steps, default=0.0), device=self.root_device)
        torch.distributed.all_reduce(step, torch.distributed.ReduceOp.MAX)
        sharded = self.lightning_module.sharded_state_dict()
        optim_state_to_sharding_state(state, get_param_id_to_sharded_param_map(sharded, parameters))
        state["common_step"] = step.item()
        return state

    def load_optimizer_state_dict(self, checkpoint: dict) -> None:
        """Gives every parameter its step counter back, then loads as Lightning does."""
        for state in checkpoint["optimizer_states"]:
            state.setdefault("state", {})  # a stage without exits has none, and empty mappings are not stored
            step = state.pop("common_step", None)
            if step is not None:
                state["state"] = {
                    index: {**entry, "step": torch.tensor(step)}
                    for index, entry in state["state"].items()
                    if entry
                }
        super().load_optimizer_state_dict(checkpoint)


def _complete_adam_states(optimizer: torch.optim.Optimizer) -> None:
    """Step counters of 0 where NeMo's `init_optimizer_states` made moments alone: torch asks for both."""
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        on_device = group["capturable"] or group["fused"]
        for parameter in group["params"]:
            if (state := optimizer.state[parameter]) and "step" not in state:
                state["step"] = torch.tensor(0.0, device=parameter.device if on_device else None)
