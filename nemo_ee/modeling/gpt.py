# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A megatron-core GPT with exit heads on some of its layers."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from nemo_ee.config import EarlyExitConfig, HeadConfig
from nemo_ee.modeling.heads import ExitHead, ExitSurroundings, exit_config
from nemo_ee.modeling.layer_dropout import LayerDropout, before_backward
from nemo_ee.modeling.projection import ExitProjection
from nemo_ee.modeling.specs import gpt_block_spec
from nemo_ee.runtime.upstream.recomputation import checkpoint_with, recompute_in_pieces


@dataclass(frozen=True)
class StageStates:
    """What one forward pass leaves on a pipeline stage.

    Attributes:
        output: [S, B, H], to be sent to the next stage; on the last stage of a whole backbone the final
            normed state. S/TP under sequence parallelism, as for `exits`.
        exits: exit layer -> [S, B, H], the output of that layer, for the exits of this stage.
        rotary_pos_emb: for heads with a block of their own.
    """

    output: Tensor
    exits: dict[int, Tensor]
    rotary_pos_emb: Tensor | None


class Learning(Protocol):
    """What exits learn from in one forward pass: `training.deferred_loss.ExitTargets`."""

    @property
    def layer_dropout(self) -> LayerDropout | None: ...

    def attach(
        self, head: ExitHead, hidden: Tensor, output_weight: Tensor | None, surroundings: ExitSurroundings
    ) -> Tensor:
        """The hidden state [S, B, H], whose gradient has the exit's part from here down."""


class _DeepEnough(Exception):
    """Ends a forward pass at the last exit layer; carries that layer's output."""


class ExitHeads(torch.nn.ModuleDict):
    """The exits of one pipeline stage, keyed by their global 1-based layer."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Each head under `exits.<layer>.`, whichever stage holds it."""
        state: ShardedStateDict = {}
        for layer, head in self.items():
            state.update(head.sharded_state_dict(f"{prefix}{layer}.", sharded_offsets, metadata))
        return state


