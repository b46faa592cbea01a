# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""First weights of exits: from the backbone's own modules, random, or in closed form (ridge)."""

from collections.abc import Callable, Container
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from torch import Tensor

from nemo_ee.modeling.first_weights.ridge import RidgeAccumulator
from nemo_ee.modeling.gpt import EarlyExitGPTModel, StageStates
from nemo_ee.modeling.heads import ExitHead, Translator
from nemo_ee.modeling.micro_batch import MicroBatch
from nemo_ee.modeling.projection import ExitProjection
from nemo_ee.modeling.replicated import replicated
from nemo_ee.modeling.token_layout import by_position, whole_tokens
from nemo_ee.modeling.vocab_parallel import (
    chunk_tokens,
    gather_columns,
    log_sum_over_ranks,
    reduce_over_ranks,
)

SUMS_BYTES = 2**34
"""Of a closed form's sums on one rank, for all exits that are fitted in one pass over the text."""
NEVER = -100.0
"""A logit that stands for probability zero and still fits a least-squares problem."""


def copy_sources(
    gpt: EarlyExitGPTModel, num_layers: int, mlp_layer: Callable[[int], int], prefix: str = "model."
) -> ShardedStateDict:
    """Where each head's copied weights stand in the backbone's checkpoint, so that loading it copies them.

    The block comes from the last layer and the norm from the final norm (EE-Tuning, arXiv:2402.00518 section
    3). Works at any TP and PP, and above a truncated backbone. Of an MLP beside a translator all but the
    output projection is copied.

    Args:
        gpt: this stage's module.
        num_layers: depth of the checkpoint.
        mlp_layer: 1-based layer that the MLP of the exit at a given layer comes from.
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
            where = ((0, mlp_layer(n) - 1, num_layers),)
            state = head.mlp.mlp.sharded_state_dict(f"{layers}mlp.", where)
            if head.head.mlp == "beside":  # see start_branches_at_zero
                state = {key: entry for key, entry in state.items() if "linear_fc2." not in key}
            sources |= {f"{mine}mlp.{key.removeprefix(layers)}": entry for key, entry in state.items()}
            state = _norm_state(head.mlp.norm, f"{layers}pre_mlp_layernorm.", where)
            sources |= {f"{mine}mlp.norm.{key.rpartition('.')[2]}": entry for key, entry in state.items()}
        if head.norm is not None:
            state = _norm_state(head.norm, f"{prefix}decoder.final_layernorm.", ())
            sources |= {f"{mine}norm.{key.rpartition('.')[2]}": entry for key, entry in state.items()}
    sources = {key: entry for key, entry in sources.items() if not key.endswith("_extra_state")}
    for entry in sources.values():
        entry.replica_id = (1, *entry.replica_id[1:])  # the backbone's own module is the main copy
    return sources


def start_branches_at_zero(gpt: EarlyExitGPTModel, only: Container[int] | None = None) -> None:
    """MLPs that stand beside a translator begin by adding nothing, so that a copied exit is the backbone's.

    There the translator's output is a normed state; what a layer's MLP adds belongs to the residual stream.
    `only` names the exit layers that are meant; None means all.
    """
    for n in _chosen(gpt, only):
        head = gpt.exits[str(n)]
        if head.head.mlp == "beside":
            with torch.no_grad():
                for parameter in head.mlp.mlp.linear_fc2.parameters():
                    parameter.zero_()


def _norm_state(norm: torch.nn.Module, prefix: str, offsets: tuple) -> ShardedStateDict:
    return {
        f"{prefix}{name}": replicated(parameter, f"{prefix}{name}", offsets)
        for name, parameter in norm.named_parameters()
    }


def _chosen(gpt: EarlyExitGPTModel, only: Container[int] | None) -> list[int]:
    return [n for n in gpt.exit_layers if only is None or n in only]


def initialise_projections(
    gpt: EarlyExitGPTModel,
    shortlist: Tensor | None,
    random_std: float | None,
    seed: int = 0,
    only: Container[int] | None = None,
) -> None:
    """Fills untied and shortlist projections: rows of the output weight, or normal noise.

    Args:
        gpt: this stage's module.
        shortlist: [k] kept tokens, the most frequent first, for shortlist projections: each keeps as many as it has
            rows for.
        random_std: standard deviation of random rows; None copies the backbone's.
        seed: of random rows.
        only: exit layers that are meant; None means all.

    Collectives: for a shortlist one all-reduce of [k, H] over the tensor-parallel group.
    """
    for n in _chosen(gpt, only):
        head = gpt.exits[str(n)]
        projection = head.projection
        if projection.kind == "shortlist":
            projection.set_shortlist(shortlist[: head.head.shortlist_size])
        if projection.kind == "tied":
            continue
        with torch.no_grad():
            if random_std is not None:
                rows = _noise((projection.num_rows, projection.weight.shape[1]), random_std, seed, 2 * n + 1)
                first = projection.first_row
                projection.weight.copy_(rows[first : first + projection.rows_per_rank])
            elif projection.kind == "untied":
                projection.weight.copy_(gpt.output_weight())
            else:
                projection.weight.copy_(_shortlist_rows(projection, gpt.output_weight()))


def _shortlist_rows(projection: ExitProjection, output_weight: Tensor) -> Tensor:
    """This rank's rows [rows/TP, H] of the kept tokens; zeros for padding."""
    mine = output_weight.shape[0]
    first = parallel_state.get_tensor_model_parallel_rank() * mine
    local = projection.row_tokens[:-1] - first
    held = (local >= 0) & (local < mine)
    rows = output_weight.new_zeros((projection.num_rows, output_weight.shape[1]), dtype=torch.float32)
    rows[held] = output_weight[local[held]].float()
    rows = reduce_over_ranks(rows)
    return rows[projection.first_row : projection.first_row + projection.rows_per_rank]


