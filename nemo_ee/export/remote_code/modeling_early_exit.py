# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Llama, Mistral and Qwen2 with exit heads, for transformers from 4.51 on: the code of an exported folder.

It is loaded with `trust_remote_code=True` and needs torch and transformers alone. `config.early_exit` describes the
exits: `layers`, `head` (the modules of each) and `inference` (thresholds). Exits are used in two ways, and left alone
otherwise:

- `generate(assistant_early_exit=n)`: transformers sets `config.num_hidden_layers = n` while it drafts and calls the
  same model, which then answers by the exit behind layer n. All drafts are verified: the text is full depth's.
- `generate(early_exit={"threshold": 0.9})`: each token leaves at the first exit whose confidence is strictly above its
  threshold. Layers that a token has left out read it later, together with the next token that comes so far, so keys
  and values are exact. One text at a time.

Shapes: B texts, S tokens, H hidden size, V vocabulary, K tokens of a shortlist.
"""

import copy
import functools
import math

import torch
from torch import nn
from transformers import (
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from .leaving import is_asked  # transformers copies what this file imports, not what that imports
from .leaving_early import Walk, cache_of, thresholds_of

DRAFTING = ("assistant_early_exit", "assistant_model", "prompt_lookup_num_tokens")
"""Of `generate`: what has drafts verified by the whole model."""


class Shortlist(nn.Module):
    """Logits of the K tokens that an exit knows, and of one bucket for all others."""

    def __init__(self, hidden_size, size, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size
        self.rows = nn.Linear(hidden_size, size, bias=False)
        self.bucket = nn.Linear(hidden_size, 1)
        self.register_buffer("token_ids", torch.zeros(size, dtype=torch.long))

    def forward(self, state):
        """[..., V] for drafts: probabilities are the exit's own, and tokens off the list share the bucket's evenly.

        So the confidence of a draft, by which transformers ends a round, is the exit's. A shared logit stays below the
        best one: the most probable token is on the list.
        """
        rows, bucket = self.rows(state), self.bucket(state)
        others = max(1, self.vocab_size - len(self.token_ids))
        shared = torch.minimum(bucket - math.log(others), rows.amax(-1, keepdim=True) - 1)
        return self.spread(rows, shared.expand(*shared.shape[:-1], self.vocab_size))

    def spread(self, rows, others):
        """[..., V] from [..., K], with `others` [..., V] in the places of tokens off the list."""
        return others.index_copy(-1, self.token_ids, rows)


class ExitHead(nn.Module):
    """block, then MLP, norm and translator, then the projection: what stands between a layer's output and logits.

    Args:
        model: the backbone, whose kinds of layer, norm and MLP an exit has.
        layer: n, 1-based: the exit reads the output of the n-th layer.
        head: which modules: `block`, `mlp` (none, residual, beside), `norm`, `linear`, `projection` (tied, untied,
            shortlist), `shortlist_size`.
    """

    def __init__(self, model, layer, head):
        super().__init__()
        config, example = model.config, model.layers[0]
        self.layer, self.kind = layer, head["mlp"]
        self.block = self.mlp = self.mlp_norm = self.norm = self.linear = self.projection = None

        def norm():
            return type(model.norm)(config.hidden_size, eps=config.rms_norm_eps)

        if head["block"]:
            self.block = type(example)(config, layer_idx=min(layer, len(model.layers) - 1))
        if self.kind != "none":
            self.mlp_norm, self.mlp = norm(), type(example.mlp)(config)
        if head["norm"]:
            self.norm = norm()
        if head["linear"]:
            self.linear = nn.Linear(config.hidden_size, config.hidden_size)
        if head["projection"] == "untied":
            self.projection = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if head["projection"] == "shortlist":
            self.projection = Shortlist(config.hidden_size, head["shortlist_size"], config.vocab_size)

    def forward(self, x):
        """The state that the projection reads, from what comes out of the block: [B, S, H] -> [B, S, H]."""
        branch = None if self.mlp is None else self.mlp(self.mlp_norm(x))
        if self.kind == "residual":
            x = x + branch
        if self.norm is not None:
            x = self.norm(x)
        if self.linear is not None:
            x = self.linear(x)
        return x + branch if self.kind == "beside" else x

    def ask(self, x, lm_head):
        """What tokens that may leave here are told, from what comes out of the block.

        Args:
            x: [1, 1, H].
            lm_head: the model's own projection, for a tied one.

        Returns:
            Logits [1, 1, V], -inf for tokens that the exit does not know; and a pair: those of all outcomes in float32,
            [V] or [K + 1] with the bucket last, and how many of them stand for a token.
        """
        state, projection = self(x), self.projection or lm_head
        if not isinstance(projection, Shortlist):
            logits = projection(state)
            return logits, (logits.flatten().float(), logits.shape[-1])
        rows, bucket = projection.rows(state), projection.bucket(state)
        unknown = rows.new_full((*rows.shape[:-1], projection.vocab_size), float("-inf"))
        outcomes = torch.cat([rows, bucket], dim=-1).flatten().float()
        return projection.spread(rows, unknown), (outcomes, rows.shape[-1])


class EarlyExits:
    """Puts exits on a model for causal language modelling; stands before the family's class."""

    def __init__(self, config):
        super().__init__(config)
        described = getattr(config, "early_exit", None) or {"layers": [], "head": []}
        pairs = zip(described["layers"], described["head"], strict=True)
        self.exits = nn.ModuleDict({str(n): ExitHead(self.model, n, head) for n, head in pairs})
        self._walk = None
        self.post_init()

    def generate(self, *args, early_exit=None, **kwargs):
        """transformers' `generate`, with exits.

        Args:
            *args: as transformers'.
            early_exit: None decodes at full depth; True takes the thresholds of the folder; or a dict: `threshold`, one
                number or one per exit, within [0, 1]: 1.0 never leaves; `exits`, the layers in use, by default all;
                `confidence`, the rule: max_probability, entropy or margin. Confidences are of the exit's own logits,
                before logits processors.
            **kwargs: as transformers'.

        Returns:
            As transformers'. With `early_exit` and `return_dict_in_generate=True` the output has `exit_layers`, a list:
            the layer at which each token left.

        Raises:
            ValueError: `assistant_early_exit` is no exit; `early_exit` cannot be; both are given; hidden states or
                attentions of texts with `early_exit`; another thread is generating such a text.
        """
        config = kwargs.get("generation_config") or dict(enumerate(args)).get(1) or self.generation_config
        asked = {name: kwargs.get(name, getattr(config, name, None)) for name in DRAFTING}
        drafting = {name: value for name, value in asked.items() if value is not None}
        if "assistant_early_exit" in drafting:
            self._require_exit(drafting["assistant_early_exit"])
        if early_exit is None or early_exit is False:
            return self._plain_generate(*args, **kwargs)
        if drafting:
            raise ValueError(
                f"early_exit={early_exit}: tokens that leave early are not verified, and {', '.join(drafting)} has all "
                "tokens verified; leave out one of the two"
            )
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name, getattr(config, name, None)):
                raise ValueError(
                    f"{name}=True: tokens with early_exit run through different layers; leave it out"
                )
        if self._walk is not None:
            raise ValueError(f"early_exit={early_exit}: another text is being generated; wait for it")
        layers = [int(name) for name in self.exits]
        own = getattr(self.config, "early_exit", {}).get("inference", {})
        thresholds, rule = thresholds_of(early_exit, layers, own)
        walk = Walk(self, {n: value for n, value in thresholds.items() if is_asked(value)}, rule)
        self._walk = walk
        try:
            output = self._plain_generate(*args, **kwargs)
        finally:
            self._walk = None
        if not isinstance(output, torch.Tensor):
            output.exit_layers = walk.exit_layers
        return output

    def _plain_generate(self, *args, **kwargs):
        depth = self.config.num_hidden_layers
        try:
            return super().generate(*args, **kwargs)
        finally:  # transformers leaves it at an exit's where drafting fails
            self.config.num_hidden_layers = depth

    def _require_exit(self, n):
        """Raises ValueError unless drafts can come from layer n."""
        depth = len(self.model.layers)
        known = [int(name) for name in self.exits if int(name) < depth]
        if n not in known:
            rule = (
                "is the whole depth, which verifies" if n == depth else "there is no exit behind that layer"
            )
            remedy = f"use one of {known}" if known else "use a folder with exits, or leave it out"
            raise ValueError(f"assistant_early_exit={n}: {rule}; {remedy}")

    def piece(self, layers, norm):
        """The backbone with these layers and that in the place of its final norm; weights are shared."""
        piece = _copied(self.model)
        piece.layers, piece.norm = nn.ModuleList(layers), norm
        piece.config = copy.copy(self.config)
        piece.config.num_hidden_layers = len(layers)
        return piece

    def _at_depth(self, cache):
        """The model itself; while transformers drafts at layer n, the one that ends in that exit."""
        n, layers = self.config.num_hidden_layers, self.model.layers
        if n == len(layers):
            return self
        self._require_exit(n)
        head = self.exits[str(n)]
        kept = [*layers[:n]] if head.block is None else [*layers[:n], head.block]
        made = getattr(cache, "layers", [])
        if 0 < len(made) < len(kept):  # transformers makes one for each of the n layers
            made.append(type(made[0])())
        short = _copied(self)
        short.model, short.lm_head = self.piece(kept, head), head.projection or self.lm_head
        return short