class EarlyExitGPTModel(GPTModel):
    """megatron-core's GPTModel with exit heads in `exits`; its own forward is the plain model's.

    Args:
        config: the backbone's configuration. `config.num_layers` is the depth that is built.
        early_exit: layers and heads of the exits.
        padded_vocab_size: the vocabulary padded to a multiple of TP: rows of embedding and output weight.
        vocab_size: the tokenizer's vocabulary; padding beyond it enters no exit's loss or confidence.
        truncated: the backbone is the lower part of a deeper one: build no final norm and no output layer.
        exits_dtype: dtype of the exits' weights.
        use_te: Transformer Engine's modules or torch's; None takes what the machine has.
        trains_backbone: the exits train together with the backbone: `forward` takes `exit_targets`, and a
            copy of the output weight on a stage between, which tied exits need, is trained too.
        pre_exit: an exit on the last layer of a stage belongs to the next stage.
        **kwargs: as GPTModel.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        early_exit: EarlyExitConfig,
        padded_vocab_size: int,
        vocab_size: int,
        truncated: bool = False,
        exits_dtype: torch.dtype = torch.float32,
        use_te: bool | None = None,
        trains_backbone: bool = False,
        pre_exit: bool = False,
        share_embeddings_and_output_weights: bool = True,
        post_process: bool = True,
        **kwargs,
    ):
        super().__init__(
            config=config,
            transformer_layer_spec=gpt_block_spec(config, use_te),
            vocab_size=padded_vocab_size,
            post_process=post_process and not truncated,
            share_embeddings_and_output_weights=share_embeddings_and_output_weights and not truncated,
            **kwargs,
        )
        self.early_exit, self.truncated = early_exit, truncated
        self.true_vocab_size, self.padded_vocab_size = vocab_size, padded_vocab_size
        self.tied_to_embedding = share_embeddings_and_output_weights
        here = {layer.layer_number: layer for layer in self.decoder.layers}
        first, last = min(here), max(here)
        mine = [n for n in early_exit.layers if n in here]
        if pre_exit and last in mine and not parallel_state.is_pipeline_last_stage():
            mine.remove(last)
        if pre_exit and first - 1 in early_exit.layers:
            mine.insert(0, first - 1)
        heads_config = exit_config(config, exits_dtype)
        self.exits = ExitHeads(
            {
                str(n): ExitHead(heads_config, early_exit.heads[n], n, vocab_size, padded_vocab_size, use_te)
                for n in mine
            }
        )
        self._captured: dict[int, Tensor] | None = None
        self._stop_at: int | None = None
        self._targets: Learning | None = None
        self._surroundings = ExitSurroundings()
        self.layer_dropout: LayerDropout | None = None
        if trains_backbone:
            for n, layer in here.items():
                layer.register_forward_hook(self._dropout_hook(n), with_kwargs=True)
            if config.recompute_granularity == "full":
                checkpoint_with(self.decoder, self._checkpointed_forward)
        for n in self.exit_layers:
            if n in here:
                here[n].register_forward_hook(self._exit_hook(n))
        self.register_parameter("output_copy", None)
        trains_copy = trains_backbone and any(self._is_tied(n) for n in mine)
        if (
            mine
            and not self._has_output_weight()
            and (not trains_backbone or trains_copy or early_exit.init == "copy")
        ):
            shape = (
                padded_vocab_size // parallel_state.get_tensor_model_parallel_world_size(),
                config.hidden_size,
            )
            data = torch.zeros(shape, dtype=config.params_dtype)
            self.output_copy = torch.nn.Parameter(data, requires_grad=trains_copy)
            set_tensor_model_parallel_attributes(self.output_copy, True, 0, 1)
        elif trains_copy and mine:
            # Fused kernels write the output layer's gradient to its buffer and return any memory as gradient.
            self.output_weight().zero_out_wgrad = True

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Exit layers of this stage, ascending."""
        return tuple(int(n) for n in self.exits)

    def _is_tied(self, n: int) -> bool:
        return self.early_exit.heads[n].projection == "tied"

    @cached_property
    def final_projection(self) -> ExitProjection:
        """What the final exit's state is projected by, beside `output_weight`: as a tied exit's."""
        head = HeadConfig(projection="tied")
        return ExitProjection(self.config, head, self.true_vocab_size, self.padded_vocab_size)

    def drop_frozen_copy(self) -> None:
        """Frees a copy of the output weight that exits' first weights came from and that is not trained."""
        if self.output_copy is not None and not self.output_copy.requires_grad:
            self.output_copy = None

    @property
    def _recomputes_layers(self) -> bool:
        return self.config.recompute_granularity == "full" and self.decoder.training

    def _has_output_weight(self) -> bool:
        return self.post_process or (self.pre_process and self.tied_to_embedding)

    def output_weight(self) -> Tensor:
        """The backbone's output weight [Vp/TP, H]: its own on this stage, or this stage's frozen copy."""
        if self.pre_process and self.tied_to_embedding:
            return self.embedding.word_embeddings.weight
        return self.output_layer.weight if self.post_process else self.output_copy

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """As megatron-core's, and this stage's frozen copy where NeMo counts weights of a truncated model."""
        weight = super().shared_embedding_or_output_weight()
        return self.output_copy if weight is None else weight

    def _exit_hook(self, n: int):
        def hook(_module: torch.nn.Module, _args: tuple, output: tuple) -> tuple | None:
            if self._captured is not None:
                self._captured[n] = output[0]
            if n == self._stop_at:
                raise _DeepEnough(output[0])
            if self._targets is None or self._recomputes_layers:
                return None
            return (self._apply_exit(n, output[0]), *output[1:])

        return hook

    def _dropout_hook(self, n: int):
        def hook(_module: torch.nn.Module, _args: tuple, kwargs: dict, output: tuple) -> tuple | None:
            if self.layer_dropout is None or not self.training:
                return None
            return (self.layer_dropout(n, kwargs["hidden_states"], output[0]), *output[1:])

        return hook

    def _apply_exit(self, n: int, hidden: Tensor) -> Tensor:
        weight = self.output_weight() if self._is_tied(n) else None
        return self._targets.attach(self.exits[str(n)], hidden, weight, self._surroundings)

    def _checkpointed_forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """megatron-core's full recomputation, with exits between recomputed pieces and never within one.

        Within one, an exit would be applied to a later micro-batch's targets when the piece is run again, and
        a weight that exits of two pieces share would get its gradient in two backward passes.
        """
        first = self.decoder.layers[0].layer_number
        exits = {n - first + 1: n for n in self.exit_layers if n >= first}
        for end, piece in recompute_in_pieces(self.decoder, set(exits)):
            hidden_states = piece(hidden_states=hidden_states, **kwargs)
            if end in exits and self._targets is not None:
                hidden_states = self._apply_exit(exits[end], hidden_states)
        return hidden_states

    def _preprocess(self, *args, packed_seq_params: PackedSeqParams | None = None, **kwargs) -> tuple:
        """megatron-core's; then the exit that reads what the stage before has sent (`pre_exit`)."""
        inputs = super()._preprocess(*args, packed_seq_params=packed_seq_params, **kwargs)
        if self._targets is not None:
            self._surroundings = replace(
                self._surroundings, rotary_pos_emb=inputs[1], packed_seq_params=packed_seq_params
            )
            before = self.decoder.layers[0].layer_number - 1
            if before in self.exit_layers:
                self.decoder.input_tensor = self._apply_exit(before, self.decoder.input_tensor)
        return inputs

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        *args,
        exit_targets: Learning | None = None,
        **kwargs,
    ) -> Tensor:
        """As GPTModel's; with `exit_targets` the losses of this stage's exits are part of the graph.

        Args:
            input_ids: [B, S].
            position_ids: [B, S].
            attention_mask: True hides; None means causal.
            *args: as GPTModel.
            exit_targets: of this micro-batch, on stages with exits and on stages that drop layers.
            **kwargs: as GPTModel.
        """
        if exit_targets is None:
            return super().forward(input_ids, position_ids, attention_mask, *args, **kwargs)
        assert self._targets is None, "forward passes do not nest"
        self._targets, self._surroundings = exit_targets, ExitSurroundings(attention_mask)
        self.layer_dropout = dropout = exit_targets.layer_dropout
        try:
            output = super().forward(input_ids, position_ids, attention_mask, *args, **kwargs)
        finally:
            self._targets, self._surroundings = None, ExitSurroundings()
        if dropout is None or not torch.is_grad_enabled():
            return output

        def restore() -> None:  # layers that are run again must be dropped as before
            self.layer_dropout = dropout

        return before_backward(output, restore)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """megatron-core's cross-entropies [B, S], over the tokenizer's tokens alone.

        Rows of padding enter no loss and get no gradient, so that the loss is the same at every TP.

        Args:
            labels: [B, S].
            logits: [S, B, Vp/TP], fresh from the output layer; their columns of padding are overwritten.
        """
        mine = logits.shape[-1]
        first = parallel_state.get_tensor_model_parallel_rank() * mine
        used = min(max(self.true_vocab_size - first, 0), mine)
        # Without autograd, which would copy all logits: the softmax there is 0, and so is the gradient. Finite,
        # since fused kernels compute -inf - -inf on a rank that holds nothing but padding.
        logits.detach()[..., used:].fill_(torch.finfo(logits.dtype).min)
        return super().compute_language_model_loss(labels, logits)

    @contextmanager
    def capture(self):
        """Collects exit layers' outputs of the forward passes within: yields {exit layer: [S, B, H]}."""
        assert self._captured is None, "captures do not nest"
        self._captured = {}
        try:
            yield self._captured
        finally:
            self._captured = None

    def forward_states(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        needs_final: bool = True,
    ) -> StageStates:
        """Runs this stage's layers, without the output layer.

        Args:
            input_ids: [B, S] token ids; ignored beyond the first stage (see `set_input_tensor`).
            position_ids: [B, S].
            attention_mask: True hides; None means causal.
            needs_final: otherwise the last stage stops behind its last exit, whose output is `output` then.
        """
        decoder_input, rotary_pos_emb, *_ = self._preprocess(input_ids, position_ids)
        if not needs_final and parallel_state.is_pipeline_last_stage() and self.exits:
            self._stop_at = self.exit_layers[-1]
        with self.capture() as exits:
            try:
                output = self.decoder(
                    hidden_states=decoder_input, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb
                )
            except _DeepEnough as reached:
                (output,) = reached.args
            finally:
                self._stop_at = None
        return StageStates(output, exits, rotary_pos_emb)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """megatron-core's, with the exits under `exits.<layer>.` whichever stage holds them."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.output_copy is not None:
            source = "embedding.word_embeddings.weight" if self.tied_to_embedding else "output_layer.weight"
            state[f"{prefix}output_copy"] = make_tp_sharded_tensor_for_checkpoint(
                self.output_copy,  # itself: an optimizer's state is matched to its parameter by identity
                f"{prefix}{source}",
                replica_id=(
                    1 + parallel_state.get_pipeline_model_parallel_rank(),
                    0,
                    parallel_state.get_data_parallel_rank(with_context_parallel=True),
                ),
                allow_shape_mismatch=True,
            )
        return state
