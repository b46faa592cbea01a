# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""First weights of exits: from the backbone's own modules, random, or in closed form (ridge)."""

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from torch import Tensor

from nemo_ee.core.ridge import RidgeAccumulator
from nemo_ee.megatron.exit_loss import reduce_over_ranks
from nemo_ee.megatron.gpt import EarlyExitGPTModel, StageStates
from nemo_ee.megatron.heads import replicated
from nemo_ee.megatron.projection import ExitProjection
from nemo_ee.megatron.tuning_step import MicroBatch, by_position, whole_tokens


def copy_sources(gpt: EarlyExitGPTModel, num_layers: int, prefix: str = "model.") -> ShardedStateDict:
    """Where each head's copied weights stand in the backbone's checkpoint, so that loading it copies them.

    The MLP comes from the exit's own layer, the block from the last layer, the norm from the final norm
    (EE-Tuning, arXiv:2402.00518 section 3). Works at any TP and PP, and above a truncated backbone.

    Args:
        gpt: this stage's module.
        num_layers: depth of the checkpoint.
        prefix: of the checkpoint's keys.

    Returns:
        The heads' local keys -> sharded tensors with the backbone's keys.
    """
    sources: ShardedStateDict = {}
    layers = f"{prefix}decoder.layers."
    for n in gpt.exit_layers:
        head, mine = gpt.exits[str(n)], f"{prefix}exits.{n}."
        if head.block is not None:
            state = head.block.sharded_state_dict(layers, ((0, num_layers - 1, num_layers),))
            sources |= {f"{mine}block.{key.removeprefix(layers)}": entry for key, entry in state.items()}
        if head.mlp is not None:
            where = ((0, n - 1, num_layers),)
            state = head.mlp.mlp.sharded_state_dict(f"{layers}mlp.", where)
            sources |= {f"{mine}mlp.{key.removeprefix(layers)}": entry for key, entry in state.items()}
            state = _norm_state(head.mlp.norm, f"{layers}pre_mlp_layernorm.", where)
            sources |= {f"{mine}mlp.norm.{key.rpartition('.')[2]}": entry for key, entry in state.items()}
        if head.norm is not None:
            state = _norm_state(head.norm, f"{prefix}decoder.final_layernorm.", ())
            sources |= {f"{mine}norm.{key.rpartition('.')[2]}": entry for key, entry in state.items()}
    return {key: entry for key, entry in sources.items() if not key.endswith("_extra_state")}


def _norm_state(norm: torch.nn.Module, prefix: str, offsets: tuple) -> ShardedStateDict:
    return {
        f"{prefix}{name}": replicated(parameter.data, f"{prefix}{name}", offsets)
        for name, parameter in norm.named_parameters()
    }


def initialise_projections(
    gpt: EarlyExitGPTModel, shortlist: Tensor | None, random_std: float | None
) -> None:
    """Fills untied and shortlist projections: rows of the output weight, or normal noise.

    Args:
        gpt: this stage's module.
        shortlist: [k] kept tokens, for shortlist projections.
        random_std: standard deviation of random rows; None copies the backbone's.

    Collectives: for a shortlist one all-reduce of [k, H] over the tensor-parallel group.
    """
    for n in gpt.exit_layers:
        projection = gpt.exits[str(n)].projection
        if projection.kind == "shortlist":
            projection.set_shortlist(shortlist)
        if projection.kind == "tied":
            continue
        with torch.no_grad():
            if random_std is not None:
                rows = _noise((projection.num_rows, projection.weight.shape[1]), random_std, n)
                first = projection.first_row
                projection.weight.copy_(rows[first : first + projection.rows_per_rank])
            elif projection.kind == "untied":
                projection.weight.copy_(gpt.output_weight())
            else:
                projection.weight.copy_(_shortlist_rows(projection, gpt.output_weight()))
            if projection.bias is not None:
                projection.bias.zero_()


def _shortlist_rows(projection: ExitProjection, output_weight: Tensor) -> Tensor:
    """This rank's rows [rows/TP, H] of the kept tokens; zeros for the bucket and padding."""
    mine = output_weight.shape[0]
    first = parallel_state.get_tensor_model_parallel_rank() * mine
    local = projection.row_tokens - first
    held = (local >= 0) & (local < mine)
    rows = output_weight.new_zeros((projection.num_rows, output_weight.shape[1]), dtype=torch.float32)
    rows[held] = output_weight[local[held]].float()
    rows = reduce_over_ranks(rows)
    return rows[projection.first_row : projection.first_row + projection.rows_per_rank]


def initialise_randomly(gpt: EarlyExitGPTModel, std: float) -> None:
    """Random translators; norms, MLPs and blocks keep what megatron-core gave them when they were built."""
    for n in gpt.exit_layers:
        linear = gpt.exits[str(n)].linear
        if linear is not None:
            with torch.no_grad():
                linear.weight.copy_(_noise(tuple(linear.weight.shape), std, n))


def _noise(shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Normal noise that is the same on every rank, whatever the layout."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


class RidgeInitialiser:
    """Fits every exit's translator of a stage to the final normed state; feed it to `run_backbone`.

    Args:
        gpt: this stage's module, its heads initialised otherwise: what they compute up to the translator is
            what the fit reads.
    """

    def __init__(self, gpt: EarlyExitGPTModel):
        self.gpt = gpt
        size, device = gpt.config.hidden_size, next(gpt.parameters()).device
        self.sums = {n: RidgeAccumulator(size, size, device) for n in gpt.exit_layers}

    def __call__(self, batch: MicroBatch, states: StageStates, final: Tensor | None) -> None:
        """Adds one micro-batch, tokens with a loss mask only."""
        keep = by_position(batch.loss_mask) > 0
        target = whole_tokens(final, self.gpt)[keep]
        for n, sums in self.sums.items():
            head = self.gpt.exits[str(n)]
            features = head.features(states.exits[n], batch.attention_mask, states.rotary_pos_emb)
            sums.update(whole_tokens(features, self.gpt)[keep], target)

    def finish(self, penalty: float) -> None:
        """Solves and sets the translators. Collectives: all-reduces the sums over the data-parallel group."""
        group = parallel_state.get_data_parallel_group()
        for n, sums in self.sums.items():
            for tensor in (sums.gram, sums.cross):
                torch.distributed.all_reduce(tensor, group=group)
            weight, bias = sums.solve(penalty)
            linear = self.gpt.exits[str(n)].linear
            with torch.no_grad():
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)
