# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Decoding with early exits and an exact KV cache: a token that goes on takes those that left early along.

The layers are cut into segments at the exits in use. `filled[k][row]` counts the tokens of a sequence that went
through segment k; it falls with k. The tokens between `filled[k + 1][row]` and `filled[k][row]` are *pending*
at exit k: they left there or before, and their hidden states are kept. A token that goes past exit k takes
them along in one batched pass, which fills their keys and values. So every layer sees every token at most once,
and a token that reaches a layer finds there the keys of all tokens before it: outputs equal those of an
uncached forward. Two other policies exist for comparison, see `KV_POLICIES`.
"""

import weakref
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from nemo_ee.decoding.assumed_prices import prices_of
from nemo_ee.decoding.confidence_rules import CONFIDENCE_RULES
from nemo_ee.decoding.cpu.one_sequence import OneSequence
from nemo_ee.decoding.cuda.captured_decoding import passes_for
from nemo_ee.decoding.decoding_memory import KV_POLICIES
from nemo_ee.decoding.decoding_model import DecodingModel
from nemo_ee.decoding.exit_point import ExitPoint, Trail
from nemo_ee.decoding.layers.packed_tokens import PackedTokens
from nemo_ee.decoding.leaving import is_asked, leaves
from nemo_ee.decoding.logits_processing import TokenSlot, processed
from nemo_ee.decoding.pass_prices import PassPrices
from nemo_ee.decoding.prediction import Prediction
from nemo_ee.decoding.step import Part, Step
from nemo_ee.decoding.transfer import to_device


class EarlyExitDecoder:
    """Sequences that are continued token by token, each in a row of the caches; see the module's text.

    Must run without gradients. All tensor-parallel ranks make the same calls and take the same exits.

    Args:
        model: the whole model, on one pipeline stage.
        exit_layers: where the layers are cut, ascending: exits that any sequence may use.
        rows: sequences that fit.
        max_length: positions to reserve per sequence.
        kv_policy: see `KV_POLICIES`.
        confidence: name of the rule by which exits are sure, see `CONFIDENCE_RULES`.
        prices: of passes; None for the model's.

    Attributes:
        filled: [segments][sequences] tokens that went through each segment.
        layers_run: [sequences] passes of one token through one layer so far, without exits' own blocks.
        spent: price of all passes so far but prompts'.
    """

    def __init__(
        self,
        model: DecodingModel,
        exit_layers: Sequence[int],
        rows: int,
        max_length: int,
        kv_policy: str = "catch_up",
        confidence: str = "max_probability",
        prices: PassPrices | None = None,
    ):
        assert kv_policy in KV_POLICIES, kv_policy
        assert model.output is not None, "the whole model, on one pipeline stage"
        self.model, self.policy, self.rows = model, kv_policy, rows
        self.final_layer, self.output = model.final_layer, model.output
        self.passes = passes_for(model, exit_layers, rows, max_length)
        self._give_back = weakref.finalize(self, self.passes.give_back)
        memory = self.passes.memory
        self.table = memory.table
        self.rule = CONFIDENCE_RULES[confidence]
        self.exits = [ExitPoint(model, n, self.rule, self.passes) for n in exit_layers]
        self._edges = [0, *exit_layers, self.final_layer]
        self.segments = [memory.segment(low, high) for low, high in pairwise(self._edges)]
        self.filled: list[list[int]] = [[] for _ in self.segments]
        self.layers_run: list[int] = []
        self._entered: list[list[int]] = [[] for _ in self.exits]  # tokens that each exit's block has seen
        self.prices, self.spent = prices or prices_of(model), 0.0
        self._alone = OneSequence.made(model, self.passes, exit_layers, kv_policy, self.rule)
        self._written = [0] * rows  # positions of each row that may hold what no sequence there reads
        self.history = None
        if kv_policy == "recompute":
            self.history = torch.zeros(rows, max_length, dtype=torch.long, device=model.device)

    def close(self) -> None:
        """Gives back what the model lent, if anything, before the decoder is gone; it decodes no further."""
        del self.passes, self.segments, self._alone
        self._give_back()

    @property
    def size(self) -> int:
        """Sequences in the caches: rows 0 to size - 1."""
        return len(self.filled[0])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence that have been fed."""
        return self.filled[0]

    def pending(self, exit_index: int, row: int) -> int:
        """How many tokens of a sequence wait at the exit of that index (in order of depth)."""
        return self.filled[exit_index][row] - self.filled[exit_index + 1][row]

    @property
    def owed(self) -> int:
        """Tokens times layers that wait at exits."""
        edges = pairwise(self._edges)
        return sum(
            (high - low) * (sum(self.filled[0]) - sum(counts))
            for (low, high), counts in zip(edges, self.filled, strict=True)
        )

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Removes sequences; the last ones move into the gaps.

        Returns:
            Which of the old rows each new row holds.
        """
        order, gone = list(range(self.size)), set(rows)
        for row in order:
            self._note_written(row)
        while gone:
            row = min(gone)
            while order and order[-1] in gone:
                gone.discard(order.pop())
            if row in gone:
                gone.discard(row)
                self._move(order[-1], row)
                order[row] = order.pop()
        self.filled = [[counts[row] for row in order] for counts in self.filled]
        self._entered = [[counts[row] for row in order] for counts in self._entered]
        self.layers_run = [self.layers_run[row] for row in order]
        return order

    def _move(self, source: int, target: int) -> None:
        self._clear(target)
        for k, segment in enumerate(self.segments):
            segment.move(source, target, self.filled[k][source])
        for k, point in enumerate(self.exits):
            point.move(source, target, self._entered[k][source])
        if self.history is not None:
            self.history[target] = self.history[source]
        self._written[target] = self.filled[0][source]

    def _note_written(self, row: int) -> None:
        self._written[row] = max(self._written[row], self.filled[0][row])

    def _clear(self, row: int) -> None:
        """Makes zeros of what a sequence has left in a row: attention to its keys has weight 0 for the next one, but
        0 times what is no number is none either."""
        if length := self._written[row]:
            for segment in self.segments:
                segment.clear_row(row, length)
            for point in self.exits:
                point.clear_row(row, length)
            self._written[row] = 0

    def roll_back(self, row: int, length: int) -> None:
        """Forgets a sequence's tokens from position `length` on."""
        self._note_written(row)
        for counts in (*self.filled, *self._entered):
            counts[row] = min(counts[row], length)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        all_positions: bool = False,
        slots: Sequence[TokenSlot] | None = None,
    ) -> Step:
        """Adds sequences behind those that are there, and feeds their prompts through all layers, eagerly.

        Args:
            prompts: see `feed_prompts`.
            all_positions: predict after every token of the prompts, not only after each one's last: the step's
                predictions are then those of all tokens, sequence after sequence.
            slots: see `first_step`.
        """
        x, packed = self.feed_prompts(prompts)
        return self.first_step(x if all_positions else x[packed.last], slots)

    def first_step(self, x: Tensor, slots: Sequence[TokenSlot] | None = None, greedy: bool = False) -> Step:
        """What the final exit predicts behind prompts.

        Args:
            x: [N, H] states behind the last layer.
            slots: of the N predictions, see `processed`.
            greedy: nobody asks for more than the most probable tokens, see `DecodingModel.greedy_output`.
        """
        output = self.model.greedy_output if greedy else self.output
        assert output is not None
        return Step.of_final(processed(output.predict(x), slots, final=True), self.final_layer)

    def feed_prompts(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, PackedTokens]:
        """`prefill` without predictions.

        Args:
            prompts: non-empty token ids; at most as many as there are free rows.

        Returns:
            The states [T, H] of all tokens behind the last layer, sequence after sequence, and their pack.
        """
        first, counts = self.size, [len(prompt) for prompt in prompts]
        assert first + len(prompts) <= self.rows, "no free rows"
        rows = list(range(first, first + len(prompts)))
        for row in rows:
            self._clear(row)
        packed = PackedTokens(self.table, rows, [0] * len(rows), counts)
        tokens = to_device([t for prompt in prompts for t in prompt], self.model.device)
        self._remember(tokens, packed)
        x = self.model.embed(tokens, packed.positions)
        for k, segment in enumerate(self.segments):
            x = segment(x, packed)
            if k < len(self.exits):
                self.exits[k].fill_block(x, packed)
                self._entered[k] += counts
            self.filled[k] += counts
        self.layers_run += [count * self.final_layer for count in counts]
        return x, packed

    def step(
        self,
        tokens: Tensor | Sequence[int],
        thresholds: Sequence[Sequence[float]],
        rows: Sequence[int] | None = None,
        max_pending: Sequence[int | None] | None = None,
        hold: Sequence[int | None] | None = None,
        greedy: Sequence[bool] | None = None,
        slots: Sequence[TokenSlot] | None = None,
    ) -> Step:
        """Feeds one token to each of N sequences and predicts the next. Waits for the device once per exit asked; what
        the final exit says is read when it is asked for.

        Args:
            tokens: [N], on the device or the host.
            thresholds: [N][exits] see `leaves`.
            rows: which sequences, ascending; None means all.
            max_pending: [N] no token leaves at an exit where more than this many of its sequence would then be
                pending; None sets no limit.
            hold: [N] index of the exit at which the token waits, unanswered, for `flush` if it has not left by
                then; None holds no token, or not this one.
            greedy: [N] whether nobody asks for more than the most probable token after it, see
                `DecodingModel.greedy_output`; None: of none.
            slots: [N] of the tokens to predict, see `processed`.
        """
        where = list(range(self.size)) if rows is None else list(rows)
        limits = [None] * len(where) if max_pending is None else max_pending
        plain = slots is None or not any(slot.changes_logits for slot in slots)
        if len(where) == 1 and plain and self._alone is not None and self._alone.fits(self, where[0]):
            held, alone = None if hold is None else hold[0], greedy is not None and greedy[0]
            return self._alone.step(self, where[0], int(tokens[0]), thresholds[0], limits[0], held, alone)
        packed, x = self._feed(tokens, where)
        answer = Step.unanswered(len(where))
        trail = Trail(len(where), self.model.hidden) if self.rule.looks_back else None
        here = list(range(len(where)))  # indices into `where` of the sequences that are still going on
        first = 0
        for k, point in enumerate(self.exits):
            stops = any(is_asked(thresholds[i][k]) or (hold and hold[i] == k) for i in here)
            if not stops and self._passes_by(k, [where[i] for i in here], packed):
                continue
            x = self._run_segments(first, k, x, packed)
            first = k + 1
            asked = [
                j
                for j, i in enumerate(here)
                if is_asked(thresholds[i][k])
                and ((limit := limits[i]) is None or self.pending(k, where[i]) <= limit)
            ]
            leaving: list[int] = []
            if asked:
                last = packed.last_of(asked if len(asked) < len(here) else None, x.device)
                indices = [here[j] for j in asked]
                before = x[last]
                behind = before if point.block is None else self._behind_block(k, [where[i] for i in indices])
                places = None if slots is None else [slots[i] for i in indices]
                prediction, sure, best = point.predict(before, behind, indices, trail, places)
                self.spent += self.prices.head(point.layer, len(asked))
                out = [n for n, i in enumerate(indices) if leaves(sure[n], thresholds[i][k])]
                leaving = [indices[n] for n in out]
                if leaving:
                    answer.add(point.layer, Part(leaving, prediction, out), sure, best)
                    if self.policy == "state_copy":
                        self._copy_states(k, [where[i] for i in leaving])
            gone = set(leaving)
            staying = [i for i in here if i not in gone and not (hold and hold[i] == k)]
            if not staying:
                return answer
            going = [where[i] for i in staying]
            if len(staying) < len(here) or self._starts(k, going) != packed.starts:
                packed = self._pending_pack(k, going)
                x = point.pending(packed)
            here = staying
        x = self._run_segments(first, len(self.exits), x, packed)
        prediction = self._final(x[packed.last], greedy is not None and all(greedy[i] for i in here))
        places = None if slots is None else [slots[i] for i in here]
        prediction = processed(prediction, places, final=True)
        answer.add(self.final_layer, Part(here, prediction, list(range(len(here)))))
        return answer

    def flush(self, rows: Sequence[int], greedy: bool = False) -> tuple[Prediction, list[int]]:
        """Runs all pending tokens of some sequences, ascending, through all layers.

        Args:
            rows: of the sequences.
            greedy: nobody asks for more than the most probable tokens.

        Returns:
            The final exit's predictions after each token that had not been through all layers, sequence after
            sequence, and how many these are of each, one at least.
        """
        first = 0
        while first < len(self.exits):
            some = [row for row in rows if self.pending(first, row)]
            last = first + 1
            if some:
                packed = self._pending_pack(first, some)
                while last < len(self.exits) and self._passes_by(last, list(rows), packed):
                    last += 1
                x = self._run_segments(first + 1, last, self.exits[first].pending(packed), packed)
            first = last
        assert packed.rows == list(rows), "every sequence must have pending tokens"
        return self._final(x, greedy), packed.counts

    def _final(self, x: Tensor, greedy: bool) -> Prediction:
        """The final exit's, from [N, H]; `greedy` as for `prefill`."""
        output = self.model.greedy_output if greedy else self.output
        assert output is not None
        self.spent += (self.prices.greedy if greedy else self.prices).output(len(x))
        return self.passes.predict("the final exit", output, x)

    def _feed(self, tokens: Tensor | Sequence[int], rows: list[int]) -> tuple[PackedTokens, Tensor]:
        """The pack that enters the first layer and its states [T, H]: one token of each sequence, or all that
        are to be recomputed."""
        if not isinstance(tokens, Tensor):
            tokens = to_device(tokens, self.model.device)
        history = self.history
        starts = [(self.lengths if history is None else self.filled[-1])[row] for row in rows]
        counts = [self.lengths[row] + 1 - start for row, start in zip(rows, starts, strict=True)]
        packed = PackedTokens(self.table, rows, starts, counts)
        if history is not None:
            where, lengths = to_device([rows, [self.lengths[row] for row in rows]], tokens.device)
            history[where, lengths] = tokens
            tokens = history[packed.rows[0] if packed.single else packed.token_rows, packed.positions]
        return packed, self.model.embed(tokens, packed.positions)

    def _pending_pack(self, k: int, rows: list[int]) -> PackedTokens:
        """The tokens that wait at exit k."""
        starts = self._starts(k, rows)
        counts = [self.filled[k][row] - start for row, start in zip(rows, starts, strict=True)]
        return PackedTokens(self.table, rows, starts, counts)

    def _starts(self, k: int, rows: list[int]) -> list[int]:
        """Where the tokens begin that go on from exit k: recomputed ones are all that have not been everywhere."""
        behind = self.filled[-1] if self.policy == "recompute" else self.filled[k + 1]
        return [behind[row] for row in rows]

    def _passes_by(self, k: int, rows: list[int], packed: PackedTokens) -> bool:
        """Whether a pack goes on behind exit k as it is."""
        return self._starts(k, rows) == packed.starts

    def _behind_block(self, k: int, rows: list[int]) -> Tensor:
        """[N, H] the last tokens of some sequences behind exit k's block, which first sees all before them that it has
        not seen: those for which the exit was not asked."""
        point, starts = self.exits[k], [self._entered[k][row] for row in rows]
        counts = [self.filled[k][row] - start for row, start in zip(rows, starts, strict=True)]
        packed = PackedTokens(self.table, rows, starts, counts)
        for row in rows:
            self._entered[k][row] = self.filled[k][row]
        once = self.prices.segment(0, 1, len(rows))  # part of the head's price
        self.spent += self.prices.segment(0, 1, packed.tokens) - once
        return point.enter_block(point.pending(packed), packed)[packed.last]

    def _run_segments(self, first: int, last: int, x: Tensor, packed: PackedTokens) -> Tensor:
        """Several segments in a row, without asking the exits between them."""
        low, high = self._edges[first], self._edges[last + 1]
        x = self.passes.run(low, high, x, packed)
        self.spent += self.prices.segment(low, high, len(x))
        for row, start, count in zip(packed.rows, packed.starts, packed.counts, strict=True):
            for k in range(first, last + 1):
                self.filled[k][row] = start + count
            self.layers_run[row] += count * (high - low)
        return x

    def _copy_states(self, k: int, rows: list[int]) -> None:
        """Fills deeper layers' keys and values of the tokens pending at exit k from their states there."""
        packed = self._pending_pack(k, rows)
        x = self.exits[k].pending(packed)
        for j in range(k + 1, len(self.segments)):
            self.passes.fill(self._edges[j], self._edges[j + 1], x, packed)
            if j < len(self.exits):
                packed.store(x, self.exits[j].hidden)
            for row in rows:
                self.filled[j][row] = self.filled[k][row]

    def _remember(self, tokens: Tensor, packed: PackedTokens) -> None:
        if self.history is not None:
            for row, part in zip(packed.rows, tokens.split(packed.counts), strict=True):
                self.history[row, : len(part)] = part
