# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How sequences choose their tokens from predictions: greedily or by drawing, with what NeMo's parameters ask.

Suffixes: n predictions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.decoding.layers.lean_head import LeanOutput
from nemo_ee.decoding.logprobs import POSITIONS, TokenLogprobs, summarised
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
        logits: [n, V] of the predictions themselves, whatever requests make of them; None if nobody keeps anything of
            them.
        normaliser: [n] of these, see `Prediction.own_normaliser`.
    """

    distributions: Tensor | None = None
    logits: Tensor | None = None
    normaliser: Tensor | None = None

    def logprobs(self, n: int, sequence: GeneratedSequence, token: int) -> list[TokenLogprobs]:
        """What the n-th prediction, by which a sequence got that token, says of it; nothing if it does not ask."""
        if (top := sequence.request.sampling.logprobs) is None:
            return []
        assert self.logits is not None and self.normaliser is not None, "this sequence wants them"
        return summarised(self.logits[n : n + 1], self.normaliser[n : n + 1], [token], top)


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
        own = self._kept(step, sequences)
        sampled = [i for i, sequence in enumerate(sequences) if not sequence.request.sampling.use_greedy]
        if not sampled:
            return step.most_probable(), TokenDistributions(None, *own)
        logits = self.logits(step)
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
        return tokens, TokenDistributions(distributions, *own)

    def of_prediction(
        self, prediction: Prediction, sequences: Sequence[GeneratedSequence]
    ) -> TokenDistributions:
        """For n places, of these sequences: what drafts are judged by.

        Collectives: see `of_step`.
        """
        own = self._kept(prediction, sequences)
        sampled = [i for i, sequence in enumerate(sequences) if not sequence.request.sampling.use_greedy]
        if not sampled:
            return TokenDistributions(None, *own)
        return TokenDistributions(self._distributions(self.logits(prediction), sequences, sampled), *own)

    def score_prompt(self, sequence: GeneratedSequence, states: Tensor, output: LeanOutput) -> None:
        """Gives a sequence what the final exit says of its prompt's tokens; logits of `POSITIONS` exist at once.

        Args:
            sequence: that asks for `prompt_logprobs`.
            states: [S, H] of the prompt's S tokens behind the last layer.
            output: the final exit.

        Collectives: at TP > 1 an all-gather of [POSITIONS, Vp/TP] for each of them.
        """
        top, prompt = sequence.request.sampling.prompt_logprobs, sequence.prompt
        assert top is not None, "this sequence wants them"
        sequence.prompt_logprobs = [None]
        for first in range(0, len(prompt) - 1, POSITIONS):
            tokens = prompt[first + 1 : first + 1 + POSITIONS]
            said = output.predict(states[first : first + len(tokens)])
            sequence.prompt_logprobs += summarised(self.logits(said), said.own_normaliser(), tokens, top)

    def logits(self, said: Step | Prediction, own: bool = False) -> Tensor:
        """[n, V], of what requests make of them, or the model's own. Collectives: at TP > 1 an all-gather of them."""
        return gather_columns(said.vocabulary_shard(self.shard, own))[:, : self.vocabulary]

    def _kept(
        self, said: Step | Prediction, sequences: Sequence[GeneratedSequence]
    ) -> tuple[Tensor, Tensor] | tuple[()]:
        """`TokenDistributions.logits` and `normaliser`, if any of the sequences asks for something of them."""
        if not any(sequence.request.sampling.keeps_logprobs for sequence in sequences):
            return ()
        return self.logits(said, own=True), said.own_normaliser()

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


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities [., V] in float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


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
