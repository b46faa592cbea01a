# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How sequences choose their tokens from predictions: greedily or by drawing, with what NeMo's parameters ask.

Suffixes: n predictions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.decoding.prediction import Prediction
from nemo_ee.decoding.request import SamplingOptions
from nemo_ee.decoding.sampling import draw, token_distribution
from nemo_ee.decoding.step import Step
from nemo_ee.decoding.transfer import to_device
from nemo_ee.modeling.gpt import EarlyExitGPTModel
from nemo_ee.modeling.vocab_parallel import gather_columns


@dataclass(frozen=True)
class TokenSlot:
    """Where a token is to be chosen.

    Attributes:
        options: of its sequence.
        eos: tokens that end texts.
        too_short: those may not come yet.
        text: token ids before it; only for a repetition penalty, else empty.
    """

    options: SamplingOptions
    eos: tuple[int, ...]
    too_short: bool
    text: list[int]

    @classmethod
    def after(cls, sequence: GeneratedSequence, drafts: int | None = None) -> "TokenSlot":
        """Behind a sequence's tokens and some of its drafts; None means all."""
        options, count = sequence.request.sampling, len(sequence.drafts) if drafts is None else drafts
        too_short = bool(sequence.eos) and len(sequence.tokens) + count < sequence.request.min_length
        text: list[int] = []
        if not options.use_greedy and options.repetition_penalty != 1.0:
            text = sequence.prompt + sequence.tokens + [draft.token for draft in sequence.drafts[:count]]
        return cls(options, sequence.eos, too_short, text)

    def needs_logits(self, token: int | None) -> bool:
        """Whether the most probable token is not all that is asked for, or may not come yet. None for one that the
        host does not know."""
        too_early = self.too_short and (token is None or token in self.eos)
        return not self.options.tokens_alone or too_early


@dataclass(frozen=True)
class TokenDistributions:
    """What n predictions say, for their places.

    Attributes:
        greedy: [n] tokens of greedy places, arbitrary elsewhere; None where they are the most probable ones.
        distributions: [n, V] to draw from; None if all places are greedy.
        log_probs: [n, V] of the prediction itself, nats; None if no place wants it.
    """

    greedy: Tensor | None = None
    distributions: Tensor | None = None
    log_probs: Tensor | None = None


class Chooser:
    """Turns predictions of a model into choices.

    Args:
        gpt: the model, or its stage that predicts.
    """

    def __init__(self, gpt: EarlyExitGPTModel):
        self.shard = gpt.vocab_size // gpt.config.tensor_model_parallel_size
        self.vocabulary = gpt.true_vocab_size

    def of_step(
        self, step: Step, sequences: Sequence[GeneratedSequence]
    ) -> tuple[list[int], TokenDistributions]:
        """For the n sequences that a step answers: the next token of each, the greedy one or one drawn with its own
        number, and what it was chosen from. Waits for the device once at most, for what of the step is not read.

        Collectives: see `of_prediction`.
        """
        places = [TokenSlot.after(s) for s in sequences]
        best = step.most_probable() if step.is_read else None
        found = self._choices(places, best, lambda: step.vocabulary_shard(self.shard))
        sampled = [i for i, place in enumerate(places) if not place.options.use_greedy]
        if sampled:
            distributions = found.distributions
            assert distributions is not None, "some sequences sample"
            uniforms = [sequences[i].random("draw").random() for i in sampled]
            if len(sampled) == len(places):
                return step.read(draw(distributions, uniforms))[0], found
            assert found.greedy is not None, "some sequences do not"
            index = to_device(sampled, distributions.device)
            greedy, drawn = step.read(found.greedy, draw(distributions[index], uniforms))
            for i, token in zip(sampled, drawn, strict=True):
                greedy[i] = token
            return greedy, found
        if found.greedy is None:
            return step.most_probable() if best is None else best, found
        return step.read(found.greedy)[0], found

    def of_prediction(self, prediction: Prediction, places: Sequence[TokenSlot]) -> TokenDistributions:
        """For n places.

        Collectives: at TP > 1, for anything but plain greedy decoding, an all-gather of [n, Vp/TP].
        """
        best = prediction.tokens.tolist() if prediction.tokens.device.type == "cpu" else None
        return self._choices(places, best, lambda: prediction.vocabulary_shard(self.shard))

    def _choices(
        self, places: Sequence[TokenSlot], best: list[int] | None, shard: Callable[[], Tensor]
    ) -> TokenDistributions:
        known = [None] * len(places) if best is None else best
        if not any(place.needs_logits(token) for place, token in zip(places, known, strict=True)):
            return TokenDistributions()
        raw = gather_columns(shard())[:, : self.vocabulary]
        log_probs = None
        if any(place.options.all_probs for place in places):
            log_probs = raw.to(torch.promote_types(raw.dtype, torch.float32)).log_softmax(-1)
        allowed = raw.clone()
        for i, place in enumerate(places):
            for token in place.eos if place.too_short else ():
                allowed[i, token : token + 1] = float("-inf")  # a slice is filled without a wait
        greedy = allowed.argmax(-1) if any(place.options.use_greedy for place in places) else None
        if all(place.options.use_greedy for place in places):
            return TokenDistributions(greedy, None, log_probs)
        return TokenDistributions(greedy, _distributions(places, allowed), log_probs)


def _distributions(places: Sequence[TokenSlot], logits: Tensor) -> Tensor:
    """[n, V]; places of the same options are computed together."""
    groups: dict[SamplingOptions, list[int]] = {}
    for i, place in enumerate(places):
        groups.setdefault(place.options, []).append(i)
    out = logits.new_zeros(logits.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    for options, members in groups.items():
        index = to_device(members, logits.device)
        out[index] = token_distribution(logits[index], options, [places[i].text for i in members]).to(
            out.dtype
        )
    return out
