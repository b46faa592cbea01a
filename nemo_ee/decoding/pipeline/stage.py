# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One stage of a pipeline that decodes: its layers, its exits, its part of the KV cache."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from nemo_ee.decoding.choosing import Chooser
from nemo_ee.decoding.confidence_rules import CONFIDENCE_RULES, ExitEvidence
from nemo_ee.decoding.decoding_model import DecodingModel
from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.decoding.layers.packed_tokens import PackedTokens
from nemo_ee.decoding.layers.segment import Segment
from nemo_ee.decoding.leaving import is_asked, leaves
from nemo_ee.decoding.logits_processing import processed
from nemo_ee.decoding.logprobs import TokenLogprobs
from nemo_ee.decoding.step import Part, Step
from nemo_ee.decoding.transfer import to_device, to_host


@dataclass(frozen=True)
class ChosenToken:
    """A token that an exit of some stage has chosen for a sequence.

    Attributes:
        key: of the sequence.
        token: its id.
        exit_layer: `num_layers` for the final exit.
        confidence: of the exit.
        logprobs: one entry, of the exit, or none; see `GeneratedSequence`.
        prompt_logprobs: with the first token, if they are asked for; likewise.
    """

    key: int
    token: int
    exit_layer: int
    confidence: float
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    def give(self, sequence: GeneratedSequence) -> bool:
        """Hands it to its sequence; returns whether that goes on."""
        sequence.logprobs += self.logprobs
        sequence.prompt_logprobs += self.prompt_logprobs
        if sequence.limit == 0:
            sequence.finish_reason = "length"
            return False
        return sequence.commit(self.token, self.exit_layer, self.confidence)


@dataclass
class TokenBatch:
    """New tokens on their way through the stages; those of one sequence are contiguous.

    Attributes:
        keys: of the N sequences.
        starts: [N] position of each one's first new token.
        ids: [N] lists of token ids.
        undecided: [N] whether the token behind the last of these is still to be chosen.
        may_exit: [N] whether early exits may choose it (a prompt's may not).
    """

    keys: list[int]
    starts: list[int]
    ids: list[list[int]]
    undecided: list[bool]
    may_exit: list[bool]