def _copied(module):
    """A copy that shares the weights, and whose parts can be exchanged."""
    copied = copy.copy(module)
    vars(copied)["_modules"] = dict(module._modules)
    return copied


def _with_exits(forward):
    """A family's `forward`, by the exit that is asked for."""

    @functools.wraps(forward)
    def forward_with_exits(self, *args, **kwargs):
        if self._walk is not None:
            return self._walk(*args, **kwargs)
        return forward(self._at_depth(cache_of(kwargs)), *args, **kwargs)

    return forward_with_exits


class LlamaEarlyExitConfig(LlamaConfig):
    """Llama's, with `early_exit`."""

    model_type = "llama_early_exit"


class LlamaEarlyExitForCausalLM(EarlyExits, LlamaForCausalLM, GenerationMixin):
    """Llama with exits."""

    config_class = LlamaEarlyExitConfig
    base_model_prefix = "model"
    forward = _with_exits(LlamaForCausalLM.forward)


class MistralEarlyExitConfig(MistralConfig):
    """Mistral's, with `early_exit`."""

    model_type = "mistral_early_exit"


class MistralEarlyExitForCausalLM(EarlyExits, MistralForCausalLM, GenerationMixin):
    """Mistral with exits."""

    config_class = MistralEarlyExitConfig
    base_model_prefix = "model"
    forward = _with_exits(MistralForCausalLM.forward)


class Qwen2EarlyExitConfig(Qwen2Config):
    """Qwen2's, with `early_exit`."""

    model_type = "qwen2_early_exit"


class Qwen2EarlyExitForCausalLM(EarlyExits, Qwen2ForCausalLM, GenerationMixin):
    """Qwen2 with exits."""

    config_class = Qwen2EarlyExitConfig
    base_model_prefix = "model"
    forward = _with_exits(Qwen2ForCausalLM.forward)
