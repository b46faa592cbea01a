# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Log-probabilities of continuations as exits give them, teacher-forced.

Suffixes: B texts of a batch, S tokens of a text, T tokens that are scored, of all continuations of a batch.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from nemo_ee.decoding.decoding_model import asked_heads
from nemo_ee.decoding.leaving import is_asked
from nemo_ee.evaluation.teacher_forced import ExitScores, TextScores, score_exit, score_final
from nemo_ee.generation.generating import generating
from nemo_ee.modeling.gpt import StageStates

Continuation = tuple[Sequence[int], Sequence[int]]
"""The tokens that a model reads, [S], and the tokens that it is to say behind the last of them: a continuation of c
tokens, whose first c - 1 are the end of what is read."""
Scored = tuple[float, bool]
"""The log-probability of a continuation, in nats, and whether each of its tokens is the most probable one."""
Way = Mapping[int, float]
"""Exit layer -> threshold; empty for full depth."""


def score_continuations(
    model: Any, continuations: Sequence[Continuation], ways: Sequence[Way], batch_size: int
) -> Iterator[tuple[int, list[Scored]]]:
    """Scores continuations in each of several ways, from one pass over the text.

    A token is scored by the first exit whose confidence, the probability of its most probable token, is strictly
    above its threshold, and by the final exit where there is none. That holds for the first token, too, which decoding
    always takes from the final exit. A shortlist's exit gives to all tokens that it has no row for equal shares of its
    bucket's probability, so that its probabilities are those of tokens and sum to 1.

    Args:
        model: a `MegatronGPTEarlyExitModel` in one process.
        continuations: with texts within the model's positions.
        ways: thresholds.
        batch_size: different texts at a time. Texts that are read for several continuations are read once.

    Yields:
        The index of a continuation, and its score in each way. Long texts come first.
    """
    layers = sorted({n for way in ways for n, threshold in way.items() if is_asked(threshold)})
    texts: dict[tuple[int, ...], list[int]] = {}
    for index, (read, _) in enumerate(continuations):
        texts.setdefault(tuple(read), []).append(index)
    with generating(model):
        heads = {n: head for n, head in asked_heads(model.gpt).items() if n in layers} if layers else {}
    waiting = iter(sorted(texts, key=len, reverse=True))
    while batch := list(islice(waiting, batch_size)):
        wanted = [(row, index) for row, text in enumerate(batch) for index in texts[text]]
        spans = [(row, len(batch[row]), continuations[index][1]) for row, index in wanted]
        with generating(model):
            scores = _scores(model.gpt, batch, spans, layers, heads)
            found = [_in_way(scores, way, [len(said) for *_, said in spans]) for way in ways]
        for place, (_, index) in enumerate(wanted):
            yield index, [each[place] for each in found]


def _scores(
    gpt: Any,
    texts: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int, Sequence[int]]],
    layers: Iterable[int],
    heads: Mapping[int, Any],
) -> tuple[TextScores, Tensor]:
    """Scores of the tokens of all spans, [1, T], and these tokens. A span is a text's row, its length, and what is
    said behind it."""
    device = gpt.output_weight().device
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long, device=device)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(text, device=device)
    rows = [row for row, _, said in spans for _ in said]
    ends = [length - len(said) + i for _, length, said in spans for i in range(len(said))]
    labels = torch.tensor([[token for *_, said in spans for token in said]], device=device)
    rows, ends = torch.tensor(rows, device=device), torch.tensor(ends, device=device)

    def places(state: Tensor) -> Tensor:
        return state[ends, rows][:, None]

    states: StageStates = gpt.forward_states(
        ids, torch.arange(ids.shape[1], device=device).expand_as(ids), None
    )
    final = score_final(gpt, places(states.output), labels)
    exits = {n: score_exit(gpt, n, states, labels, heads.get(n), places) for n in layers}
    return TextScores(final, {n: _over_tokens(gpt, n, scores, labels) for n, scores in exits.items()}), labels


def _over_tokens(gpt: Any, layer: int, scores: ExitScores, labels: Tensor) -> ExitScores:
    """With the bucket's probability in equal shares among the tokens that an exit has no row for."""
    projection = gpt.exits[str(layer)].projection
    if projection.kind != "shortlist" or projection.num_kept == projection.vocab_size:
        return scores
    without_row = ~torch.isin(labels, projection.token_ids)
    share = math.log(projection.vocab_size - projection.num_kept)
    losses = scores.losses + share * without_row
    return ExitScores(scores.tokens, scores.confidences, losses, scores.bucket_wins)


def _in_way(found: tuple[TextScores, Tensor], way: Way, lengths: Sequence[int]) -> list[Scored]:
    """Of each continuation, of these lengths."""
    scores, labels = found
    asked = {n: threshold for n, threshold in way.items() if is_asked(threshold)}
    tokens, layers = scores.leaving(asked)
    losses = scores.final.losses
    for n in asked:
        losses = torch.where(layers == n, scores.exits[n].losses, losses)
    logprobs = (-losses[0].double()).split(list(lengths))
    greedy = (tokens == labels)[0].split(list(lengths))
    return [(each.sum().item(), bool(same.all())) for each, same in zip(logprobs, greedy, strict=True)]
