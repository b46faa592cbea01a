# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Decoding with early exits and an exact KV cache: a token that goes on takes those that left early along.

The layers are cut into segments at the exits in use. `filled[k][b]` counts the tokens of sequence b that went
through segment k; it falls with k. The tokens between `filled[k + 1][b]` and `filled[k][b]` are *pending* at
exit k: they left there or before, and their hidden states are kept. A token that goes past exit k takes them
along in one batched pass, which fills their keys and values. So every layer sees every token at most once,
and a token that reaches a layer finds there the keys of all tokens before it: outputs equal those of an
uncached forward.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_ee.core.confidence import is_sure
from nemo_ee.megatron.decode import CachedLayer, PackedTokens, PositionTable
from nemo_ee.megatron.gpt import EarlyExitGPTModel
from nemo_ee.megatron.heads import ExitHead
from nemo_ee.megatron.prediction import Prediction, Rows


@dataclass(frozen=True)
class Step:
    """What one step predicts for its N sequences; the same on all tensor-parallel ranks.

    Attributes:
        exit_layers: [N] the exit that each prediction comes from; `num_layers` for the final one.
        confidences: [N] probability of the exit's most probable emittable token.
        parts: predictions of the exits that answered, each with the indices (within N) that it answers for.
    """

    exit_layers: list[int]
    confidences: list[float]
    parts: list[tuple[list[int], Prediction]]

    def greedy_tokens(self) -> Tensor:
        """[N], the most probable token of each prediction."""
        return self._join([prediction.tokens for _, prediction in self.parts])

    def vocabulary_shard(self, shard_size: int) -> Tensor:
        """Logits [N, Vp/TP] of this rank's share of the vocabulary, see `Prediction.vocabulary_shard`."""
        return self._join([prediction.vocabulary_shard(shard_size) for _, prediction in self.parts])

    def _join(self, pieces: list[Tensor]) -> Tensor:
        if len(pieces) == 1 and len(self.parts[0][0]) == len(self.exit_layers):
            return pieces[0]
        rows = torch.tensor([i for indices, _ in self.parts for i in indices], device=pieces[0].device)
        joined = torch.cat([piece.to(pieces[0].dtype) for piece in pieces])
        return joined[rows.argsort()]


class ExitPoint:
    """One exit in use: its head, threshold, and the hidden states that wait there.

    Args:
        head: the exit's modules.
        threshold: leave if the confidence is strictly above it.
        batch_size: sequences.
        max_length: positions.
        hidden: [..., H], an example of a hidden state.
        output_weight: of the backbone, for a tied projection.
    """

    def __init__(
        self,
        head: ExitHead,
        threshold: float,
        batch_size: int,
        max_length: int,
        hidden: Tensor,
        output_weight: Tensor,
    ):
        self.head, self.layer, self.threshold = head, head.layer, threshold
        self.dtype = compute_dtype(next(head.parameters(), output_weight))
        self.output_weight, self.rows = output_weight, Rows.of_exit(head.projection)
        self.hidden = hidden.new_zeros(batch_size, max_length, hidden.shape[-1])
        self.block = None
        if head.block is not None:
            self.block = CachedLayer(head.block, batch_size, max_length, self.dtype, hidden.device)

    def keep(self, index: Tensor) -> None:
        """Keeps only some sequences, in that order."""
        self.hidden = self.hidden[index]
        if self.block is not None:
            self.block.keep(index)

    def store(self, x: Tensor, packed: PackedTokens) -> None:
        """Remembers the tokens' hidden states [T, 1, H]."""
        if packed.single:
            self.hidden[packed.sequences[0], packed.starts[0] : packed.length] = x[:, 0]
        else:
            self.hidden[packed.token_sequences, packed.positions] = x[:, 0]

    def pending(self, packed: PackedTokens) -> Tensor:
        """The hidden states [T, 1, H] of the tokens of a pack."""
        if packed.single:
            return self.hidden[packed.sequences[0], packed.starts[0] : packed.length, None]
        return self.hidden[packed.token_sequences, packed.positions, None]

    def enter_block(self, x: Tensor, packed: PackedTokens) -> Tensor:
        """The head's block, if it has one, on all tokens of a pack (its keys must be complete)."""
        return x if self.block is None else self.block(x.to(self.dtype), packed)

    def predict(self, x: Tensor) -> Prediction:
        """The head from its MLP on: [N, 1, H], the last token of each sequence."""
        head, x = self.head, x.to(self.dtype)
        logits = head.projection.local_logits(head.readout(x)[:, 0], self.output_weight)
        return Prediction.from_logits(logits, self.rows)