def initialise_randomly(
    gpt: EarlyExitGPTModel, std: float, seed: int = 0, only: Container[int] | None = None
) -> None:
    """Random translators; norms, MLPs and blocks keep what megatron-core gave them when they were built."""
    for n in _chosen(gpt, only):
        linear = gpt.exits[str(n)].linear
        if linear is not None:
            with torch.no_grad():
                linear.weight.copy_(_noise(tuple(linear.weight.shape), std, seed, 2 * n))


def _noise(shape: tuple[int, ...], std: float, seed: int, which: int) -> Tensor:
    """Normal noise, one for every seed and every `which`; the same on every rank, whatever the layout."""
    generator = torch.Generator().manual_seed((seed << 20) + which)
    return torch.randn(shape, generator=generator) * std


@dataclass(frozen=True)
class _Bucket:
    """What tokens off a shortlist have in common, for the exits of this stage with that shortlist.

    Attributes:
        shortlist: [k] tokens.
        others: see `rows_of_others`.
        sums: of the regression.
        layers: of the exits.
    """

    shortlist: Tensor
    others: Tensor
    sums: RidgeAccumulator
    layers: list[int]


class RidgeInitialiser:
    """Fits the exits of a stage to the final exit in closed form; feed it to `run_backbone`.

    For every head the translator, and with it the MLP's output projection, are the ridge regression of the
    final normed state on [input of the translator, activations of the MLP, 1]. What a shortlist's bucket
    stands for, the log of the summed exponentials of all other logits, is then regressed on the final normed
    state itself: [H] -> 1.

    Args:
        gpt: this stage's module, its heads' other weights set already: what they compute up to the translator
            and the MLP's output projection is what the fit reads.
        only: exit layers to fit; None means all of this stage.
    """

    def __init__(self, gpt: EarlyExitGPTModel, only: Container[int] | None = None):
        self.gpt, self.sums = gpt, {}
        layers = _chosen(gpt, only)
        size, device = gpt.config.hidden_size, next(gpt.parameters()).device
        self.inputs: dict[torch.nn.Module, Tensor] = {}
        self.hooks = []
        for n in layers:
            self.sums[n] = RidgeAccumulator(features(gpt.exits[str(n)]), size, device)
            self.hooks += [module.register_forward_pre_hook(self._keep_input) for module in self._fitted(n)]
        self.buckets: list[_Bucket] = []
        for n in layers:
            projection = gpt.exits[str(n)].projection
            if projection.kind == "shortlist":
                same = [b for b in self.buckets if b.shortlist.equal(projection.token_ids)]
                if not same:
                    sums, others = RidgeAccumulator(size, 1, device), rows_of_others(projection, gpt)
                    self.buckets += (same := [_Bucket(projection.token_ids, others, sums, [])])
                same[0].layers.append(n)

    def _fitted(self, n: int) -> list[torch.nn.Module]:
        """The linear modules that the closed form sets, the translator first."""
        head = self.gpt.exits[str(n)]
        return [head.linear] if head.mlp is None else [head.linear, head.mlp.mlp.linear_fc2]

    def _width(self, module: torch.nn.Module) -> int:
        config = self.gpt.config
        return config.hidden_size if isinstance(module, Translator) else config.ffn_hidden_size

    def _keep_input(self, module: torch.nn.Module, args: tuple) -> None:
        self.inputs[module] = args[0]

    def __call__(self, batch: MicroBatch, states: StageStates, final: Tensor | None) -> None:
        """Adds one micro-batch, tokens with a loss mask only.

        Collectives: gathers features over the tensor-parallel group.
        """
        counts = by_position(batch.loss_mask) > 0
        target = whole_tokens(final, self.gpt.config.sequence_parallel)
        for n, sums in self.sums.items():
            head = self.gpt.exits[str(n)]
            hidden = states.exits[n].to(head.linear.weight.dtype)
            head(hidden, batch.attention_mask, states.rotary_pos_emb)
            read = [self._whole_input(module) for module in self._fitted(n)]
            sums.update(torch.cat(read, dim=1), target, counts)
        for bucket in self.buckets:
            log_sum = log_sum_of_rows(target, bucket.others, self.gpt)
            bucket.sums.update(target, log_sum[:, None], counts)

    def _whole_input(self, module: torch.nn.Module) -> Tensor:
        """What a module read, [T, width], gathered over the tensor-parallel group."""
        kept = self.inputs.pop(module)
        if isinstance(module, Translator):
            return whole_tokens(kept, self.gpt.config.sequence_parallel)
        return gather_columns(kept.reshape(-1, kept.shape[-1]))

    def finish(self, penalty: float) -> None:
        """Solves and sets the weights. Collectives: all-reduces the sums over the data-parallel group."""
        for hook in self.hooks:
            hook.remove()
        rank = parallel_state.get_tensor_model_parallel_rank()
        for bucket in self.buckets:
            row, constant = _solve(bucket.sums, [self.gpt.config.hidden_size], penalty)
            for n in bucket.layers:
                projection = self.gpt.exits[str(n)].projection
                with torch.no_grad():
                    projection.bucket_weight.copy_(row[0])
                    projection.bucket_bias.copy_(constant)
        for n in list(self.sums):
            head = self.gpt.exits[str(n)]
            weight, bias = _solve(
                self.sums.pop(n), [self._width(module) for module in self._fitted(n)], penalty
            )
            with torch.no_grad():
                translator, *mlp = weight.split([self._width(module) for module in self._fitted(n)], dim=1)
                head.linear.weight.copy_(translator)
                head.linear.bias.copy_(bias)
                for part in mlp:
                    mine = head.mlp.mlp.linear_fc2.weight
                    mine.copy_(part[:, rank * mine.shape[1] : (rank + 1) * mine.shape[1]])
                    if head.mlp.mlp.linear_fc2.bias is not None:
                        head.mlp.mlp.linear_fc2.bias.zero_()  # the translator's is the whole constant


