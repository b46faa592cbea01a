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
import difflib
import functools
import inspect
import math
from itertools import pairwise

import torch
from torch import nn
from transformers import (
    DynamicCache,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

NEVER = 1.0
"""A threshold: the exit is not asked."""
OPTIONS = ("threshold", "exits", "confidence")
"""Keys of `generate(early_exit=...)`."""
DRAFTING = ("assistant_early_exit", "assistant_model", "prompt_lookup_num_tokens")
"""Of `generate`: what has drafts verified by the whole model."""
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(name for name in CACHE_NAMES if name in inspect.signature(LlamaForCausalLM.forward).parameters)
"""What this version of transformers calls the cache."""


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
            ValueError: `assistant_early_exit` is no exit; `early_exit` cannot be; both are given.
        """
        config = kwargs.get("generation_config") or self.generation_config
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
        walk = _Walk(self, *self._thresholds(early_exit))
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
                "there is no exit behind that layer"
                if n != depth
                else "is the whole depth, which verifies drafts"
            )
            remedy = f"use one of {known}" if known else "use a folder with exits, or leave it out"
            raise ValueError(f"assistant_early_exit={n}: {rule}; {remedy}")

    def _thresholds(self, given):
        """Exit layer -> threshold, and the confidence rule, from what `generate` was given."""
        layers = [int(name) for name in self.exits]
        if not layers:
            raise ValueError(f"early_exit={given}: the model has no exits; leave it out")
        own = self.config.early_exit.get("inference", {})
        given = {} if given is True else given
        if not isinstance(given, dict):
            raise ValueError(
                f"early_exit={given}: must be a dict or True; give e.g. early_exit={{'threshold': 0.9}}"
            )
        for key in given:
            if key not in OPTIONS:
                near = difflib.get_close_matches(str(key), OPTIONS, n=1)
                remedy = f"did you mean {near[0]}?" if near else f"use {', '.join(OPTIONS)}"
                raise ValueError(f"early_exit.{key}={given[key]}: no such option; {remedy}")
        rule = given.get("confidence") or own.get("confidence") or "max_probability"
        if rule not in CONFIDENCE_RULES:
            known = ", ".join(CONFIDENCE_RULES)
            raise ValueError(
                f"early_exit.confidence={rule}: must be one of {known}; give one, and thresholds for it"
            )
        usual = own.get("exits") or layers
        exits = list(given.get("exits") or usual)
        if not set(exits) <= set(layers) or exits != sorted(set(exits)):
            raise ValueError(
                f"early_exit.exits={exits}: not some of the exits {layers}, ascending; name such, or leave it out"
            )
        threshold = given.get("threshold")
        if threshold is None:
            if own.get("threshold") is None or rule != own.get("confidence", "max_probability"):
                raise ValueError(
                    f"early_exit.threshold=None: the folder has none for confidence={rule}; give e.g. 0.9"
                )
            known = dict(zip(usual, _one_each(own["threshold"], len(usual)), strict=True))
            if not set(exits) <= set(known):
                raise ValueError(
                    f"early_exit.threshold=None: the folder has them for {usual}; give one for each of {exits}"
                )
            return {n: known[n] for n in exits}, rule
        values = _one_each(threshold, len(exits))
        if len(values) != len(exits):
            raise ValueError(
                f"early_exit.threshold={values}: {len(values)} thresholds for {len(exits)} exits {exits}; give one per "
                "exit, or one number"
            )
        if not all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= 1 for v in values):
            raise ValueError(
                f"early_exit.threshold={threshold}: must lie within [0, 1]; give e.g. 0.9, or 1.0 for never"
            )
        return dict(zip(exits, values, strict=True)), rule

    def _piece(self, layers, norm):
        """The backbone with these layers and that in the place of its final norm; weights are shared."""
        piece = copy.copy(self.model)
        piece._modules = {**self.model._modules, "layers": nn.ModuleList(layers), "norm": norm}
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
        if isinstance(listed := getattr(cache, "layers", None), list) and 0 < len(listed) < len(kept):
            listed.append(
                type(listed[0])()
            )  # for the block's keys, where transformers made one for each layer
        short = copy.copy(self)
        output = self.lm_head if head.projection is None else head.projection
        short._modules = {**self._modules, "model": self._piece(kept, head), "lm_head": output}
        return short


def _cache_of(kwargs):
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def _one_each(threshold, count):
    return list(threshold) if isinstance(threshold, list | tuple) else [threshold] * count


class _Later(DynamicCache):
    """The cache of layers that do not begin with the first one."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return super().update(key_states, value_states, layer_idx - self.first, *args, **kwargs)


class _Walk:
    """One text on its way through a model whose tokens may leave early.

    Layers are cut at the exits that are asked. Tokens that have left wait there, and are taken along by the next one
    that goes on.

    Args:
        model: with exits.
        thresholds: exit layer -> threshold.
        rule: name of a confidence rule.

    Attributes:
        exit_layers: where each predicted token left.
    """

    def __init__(self, model, thresholds, rule):
        layers, nothing = list(model.model.layers), nn.Identity()
        self.model, self.rule = model, CONFIDENCE_RULES[rule]
        asked = [(model.exits[str(n)], value) for n, value in thresholds.items() if value < NEVER]
        edges = [0, *(head.layer for head, _ in asked), len(layers)]
        self.pieces = [(model._piece(layers[a:b], nothing), _Later(a)) for a, b in pairwise(edges)]
        self.asked = [
            (
                head,
                None if head.block is None else model._piece([head.block], nothing),
                self._block_cache(head),
                value,
            )
            for head, value in asked
        ]
        self.waiting = [None] * len(asked)
        self.fed, self.exit_layers = 0, []

    @staticmethod
    def _block_cache(head):
        return None if head.block is None else _Later(head.block.self_attn.layer_idx)

    def __call__(self, input_ids=None, attention_mask=None, **kwargs):
        """What the model answers: logits [1, 1, V] after the last token, by the exit at which it left."""
        cache = _cache_of(kwargs)
        self._check(input_ids, cache)
        is_prompt = self.fed == 0
        self.fed += input_ids.shape[1]
        mask = input_ids.new_ones(1, self.fed) if attention_mask is None else attention_mask
        self.pieces[0] = self.pieces[0][0], cache  # by whose length `generate` knows where it is
        x = self.model.get_input_embeddings()(input_ids)
        for k, (piece, own) in enumerate(self.pieces):
            x = self._run(piece, x, mask, own)
            if k == len(self.asked):
                break
            head, block, keys, threshold = self.asked[k]
            inside = x if block is None else self._run(block, x, mask, keys)
            if self.waiting[k] is not None:
                x = torch.cat([self.waiting[k], x], dim=1)
            self.waiting[k] = None
            if not is_prompt:
                logits, sure = self._ask(head, inside[:, -1:])
                if sure > threshold:
                    self.waiting[k] = x
                    return self._answer(logits, head.layer, cache)
        logits = self.model.lm_head(self.model.model.norm(x[:, -1:]))
        return self._answer(logits, len(self.model.model.layers), cache)

    def _check(self, ids, cache):
        fault = None
        if ids is None or ids.shape[0] != 1:
            fault = "decodes one text of token ids at a time; call generate for each prompt, without beams"
        elif not isinstance(cache, DynamicCache):
            fault = "needs a cache that grows; leave out use_cache and cache_implementation"
        elif cache.get_seq_length() != self.fed:
            fault = "keeps a cache of its own; give the whole text, and no cache"
        elif self.fed and ids.shape[1] != 1:
            fault = "reads a prompt at once, then token by token; leave out prefill_chunk_size"
        if fault:
            raise ValueError(f"early_exit: {fault}")

    def _run(self, piece, x, mask, cache):
        """[1, S, H] -> [1, S, H]: the last S tokens through some layers."""
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -x.shape[1] :]
        out = piece(
            inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=True, **{CACHE: cache}
        )
        return out.last_hidden_state

    def _ask(self, head, inside):
        """An exit's logits [1, 1, V], of tokens that it knows, and its confidence."""
        state, projection = head(inside), head.projection
        if not isinstance(projection, Shortlist):
            logits = (self.model.lm_head if projection is None else projection)(state)
            return logits, self.rule(logits.flatten().float(), logits.shape[-1]).item()
        rows, bucket = projection.rows(state), projection.bucket(state)
        never = rows.new_full((1, 1, projection.vocab_size), float("-inf"))
        sure = self.rule(torch.cat([rows, bucket], dim=-1).flatten().float(), rows.shape[-1]).item()
        return projection.spread(rows, never), sure

    def _answer(self, logits, layer, cache):
        self.exit_layers.append(layer)
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})


def _max_probability(logits, emittable):
    """Probability of the most probable token; `logits` are of these and perhaps, behind them, of a bucket."""
    return (logits[:emittable].max() - logits.logsumexp(-1)).exp()


def _entropy(logits, emittable):
    """1 - entropy / log(outcomes); a bucket is one outcome."""
    shares = logits.log_softmax(-1)
    return (1 + (shares.exp() * shares).sum() / math.log(max(2, len(shares)))).clamp(0, 1)


def _margin(logits, emittable):
    """Probability of the most probable token less that of the best other outcome, 0 if that is higher."""
    shares = logits.softmax(-1)
    best, row = shares[:emittable].max(-1)
    return (best - shares.index_fill(0, row, 0.0).max()).clamp(0, 1)


CONFIDENCE_RULES = {"max_probability": _max_probability, "entropy": _entropy, "margin": _margin}


def _with_exits(forward):
    """A family's `forward`, by the exit that is asked for."""

    @functools.wraps(forward)
    def forward_with_exits(self, *args, **kwargs):
        if self._walk is not None:
            return self._walk(*args, **kwargs)
        return forward(self._at_depth(_cache_of(kwargs)), *args, **kwargs)

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
