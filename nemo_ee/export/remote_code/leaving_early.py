# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""`generate(early_exit=...)` of an exported folder: who leaves where, and what is computed later. See
`modeling_early_exit.py`; V is the vocabulary's size, S are tokens, H is the hidden size."""

import difflib
import inspect
import math
from itertools import pairwise

import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from .leaving import leaves

OPTIONS = ("threshold", "exits", "confidence")
"""Keys of `generate(early_exit=...)`."""
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(name for name in CACHE_NAMES if name in inspect.signature(LlamaForCausalLM.forward).parameters)
"""What this version of transformers calls the cache."""


def thresholds_of(given, layers, own):
    """Exit layer -> threshold, and the confidence rule.

    Args:
        given: what `generate` was given.
        layers: of the model's exits.
        own: `config.early_exit["inference"]`: the folder's `threshold`, `exits` and `confidence`.

    Raises:
        ValueError: says what cannot be, and what to give instead.
    """
    if not layers:
        raise ValueError(f"early_exit={given}: the model has no exits; leave it out")
    given = {} if given is True else given
    if not isinstance(given, dict):
        raise ValueError(f"early_exit={given}: must be a dict or True; give e.g. {{'threshold': 0.9}}")
    for key, value in given.items():
        if key not in OPTIONS:
            near = difflib.get_close_matches(str(key), OPTIONS, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"use {', '.join(OPTIONS)}"
            raise ValueError(f"early_exit.{key}={value}: no such option; {remedy}")
    own_rule, usual = own.get("confidence", "max_probability"), own.get("exits") or layers
    rule, exits = (
        usually if given.get(name) is None else given[name]
        for name, usually in (("confidence", own_rule), ("exits", usual))
    )
    if rule not in CONFIDENCE_RULES:
        remedy = f"must be one of {', '.join(CONFIDENCE_RULES)}; give one, and thresholds for it"
        raise ValueError(f"early_exit.confidence={rule}: {remedy}")
    some = isinstance(exits, list | tuple) and len(exits) > 0 and all(n in layers for n in exits)
    if not some or list(exits) != sorted(set(exits)):
        remedy = f"not some of the exits {layers}, ascending; name such, or leave it out"
        raise ValueError(f"early_exit.exits={exits}: {remedy}")
    threshold = given.get("threshold")
    if threshold is None:
        ours = own.get("threshold")
        known = {} if ours is None else dict(zip(usual, _one_each(ours, len(usual)), strict=True))
        if rule != own_rule or not set(exits) <= set(known):
            remedy = (
                f"the folder has none for confidence={rule} and exits {exits}; give e.g. 0.9, or one per exit"
            )
            raise ValueError(f"early_exit.threshold=None: {remedy}")
        return {n: known[n] for n in exits}, rule
    values = _one_each(threshold, len(exits))
    if len(values) != len(exits):
        remedy = f"{len(values)} thresholds for {len(exits)} exits {exits}; give one per exit, or one number"
        raise ValueError(f"early_exit.threshold={values}: {remedy}")
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= 1 for v in values):
        remedy = "must lie within [0, 1]; give e.g. 0.9, or 1.0 for never"
        raise ValueError(f"early_exit.threshold={threshold}: {remedy}")
    return dict(zip(exits, values, strict=True)), rule


def _one_each(threshold, count):
    return list(threshold) if isinstance(threshold, list | tuple) else [threshold] * count


def cache_of(arguments):
    """The cache among the keyword arguments of a forward pass."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


class Later(DynamicCache):
    """The cache of layers that do not begin with the first one."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return super().update(key_states, value_states, layer_idx - self.first, *args, **kwargs)


class Walk:
    """One text on its way through a model whose tokens may leave early.

    Layers are cut at the exits that are asked. Tokens that have left wait there, and are taken along by the next one
    that goes on.

    Args:
        model: with exits.
        thresholds: of the exits that are asked: layer -> threshold, ascending.
        rule: name of a confidence rule.

    Attributes:
        exit_layers: where each predicted token left.
    """

    def __init__(self, model, thresholds, rule):
        layers, nothing = list(model.model.layers), nn.Identity()
        self.model, self.rule = model, CONFIDENCE_RULES[rule]
        self.asked = [(model.exits[str(n)], value) for n, value in thresholds.items()]
        edges = [0, *(head.layer for head, _ in self.asked), len(layers)]
        self.pieces = [(model.piece(layers[a:b], nothing), Later(a)) for a, b in pairwise(edges)]
        self.blocks = {
            head.layer: (model.piece([head.block], nothing), Later(head.block.self_attn.layer_idx))
            for head, _ in self.asked
            if head.block is not None
        }
        self.waiting = [None] * len(self.asked)
        self.fed, self.exit_layers = 0, []

    def __call__(self, input_ids=None, attention_mask=None, **kwargs):
        """What the model answers: logits [1, 1, V] after the last token, by the exit at which it left."""
        cache = cache_of(kwargs)
        self._check(input_ids, cache)
        is_prompt = self.fed == 0
        self.fed += input_ids.shape[1]
        mask = input_ids.new_ones(1, self.fed) if attention_mask is None else attention_mask
        self.pieces[0] = self.pieces[0][0], cache  # by whose length `generate` knows where it is
        x = self.model.get_input_embeddings()(input_ids)
        for k, (piece, own) in enumerate(self.pieces):
            x = self._run(piece, own, x, mask)
            if k == len(self.asked):
                break
            head, threshold = self.asked[k]
            inside = x if head.block is None else self._run(*self.blocks[head.layer], x, mask)
            if self.waiting[k] is not None:
                x = torch.cat([self.waiting[k], x], dim=1)
            self.waiting[k] = None
            if not is_prompt:
                logits, outcomes = head.ask(inside[:, -1:], self.model.lm_head)
                if leaves(self.rule(*outcomes).item(), threshold):
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

    def _run(self, piece, cache, x, mask):
        """[1, S, H] -> [1, S, H]: the last S tokens through some layers."""
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -x.shape[1] :]
        out = piece(
            inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=True, **{CACHE: cache}
        )
        return out.last_hidden_state

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