class EarlyExitDecoder:
    """State of a batch of sequences that are continued token by token; see the module's text.

    Must run under `torch.no_grad` or `torch.inference_mode`, in eval mode, with sequence parallelism off. All
    tensor-parallel ranks make the same calls and take the same exits.

    Args:
        gpt: the whole model, on one pipeline stage.
        exits: exit layers in use and their thresholds. An exit at 1.0 is never evaluated.
        batch_size: sequences, B.
        max_length: positions to reserve.
        max_pending: a token that would leave more than this many tokens of its sequence pending at an exit
            goes through all layers instead; None sets no limit.
    """

    def __init__(
        self,
        gpt: EarlyExitGPTModel,
        exits: dict[int, float],
        batch_size: int,
        max_length: int,
        max_pending: int | None = None,
    ):
        self.gpt, self.max_pending, self.batch_size = gpt, max_pending, batch_size
        self.final_layer = gpt.config.num_layers
        self.weight = gpt.output_weight()
        self.rows = Rows.of_output_layer(gpt)
        device, dtype = self.weight.device, compute_dtype(self.weight)
        self.table = PositionTable(gpt, max_length, dtype, device)
        in_use = {n: t for n, t in sorted(exits.items()) if t < 1.0}
        hidden = self._embed(torch.zeros(1, dtype=torch.long, device=device), self.table.positions[:1])
        self.exits = [
            ExitPoint(gpt.exits[str(n)], t, batch_size, max_length, hidden, self.weight)  # type: ignore[arg-type]
            for n, t in in_use.items()
        ]
        edges = [0, *in_use, self.final_layer]
        layers = [CachedLayer(x, batch_size, max_length, dtype, device) for x in gpt.decoder.layers]
        self.segments = [layers[low:high] for low, high in zip(edges[:-1], edges[1:], strict=True)]
        self.filled = [[0] * batch_size for _ in self.segments]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence that have been fed."""
        return self.filled[0]

    def pending(self, exit_index: int, sequence: int) -> int:
        """How many tokens of a sequence wait at the exit of that index (in order of depth)."""
        return self.filled[exit_index][sequence] - self.filled[exit_index + 1][sequence]

    def keep(self, sequences: list[int]) -> None:
        """Drops all sequences but these, which become sequences 0, 1, …. Copies the caches."""
        index = torch.tensor(sequences, device=self.weight.device)
        for layer in (layer for segment in self.segments for layer in segment):
            layer.keep(index)
        for point in self.exits:
            point.keep(index)
        self.filled = [[counts[b] for b in sequences] for counts in self.filled]
        self.batch_size = len(sequences)

    def prefill(self, prompts: list[list[int]], all_positions: bool = False) -> Step:
        """Feeds every sequence's prompt through all layers; predictions come from the final exit.

        Args:
            prompts: B non-empty lists of token ids.
            all_positions: predict after every token of the prompts, not only after each one's last: N is then
                the number of all tokens, sequence after sequence.
        """
        assert self.lengths == [0] * self.batch_size, "prefill comes first"
        device = self.weight.device
        sequences, counts = list(range(self.batch_size)), [len(prompt) for prompt in prompts]
        packed = PackedTokens(self.table, self.batch_size, sequences, [0] * self.batch_size, counts)
        tokens = torch.tensor([t for prompt in prompts for t in prompt], device=device)
        x = self._embed(tokens, packed.positions)
        for k, segment in enumerate(self.segments):
            for layer in segment:
                x = layer(x, packed)
            if k < len(self.exits):
                self.exits[k].enter_block(x, packed)
            self.filled[k] = list(counts)
        prediction = self._predict_final(x if all_positions else x[packed.last])
        rows = len(prediction.tokens)
        return Step(
            [self.final_layer] * rows, prediction.confidence.tolist(), [(list(range(rows)), prediction)]
        )

    def step(
        self, tokens: Tensor, sequences: list[int] | None = None, may_exit: list[bool] | None = None
    ) -> Step:
        """Feeds one token to each of N sequences and predicts the next.

        Args:
            tokens: [N].
            sequences: which sequences, ascending; None means all.
            may_exit: [N] False sends a token through all layers; None lets all exit.
        """
        where = list(range(self.batch_size)) if sequences is None else sequences
        may = [True] * len(where) if may_exit is None else may_exit
        starts = [self.lengths[b] for b in where]
        packed = PackedTokens(self.table, self.batch_size, where, starts, [1] * len(where))
        x = self._embed(tokens, packed.positions)
        exit_layers, confidences = [self.final_layer] * len(where), [0.0] * len(where)
        parts: list[tuple[list[int], Prediction]] = []
        here = list(range(len(where)))  # indices into `where` of the sequences that are still going on
        for k, segment in enumerate(self.segments):
            for layer in segment:
                x = layer(x, packed)
            for b, start, count in zip(packed.sequences, packed.starts, packed.counts, strict=True):
                self.filled[k][b] = start + count
            if k == len(self.exits):
                break
            point = self.exits[k]
            point.store(x, packed)
            inside = point.enter_block(x, packed)
            asked = [may[i] and self._room(k, where[i]) for i in here]
            leaving: list[int] = []
            if any(asked):
                prediction = point.predict(inside[packed.last])
                sure = prediction.confidence.tolist()
                leaving = [j for j, out in enumerate(is_sure(sure, point.threshold)) if out and asked[j]]
                if leaving:
                    parts.append(([here[j] for j in leaving], prediction.select(leaving)))
                for j in leaving:
                    exit_layers[here[j]], confidences[here[j]] = point.layer, sure[j]
            here = [i for j, i in enumerate(here) if j not in leaving]
            if not here:
                return Step(exit_layers, confidences, parts)
            going = [where[i] for i in here]
            begin = [self.filled[k + 1][b] for b in going]
            packed = PackedTokens(
                self.table,
                self.batch_size,
                going,
                begin,
                [self.filled[k][b] - s for b, s in zip(going, begin, strict=True)],
            )
            x = point.pending(packed)
        prediction = self._predict_final(x[packed.last])
        for i, value in zip(here, prediction.confidence.tolist(), strict=True):
            confidences[i] = value
        parts.append((here, prediction))
        return Step(exit_layers, confidences, parts)

    def _room(self, k: int, sequence: int) -> bool:
        return self.max_pending is None or self.pending(k, sequence) <= self.max_pending

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.gpt.embedding(input_ids=tokens[None], position_ids=positions[None])

    def _predict_final(self, x: Tensor) -> Prediction:
        if self.gpt.decoder.final_layernorm is not None:
            x = self.gpt.decoder.final_layernorm(x)
        logits = torch.nn.functional.linear(x[:, 0].to(self.weight.dtype), self.weight)
        logits[:, self.rows.emittable :] = float("-inf")
        return Prediction.from_logits(logits, self.rows)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What a matrix product with this weight returns: autocast's dtype where autocast is on, else its own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
