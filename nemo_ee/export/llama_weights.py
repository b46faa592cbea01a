# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Megatron-core's weights under Hugging Face's names of the Llama family.

The inverse of `to_megatron` in :mod:`nemo_ee.checkpoint.conversion.llama`, tensor by tensor: nothing is read here.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from omegaconf import DictConfig
from torch import Tensor

from nemo_ee.checkpoint import keys
from nemo_ee.checkpoint.exits.exit_tensors import check_token_ids
from nemo_ee.checkpoint.stored_tensors import StoredTensor
from nemo_ee.errors import CheckpointError

Weights = dict[str, StoredTensor]


class LlamaWeights:
    """The weights of a checkpoint, to be asked for by parts.

    Args:
        tensors: by canonical name, as of `stored_tensors`.
        model: the `model` section, which `check_plain` let pass.
        rows: of the embedding, padding apart.
        name: of the file, for errors.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], model: DictConfig, rows: int, name: str):
        self._tensors, self._model, self._rows, self._name = tensors, model, rows, name
        self._used: set[str] = set()
        self.hidden = model.hidden_size
        self.ffn = model.ffn_hidden_size
        self.groups = model.get("num_query_groups") or model.num_attention_heads
        self.per_group = model.num_attention_heads // self.groups
        self.head = model.get("kv_channels") or self.hidden // model.num_attention_heads
        self.tied = bool(model.get("share_embeddings_and_output_weights", True))
        # Q, K and V lie in one tensor, which is asked for three times in a row.
        self._last = functools.lru_cache(maxsize=1)(lambda key: tensors[key].read())

    def plain(self) -> Weights:
        """All weights of the base.

        Raises:
            CheckpointError: a tensor is missing, of another shape, or has no place in a plain model.
        """
        weights = self.trunk(self._model.num_layers)
        weights["model.norm.weight"] = self.take("decoder.final_layernorm.weight", self.hidden)
        if not self.tied:
            weights["lm_head.weight"] = self.rows_of("output_layer.weight")
        left = [key for key in self.unused() if not keys.is_exit(key)]
        if left:
            raise CheckpointError(
                f"{self._name}: {', '.join(left[:3])}: {len(left)} tensors have no place in a plain Llama, Mistral or "
                "Qwen2; export another checkpoint"
            )
        return weights

    def trunk(self, layers: int) -> Weights:
        """The embedding and the first layers."""
        weights = {"model.embed_tokens.weight": self.rows_of("embedding.word_embeddings.weight")}
        for n in range(layers):
            weights |= self.layer(f"decoder.layers.{n}.", n)
        return weights

    def layer(self, source: str, number: int) -> Weights:
        """One transformer layer.

        Args:
            source: prefix of its tensors, e.g. `decoder.layers.0.` or `exits.8.block.`.
            number: of the layer that it becomes, from 0.
        """
        target, attention = f"model.layers.{number}.", f"model.layers.{number}.self_attn."
        weights = {
            f"{target}input_layernorm.weight": self.take(
                f"{source}self_attention.linear_qkv.layer_norm_weight", self.hidden
            )
        }
        for kind in ("weight", "bias") if self._model.get("qkv_bias") else ("weight",):
            for letter, part in self._qkv(f"{source}self_attention.linear_qkv.{kind}", kind):
                weights[f"{attention}{letter}_proj.{kind}"] = part
        width = self.groups * self.per_group * self.head
        weights[f"{attention}o_proj.weight"] = self.take(
            f"{source}self_attention.linear_proj.weight", self.hidden, width
        )
        weights[f"{target}post_attention_layernorm.weight"] = self.take(
            f"{source}mlp.linear_fc1.layer_norm_weight", self.hidden
        )
        return weights | self.mlp(f"{source}mlp.", number)

    def mlp(self, source: str, number: int) -> Weights:
        """A gated MLP without its norm, of `source`, as layer `number`'s."""
        target = f"model.layers.{number}.mlp."
        both = self.take(f"{source}linear_fc1.weight", 2 * self.ffn, self.hidden)
        one = (self.ffn, self.hidden)
        return {
            f"{target}gate_proj.weight": _part(both, one, lambda whole: whole[: self.ffn]),
            f"{target}up_proj.weight": _part(both, one, lambda whole: whole[self.ffn :]),
            f"{target}down_proj.weight": self.take(f"{source}linear_fc2.weight", self.hidden, self.ffn),
        }

    def rows_of(self, key: str, count: int | None = None) -> StoredTensor:
        """Rows of an embedding or output layer [V, H], without padding; of another matrix the first `count`."""
        whole, used = self.take(key, None, self.hidden), self._rows if count is None else count
        if whole.shape[0] < used:
            raise CheckpointError(
                f"{self._name}: {key} has {whole.shape[0]} rows and {used} are used; copy the checkpoint again"
            )
        return _part(whole, (used, self.hidden), lambda rows: rows[:used])

    def token_ids(self, key: str, size: int, vocabulary: int, name: str) -> StoredTensor:
        """The tokens of a shortlist; they are read.

        Args:
            key: its canonical name.
            size: how many there must be.
            vocabulary: one more than the largest that there may be.
            name: of the exits' file, for errors.

        Raises:
            CheckpointError: they are no such list.
        """
        ids = self.take(key, size)
        check_token_ids(key, ids.read(), vocabulary, name)
        return ids

    def unused(self) -> list[str]:
        """Names of the tensors that nobody has asked for."""
        return sorted(self._tensors.keys() - self._used)

    def take(self, key: str, *shape: int | None) -> StoredTensor:
        """A tensor as it is.

        Args:
            key: its canonical name.
            shape: that it must have; None for any size.

        Raises:
            CheckpointError: it is missing or of another shape.
        """
        self._used.add(key)
        tensor = self._tensors.get(key)
        if tensor is None:
            raise CheckpointError(f"{self._name}: {key}: is missing; copy the checkpoint again")
        fits = len(tensor.shape) == len(shape) and all(
            want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = list(shape)
            raise CheckpointError(
                f"{self._name}: {key} has the shape {list(tensor.shape)}, and its configuration asks for {wanted}; "
                "copy the checkpoint again"
            )
        return replace(tensor, read=lambda: self._last(key))

    def _qkv(self, key: str, kind: str) -> Iterator[tuple[str, StoredTensor]]:
        groups, queries, head = self.groups, self.per_group, self.head
        more = (self.hidden,) if kind == "weight" else ()
        whole = self.take(key, groups * (queries + 2) * head, *more)
        for letter, places in (
            ("q", slice(0, queries)),
            ("k", slice(queries, queries + 1)),
            ("v", slice(queries + 1, queries + 2)),
        ):
            rows = groups * (places.stop - places.start) * head

            def of_group(joined: Tensor, places: slice = places) -> Tensor:
                return joined.reshape(groups, queries + 2, head, *more)[:, places].reshape(-1, *more)

            yield letter, _part(whole, (rows, *more), of_group)


def _part(whole: StoredTensor, shape: tuple[int, ...], cut: Callable[[Tensor], Tensor]) -> StoredTensor:
    return StoredTensor(shape, whole.dtype, lambda: cut(whole.read()))
