# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A frozen backbone's states, computed once per text and kept, and held-out text measured on them."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from nemo_ee.evaluation.held_out import held_out_sequences, measure_quality
from nemo_ee.evaluation.teacher_forced import ExitScores, TextScores, score_exit, score_final
from nemo_ee.megatron.gpt import EarlyExitGPTModel, StageStates

BATCH = 8


class CachedBackbone:
    """Stands in for `forward_states` of models that share one backbone: a text that was seen is looked up.

    States stay in the backbone's dtype: 3 x H values per token for two exits and the final state.
    """

    def __init__(self) -> None:
        self._states: dict[bytes, StageStates] = {}
        self._compute: Callable[..., StageStates] | None = None

    def attach(self, gpt: EarlyExitGPTModel) -> None:
        """Puts the cache between a model and its backbone."""
        self._compute = gpt.forward_states
        gpt.forward_states = self  # type: ignore[method-assign]

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, needs_final: bool = True
    ) -> StageStates:
        """As `EarlyExitGPTModel.forward_states`, always at full depth."""
        key = input_ids.cpu().numpy().tobytes()
        if key not in self._states:
            with torch.no_grad():
                states = self._compute(input_ids, position_ids, attention_mask)
            self._states[key] = replace(states, exits=dict(states.exits))
        return self._states[key]


class HeldOut:
    """Held-out text, scored by a model whose `forward_states` is cached; the final exit's part is kept too.

    Args:
        prefix: of the indexed dataset.
        sequences: how many.
        length: tokens per sequence.
        seed: of the bootstrap.
    """

    def __init__(self, prefix: str, sequences: int, length: int, seed: int = 0):
        self.prefix, self.sequences, self.length, self.seed = prefix, sequences, length, seed
        self._batches: tuple[Tensor, ...] = ()
        self._finals: dict[bytes, ExitScores] = {}

    def measure(self, model: Any) -> list[dict]:
        """`ExitQuality` of each exit, as plain values."""
        gpt = model.gpt
        if not self._batches:
            ids = held_out_sequences(self.prefix, self.sequences, self.length, model.true_vocab_size)
            self._batches = ids.to(model.device_of_batches).split(BATCH)

        def score(tokens: Tensor, labels: Tensor) -> TextScores:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            states = gpt.forward_states(tokens, positions, None)
            key = tokens.cpu().numpy().tobytes()
            if key not in self._finals:
                self._finals[key] = score_final(gpt, states.output, labels)
            return TextScores(
                self._finals[key], {n: score_exit(gpt, n, states, labels) for n in gpt.exit_layers}
            )

        gpt.eval()
        with torch.no_grad():
            quality = measure_quality(score, self._batches, self.seed)
        gpt.train()
        return [asdict(each) for each in quality.exits]