def features(head: ExitHead) -> int:
    """Width of what the closed form regresses on, without the constant."""
    config = head.config
    return config.hidden_size + (0 if head.mlp is None else config.ffn_hidden_size)


def ridge_passes(
    gpt: EarlyExitGPTModel, only: Container[int] | None = None, most_bytes: int = SUMS_BYTES
) -> list[tuple[int, ...]]:
    """Which exits of this stage to fit in each pass over the text, so that their sums fit into `most_bytes`.

    `only` names the exit layers that are meant; None means all.

    Every exit has (features + 1) x (features + 1 + H) numbers of 8 bytes: 0.7 GB at 8B parameters without an MLP,
    3.3 GB with one, 13 GB at 70B. A pass costs forward passes of the backbone, so all are fitted at once where
    they fit; each has at least a pass of its own where they do not.

    Collectives: one all-reduce over the pipeline: all stages take part in every pass, some with no exit.
    """
    passes: list[tuple[int, ...]] = []
    taken = most_bytes
    for n in _chosen(gpt, only):
        width = features(gpt.exits[str(n)]) + 1
        size = 8 * width * (width + gpt.config.hidden_size)
        if taken + size > most_bytes:
            passes, taken = [*passes, ()], 0
        passes[-1] += (n,)
        taken += size
    count = torch.tensor(len(passes), device=next(gpt.parameters()).device)
    group = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX, group=group)
    return passes + [()] * (int(count) - len(passes))


def _solve(sums: RidgeAccumulator, widths: list[int], penalty: float) -> tuple[Tensor, Tensor]:
    for tensor in (sums.gram, sums.cross):
        torch.distributed.all_reduce(tensor, group=parallel_state.get_data_parallel_group())
    return sums.solve(penalty, widths)


def rows_of_others(projection: ExitProjection, gpt: EarlyExitGPTModel) -> Tensor:
    """Which rows of this rank's output weight belong to tokens off a shortlist. A GPU is waited for."""
    mine = gpt.output_weight().shape[0]
    first = parallel_state.get_tensor_model_parallel_rank() * mine
    others = torch.ones(gpt.true_vocab_size, dtype=torch.bool, device=projection.token_ids.device)
    others.index_fill_(0, projection.token_ids, False)
    return others[first : first + mine].nonzero()[:, 0]


def log_sum_of_rows(state: Tensor, rows: Tensor, gpt: EarlyExitGPTModel) -> Tensor:
    """Log of the summed exponentials of the logits of all ranks' `rows` of the output weight: [T, H] -> [T].

    At least `NEVER`, also where there are no rows.

    Collectives: two all-reduces of [T] over the tensor-parallel group per chunk of tokens.
    """
    weight = gpt.output_weight().index_select(0, rows)
    chunks = []
    for chunk in state.split(chunk_tokens(gpt.early_exit.tuning.loss_chunk_tokens, max(1, len(rows)))):
        logits = torch.nn.functional.linear(chunk.to(weight.dtype), weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chunks.append(log_sum_over_ranks(logits.logsumexp(-1).clamp_min(NEVER)))
    return torch.cat(chunks)
