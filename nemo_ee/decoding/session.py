# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A batch of sequences that decode together; they come and go between steps."""

from collections.abc import Sequence

from nemo_ee.decoding.assumed_prices import prices_of
from nemo_ee.decoding.choosing import Chooser, TokenDistributions, log_softmax
from nemo_ee.decoding.decoder import EarlyExitDecoder
from nemo_ee.decoding.decoding_model import DecodingModel
from nemo_ee.decoding.drafts.lossless import LosslessRounds
from nemo_ee.decoding.drafts.verification import Acceptance, agreeing_prefix
from nemo_ee.decoding.generated_sequence import Draft, GeneratedSequence
from nemo_ee.decoding.leaving import NEVER, is_asked
from nemo_ee.decoding.logits_processing import processed
from nemo_ee.decoding.policy.exit_policy import ExitPolicy
from nemo_ee.decoding.step import UNANSWERED, Step
from nemo_ee.decoding.transfer import to_host


class DecodingSession:
    """Continues sequences, each right behind its own end and with exits of its own.

    Prompts run through all layers and the first token of each comes from the final exit. Which exits a step asks
    depends on all that decode together, and on prices, see `ExitPolicy`. A sequence of a request that asks always
    has tokens that do not depend on its neighbours; sampled ones neither, as each draws from its own seed. A lossless
    one's greedy tokens neither; of sampled ones how many drafts a round has, and so which random number is for what,
    depends on all in it. All tensor-parallel ranks make the same calls and get the same tokens. Use it under
    `generating`, from one thread, and as a context manager, so that what the model lends it is given back in time.

    Args:
        model: the whole model, on one pipeline stage.
        exit_layers: exits that any sequence may use, ascending.
        slots: sequences at a time.
        max_length: positions per sequence: prompt and generated tokens but the last.
        kv_policy: see `EarlyExitDecoder`; lossless sequences need catch_up.
        confidence: see `EarlyExitDecoder`.
        policy: when exits are asked, and draft; None for one by the prices of the model's passes.

    Attributes:
        running: the sequences, in the order of the decoder's rows.
    """

    def __init__(
        self,
        model: DecodingModel,
        exit_layers: Sequence[int],
        slots: int,
        max_length: int,
        kv_policy: str = "catch_up",
        confidence: str = "max_probability",
        policy: ExitPolicy | None = None,
    ):
        self.slots, self.max_length = slots, max_length
        self.running: list[GeneratedSequence] = []
        self._model, self._layers = model, list(exit_layers)
        self._chooser = Chooser(model.gpt)
        alone = (
            model.gpt.config.tensor_model_parallel_size == 1
        )  # one rank's failure must not set ranks apart
        drafts = model.drafts.setdefault(confidence, {}) if alone else None
        self._policy = policy or ExitPolicy(prices_of(model), exit_layers, drafts)
        self._decoder = EarlyExitDecoder(
            model, exit_layers, slots, max_length, kv_policy, confidence, self._policy.prices
        )
        self._asks_all = kv_policy != "catch_up"  # the others are there to be compared, and priced otherwise
        self._rounds = LosslessRounds(self._policy)

    def __enter__(self) -> "DecodingSession":
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder.close()

    @property
    def free(self) -> int:
        """Sequences that can be added."""
        return self.slots - len(self.running)

    def add(self, sequences: Sequence[GeneratedSequence]) -> list[GeneratedSequence]:
        """Feeds prompts and chooses their first tokens.

        Args:
            sequences: at most `free`, each of a limit that fits `max_length`; one of limit 0 is scored, and finished.

        Returns:
            Those that are finished; they are not in the session.
        """
        assert len(sequences) <= self.free, "no free slot"
        assert all(s.positions <= self.max_length for s in sequences), "too long"
        self.running += sequences
        x, packed = self._decoder.feed_prompts([s.prompt for s in sequences])
        for sequence, states in zip(sequences, x.split(packed.counts), strict=True):
            if sequence.request.sampling.prompt_logprobs is not None:
                self._chooser.score_prompt(sequence, states, self._decoder.output)
            if sequence.limit == 0:
                sequence.finish_reason = "length"
        going = [i for i, s in enumerate(sequences) if s.finish_reason is None]
        if going:
            last = packed.last_of(going if len(going) < len(sequences) else None, x.device)
            some = [sequences[i] for i in going]
            greedy = all(s.request.sampling.tokens_alone for s in some)
            step = self._decoder.first_step(x[last], [s.slot() for s in some], greedy)
            self._take(step, some, [False] * len(some))
        return self._retire()

    def step(self) -> list[GeneratedSequence]:
        """Decodes: every sequence gets a token, but for lossless ones whose drafts are not verified yet.

        Returns:
            Those that are finished; they have left the session.
        """
        rounds, before, running = self._rounds, self._decoder.spent, list(self.running)
        tokens = sum(len(s.tokens) for s in running)
        self._policy.greedy = all(s.request.sampling.tokens_alone for s in running)
        rounds.begin([s for s in running if _drafts(s)])
        rows = [row for row, s in enumerate(running) if s not in rounds.waiting]
        if rows:
            self._feed(rows)
        if rounds.round is not None and rounds.members == rounds.waiting:
            self._verify([s for s in running if s in rounds.members])
        if any(self._asks_always(s) for s in running):  # what those cost is not the policy's choice
            self._policy.owed = self._decoder.owed
        elif running:
            made = sum(len(s.tokens) for s in running) - tokens
            self._policy.settle(made, self._decoder.spent - before, len(running), self._decoder.owed)
        return self._retire()

    def _feed(self, rows: list[int]) -> None:
        """One token of each of some sequences, through the layers or no deeper than the round's exit."""
        rounds, going = self._rounds, [self.running[row] for row in rows]
        held = [s in rounds.members for s in going]
        thresholds = self._thresholds(going)
        waits_at = None if rounds.round is None else rounds.round.exit_index
        step = self._decoder.step(
            [s.last_token for s in going],
            thresholds,
            rows,
            max_pending=[None if h else s.request.max_pending for s, h in zip(going, held, strict=True)],
            hold=[waits_at if h else None for h in held],
            greedy=[s.request.sampling.tokens_alone for s in going],
            slots=[s.slot() for s in going],
        )
        for sequence, row, layer in zip(going, thresholds, step.exit_layers, strict=True):
            if sequence in rounds.members:
                rounds.note_asked(sequence, layer != UNANSWERED)
            elif not _drafts(sequence):
                self._policy.observe(row, layer)
        self._take(step, going, held)

    def remove(self, sequence: GeneratedSequence) -> None:
        """Ends a sequence before its time."""
        sequence.finish_reason = sequence.finish_reason or "cancelled"
        self._retire()

    def _thresholds(self, going: Sequence[GeneratedSequence]) -> list[list[float]]:
        """[sequences][exits] for their next tokens: `NEVER` for exits that are not asked."""
        rows = [
            self._rounds.thresholds(s) if _drafts(s) else [s.request.threshold(n) for n in self._layers]
            for s in going
        ]
        free = [i for i, s in enumerate(going) if not _drafts(s) and not self._asks_always(s)]
        if any(is_asked(threshold) for i in free for threshold in rows[i]):
            asked = self._policy.ask([rows[i] for i in free], len(going) - len(free))
            for i in free:
                rows[i] = [*rows[i][:asked], *[NEVER] * (len(rows[i]) - asked)]
        return rows

    def _asks_always(self, sequence: GeneratedSequence) -> bool:
        """Whether a sequence's exits are asked every time, whether that pays or not."""
        request = sequence.request
        return bool(request.asked) and not request.lossless and (request.always or self._asks_all)

    def _take(self, step: Step, sequences: list[GeneratedSequence], held: list[bool]) -> None:
        """Gives a step's answers to its sequences: as final tokens, or as drafts where they are held."""
        known = set(step.answered)
        self._rounds.waiting.update(s for i, s in enumerate(sequences) if i not in known)
        answered = [sequences[i] for i in step.answered]
        if not answered:
            return
        tokens, found = self._chooser.of_step(step, answered, [held[i] for i in step.answered])
        for n, (i, sequence, token) in enumerate(zip(step.answered, answered, tokens, strict=True)):
            layer, confidence = step.exit_layers[i], step.confidences[i]
            if not held[i]:
                self._commit(sequence, token, layer, confidence, found, n)
                continue
            drawn_from = None
            if not sequence.request.sampling.use_greedy:
                assert found.distributions is not None, "this sequence samples"
                drawn_from = found.distributions[n]
            sequence.drafts.append(Draft(token, layer, confidence, drawn_from))
            if sequence.ends_with_drafts():
                self._rounds.waiting.add(sequence)

    def _verify(self, sequences: list[GeneratedSequence]) -> None:
        """Ends a round: the full model accepts drafts, and says what comes behind them. Waits for the device once."""
        rows = [self.running.index(s) for s in sequences]
        greedy = all(s.request.sampling.tokens_alone for s in sequences)
        prediction, counts = self._decoder.flush(rows, greedy)
        places = [(s, j) for s, n in zip(sequences, counts, strict=True) for j in range(n)]
        prediction = processed(prediction, [s.slot(j) for s, j in places], final=True)
        found = self._chooser.of_prediction(prediction, [s for s, _ in places])
        spans = found.distributions
        judges: dict[GeneratedSequence, Acceptance] = {}
        ahead = self._model.device.type != "cpu"
        first = 0
        for sequence, count in zip(sequences, counts, strict=True):
            if not sequence.request.sampling.use_greedy:
                assert spans is not None, "this sequence samples"
                span, random = spans[first : first + count], sequence.random("verify")
                judges[sequence] = Acceptance(sequence.drafts, span, random, ahead)
            first += count
        readings = [tensor for judge in judges.values() for tensor in judge.readings()]
        confidences, chosen_tokens, *values = to_host(prediction.confidence, prediction.tokens, *readings)
        first = 0
        for sequence, row, count in zip(sequences, rows, counts, strict=True):
            drafts, best = sequence.drafts, chosen_tokens[first : first + count]
            sequence.drafts = []
            following: int | None
            if sequence in judges:
                chances, behind, *values = values
                good, following = judges[sequence].outcome(chances, behind)
            else:
                good = agreeing_prefix(drafts, best)
                following = best[good] if good < count else None
            self._decoder.roll_back(row, self._decoder.lengths[row] - count + good + 1)
            for n, draft in enumerate(drafts[:good]):
                if not self._commit(
                    sequence, draft.token, draft.exit_layer, draft.confidence, found, first + n
                ):
                    break
            if sequence.finish_reason is None and following is not None:
                n = first + good
                self._commit(sequence, following, self._model.final_layer, confidences[n], found, n)
            self._rounds.note_verified(sequence, good, len(drafts))
            sequence.statistics.drafts += len(drafts)
            sequence.statistics.accepted += good
            first += count
        self._rounds.end()

    def _commit(
        self,
        sequence: GeneratedSequence,
        token: int,
        layer: int,
        confidence: float,
        found: TokenDistributions,
        n: int,
    ) -> bool:
        """Adds a final token, chosen from the n-th prediction; returns whether the sequence goes on."""
        sequence.logprobs += found.logprobs(n, sequence, token)
        if sequence.request.sampling.all_probs:
            assert found.logits is not None, "this sequence wants them"
            sequence.full_logprobs.append(log_softmax(found.logits[n]))
        return sequence.commit(token, layer, confidence)

    def _retire(self) -> list[GeneratedSequence]:
        """Drops finished sequences and their rows; returns them."""
        for sequence, layers in zip(self.running, self._decoder.layers_run, strict=True):
            sequence.statistics.layers_run = layers
        rows = [row for row, s in enumerate(self.running) if s.finish_reason is not None]
        if not rows:
            return []
        finished = [self.running[row] for row in rows]
        self._rounds.waiting.difference_update(finished)
        self.running = [self.running[row] for row in self._decoder.drop(rows)]
        return finished


def _drafts(sequence: GeneratedSequence) -> bool:
    """Whether exits only draft for this sequence."""
    return sequence.request.lossless and bool(sequence.request.asked)