@dataclass
class Stage:
    """Runs tokens through this stage's layers; see `PipelineSession`.

    Every stage keeps its own account of the sequences: their rows, requests and tokens, and can therefore
    choose tokens, drawn ones included, just as the first stage would.

    Args:
        model: of this stage.
        exit_layers: exits that any sequence may use.
        slots: sequences at a time.
        max_length: positions.
        confidence: name of the rule.
    """

    model: DecodingModel
    exit_layers: list[int]
    slots: int
    max_length: int
    confidence: str
    sequences: dict[int, GeneratedSequence] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.model
        self.rule = CONFIDENCE_RULES[self.confidence]
        self.table = model.table(self.max_length)
        mine = [n for n in self.exit_layers if n in model.heads]
        layers = model.cached_layers(self.slots, self.max_length)
        numbers = [list(members) for _, members in groupby(layers, key=lambda n: bisect_left(mine, n))]
        self.segments = {each[-1]: Segment([layers[n] for n in each]) for each in numbers}
        self.blocks = {n: model.cached_block(n, self.slots, self.max_length) for n in mine}
        self.chooser = Chooser(model.gpt)
        self.free_rows = list(range(self.slots))[::-1]

    def open(self, key: int, sequence: GeneratedSequence) -> None:
        """Gives a sequence a row of the caches."""
        self.sequences[key], self.rows[key] = sequence, self.free_rows.pop()

    def close(self, key: int) -> None:
        """Frees a sequence's row."""
        del self.sequences[key]
        self.free_rows.append(self.rows.pop(key))

    def run(self, tokens: TokenBatch, hidden: Tensor | None) -> tuple[Tensor, list[ChosenToken]]:
        """Runs new tokens through the layers and asks exits for those that are undecided.

        `tokens.undecided` becomes False where an exit here has chosen; the KV cache is filled for all. On the
        last stage the final exit chooses for the rest.

        Args:
            tokens: of sequences that are open.
            hidden: [T, H] in the order of `tokens`; None on the first stage.

        Returns:
            [T, H] for the next stage, in the same order, and this stage's answers.
        """
        order = sorted(range(len(tokens.keys)), key=lambda i: self.rows[tokens.keys[i]])
        counts = [len(tokens.ids[i]) for i in order]
        packed = PackedTokens(
            self.table, [self.rows[tokens.keys[i]] for i in order], [tokens.starts[i] for i in order], counts
        )
        self._note(tokens)
        if hidden is None:
            ids = to_device([t for i in order for t in tokens.ids[i]], self.model.device)
            x = self.model.embed(ids, packed.positions)
        else:
            parts = hidden.to(self.model.device).split([len(ids) for ids in tokens.ids])
            x = torch.cat([parts[i] for i in order])
        answers: list[ChosenToken] = []
        for n, segment in self.segments.items():
            x = segment(x, packed)
            if n in self.blocks:
                block = self.blocks[n]
                inside = x if block is None else block(x.to(self.model.heads[n].dtype), packed)
                answers += self._ask(n, x[packed.last], inside[packed.last], tokens, order)
        if self.model.output is not None:
            self._score_prompts(x.split(counts), tokens, order)
            answers += self._ask(None, x[packed.last], x[packed.last], tokens, order)
        if order != sorted(order):
            parts = dict(zip(order, x.split(counts), strict=True))
            x = torch.cat([parts[i] for i in range(len(order))])
        return x, answers

    def _note(self, tokens: TokenBatch) -> None:
        """Keeps account of tokens that were generated; the first of a sequence is its prompt."""
        for key, start, ids in zip(tokens.keys, tokens.starts, tokens.ids, strict=True):
            sequence = self.sequences[key]
            known = start - len(sequence.prompt)
            if known >= 0:
                sequence.tokens[known:] = ids

    def _score_prompts(self, states: Sequence[Tensor], tokens: TokenBatch, order: list[int]) -> None:
        """On the last stage, of prompts among new tokens, whose states [S, H] are in rows' order."""
        output = self.model.output
        assert output is not None, "the last stage has the final exit"
        for x, i in zip(states, order, strict=True):
            sequence = self.sequences[tokens.keys[i]]
            if tokens.starts[i] == 0 and sequence.request.sampling.prompt_logprobs is not None:
                self.chooser.score_prompt(sequence, x, output)

    def _ask(
        self, n: int | None, x: Tensor, inside: Tensor, tokens: TokenBatch, order: list[int]
    ) -> list[ChosenToken]:
        """What the exit on layer n, or the final exit, says about the last tokens [N, H] in rows' order."""
        asked = [
            j
            for j, i in enumerate(order)
            if tokens.undecided[i]
            and (n is None or tokens.may_exit[i] and is_asked(self._threshold(tokens, i, n)))
        ]
        if not asked:
            return []
        index = to_device(asked, x.device)
        slots = [self.sequences[tokens.keys[order[j]]].slot() for j in asked]
        if n is None:
            alone = all(self.sequences[tokens.keys[order[j]]].request.sampling.tokens_alone for j in asked)
            output = self.model.greedy_output if alone else self.model.output
            assert output is not None, "the last stage asks the final exit"
            prediction = processed(output.predict(x[index]), slots, final=True)
            step, leaving = Step.of_final(prediction, self.model.final_layer), asked
        else:
            prediction = processed(self.model.heads[n].predict(inside[index]), slots)
            sure, best = to_host(self.rule.sureness(ExitEvidence(prediction, x[index])), prediction.tokens)
            out = [m for m, j in enumerate(asked) if leaves(sure[m], self._threshold(tokens, order[j], n))]
            if not out:
                return []
            leaving, step = [asked[m] for m in out], Step.unanswered(len(out))
            step.add(n, Part(list(range(len(out))), prediction, out), sure, best)
        members = [order[j] for j in leaving]
        keys = [tokens.keys[i] for i in members]
        sequences = [self.sequences[key] for key in keys]
        chosen, found = self.chooser.of_step(step, sequences)
        kept = [found.logprobs(m, *each) for m, each in enumerate(zip(sequences, chosen, strict=True))]
        for i in members:
            tokens.undecided[i] = False
        prompts = [
            s.prompt_logprobs if tokens.starts[i] == 0 else []
            for i, s in zip(members, sequences, strict=True)
        ]
        answers = zip(keys, chosen, step.exit_layers, step.confidences, kept, prompts, strict=True)
        return [ChosenToken(*each) for each in answers]

    def _threshold(self, tokens: TokenBatch, i: int, n: int) -> float:
        return self.sequences[tokens.keys[i]].request.threshold(n)


def merge(several: list[tuple[TokenBatch, Tensor]]) -> tuple[TokenBatch, Tensor]:
    """Tokens that came one after the other as one pass; a sequence may come more than once."""
    if len(several) == 1:
        return several[0]
    places: dict[int, int] = {}
    merged, parts = TokenBatch([], [], [], [], []), []
    for tokens, hidden in several:
        pieces = hidden.split([len(ids) for ids in tokens.ids])
        for i, key in enumerate(tokens.keys):
            if key not in places:
                places[key] = len(merged.keys)
                merged.keys.append(key)
                merged.starts.append(tokens.starts[i])
                merged.ids.append(list(tokens.ids[i]))
                merged.undecided.append(tokens.undecided[i])
                merged.may_exit.append(tokens.may_exit[i])
                parts.append([pieces[i]])
            else:
                at = places[key]
                merged.ids[at] += tokens.ids[i]
                merged.undecided[at], merged.may_exit[at] = tokens.undecided[i], tokens.may_exit[i]
                parts[at].append(pieces[i])
    return merged, torch.cat([piece for each in parts for piece in each])
