# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How sequences choose their tokens from predictions: greedily or by drawing, with what NeMo's parameters ask.

Suffixes: n predictions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.decoding.prediction import Prediction
from nemo_ee.decoding.request import SamplingOptions
from nemo_ee.decoding.sampling import draw, draw_tokens, token_distribution
from nemo_ee.decoding.step import Step
from nemo_ee.decoding.transfer import to_device
from nemo_ee.modeling.gpt import EarlyExitGPTModel
from nemo_ee.modeling.vocab_parallel import gather_columns


@dataclass(frozen=True)
class TokenDistributions:
    """What n predictions say, beside the most probable tokens.

    Attributes:
        distributions: [n, V] that drafts were drawn from, or are judged by; zeros where none is wanted, and None where
            none is at all.
        log_probs: [n, V] of the prediction itself, nats, whatever the request makes of it; None if nobody wants it.
    """

    distributions: Tensor | None = None
    log_probs: Tensor | None = None


class Chooser:
    """Turns predictions of a model, processed for their sequences (`processed`), into choices.

    Args:
        gpt: the model, or its stage that predicts.
    """

    def __init__(self, gpt: EarlyExitGPTModel):
        self.shard = gpt.vocab_size // gpt.config.tensor_model_parallel_size
        self.vocabulary = gpt.true_vocab_size

    def of_step(
        self, step: Step, sequences: Sequence[GeneratedSequence], drafts: Sequence[bool] | None = None
    ) -> tuple[list[int], TokenDistributions]:
        """For the n sequences that a step answers: the next token of each, the greedy one or one drawn with its own
        number, and what else is asked of its prediction. Waits for the device once at most, for what of the step is
        not read.

        Args:
            step: of processed predictions.
            sequences: n.
            drafts: of which of them the token is a draft, so that its distribution is kept; None for none.

        Collectives: at TP > 1, for anything but plain greedy decoding, an all-gather of [n, Vp/TP], or two.
        """
        log_probs = self._log_probs(step, sequences)
        sampled = [i for i, sequence in enumerate(sequences) if not sequence.request.sampling.use_greedy]
        if not sampled:
            return step.most_probable(), TokenDistributions(None, log_probs)
        logits = self._logits(step)
        drawn = torch.empty(len(sequences), dtype=torch.long, device=logits.device)
        kept = [i for i in sampled if drafts is not None and drafts[i]]
        distributions = self._distributions(logits, sequences, kept) if kept else None
        if distributions is not None:
            index = to_device(kept, logits.device)
            drawn[index] = draw(distributions[index], [_uniform(sequences[i]) for i in kept])
        for options, members in _by_options(sequences, sorted({*sampled} - {*kept})):
            uniforms = [_uniform(sequences[i]) for i in members]
            if len(members) == len(sequences):
                drawn = draw_tokens(logits, options, uniforms)
            else:
                index = to_device(members, logits.device)
                drawn[index] = draw_tokens(logits[index], options, uniforms)
        (tokens,) = step.read(drawn)
        for i, token in enumerate(step.most_probable()):
            if sequences[i].request.sampling.use_greedy:
                tokens[i] = token
        return tokens, TokenDistributions(distributions, log_probs)

    def of_prediction(
        self, prediction: Prediction, sequences: Sequence[GeneratedSequence]
    ) -> TokenDistributions:
        """For n places, of these sequences: what drafts are judged by.

        Collectives: see `of_step`.
        """
        log_probs = self._log_probs(prediction, sequences)
        sampled = [i for i, sequence in enumerate(sequences) if not sequence.request.sampling.use_greedy]
        if not sampled:
            return TokenDistributions(None, log_probs)
        return TokenDistributions(
            self._distributions(self._logits(prediction), sequences, sampled), log_probs
        )

    def _logits(self, said: Step | Prediction, own: bool = False) -> Tensor:
        """[n, V]."""
        return gather_columns(said.vocabulary_shard(self.shard, own))[:, : self.vocabulary]

    def _log_probs(self, said: Step | Prediction, sequences: Sequence[GeneratedSequence]) -> Tensor | None:
        if not any(sequence.request.sampling.all_probs for sequence in sequences):
            return None
        logits = self._logits(said, own=True)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    @staticmethod
    def _distributions(
        logits: Tensor, sequences: Sequence[GeneratedSequence], members: Sequence[int]
    ) -> Tensor:
        """[n, V], of some members."""
        out = logits.new_zeros(logits.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
        for options, some in _by_options(sequences, members):
            index = to_device(some, logits.device)
            out[index] = token_distribution(logits[index], options)
        return out


def _uniform(sequence: GeneratedSequence) -> float:
    """The number that draws a sequence's next token, or draft."""
    return sequence.random("draw").random()


def _by_options(
    sequences: Sequence[GeneratedSequence], members: Sequence[int]
) -> list[tuple[SamplingOptions, list[int]]]:
    """Some of the sequences; those of the same options are computed together."""
    groups: dict[SamplingOptions, list[int]] = {}
    for i in members:
        groups.setdefault(sequences[i].request.sampling, []).append(i)
    return list(groups.items())
