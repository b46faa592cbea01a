# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The harness over a sweep of thresholds: each example is answered in all ways before the next one is."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from tqdm import tqdm

from nemo_ee.data.text_file import parsed, read_text_lines
from nemo_ee.decoding.request import parse_request
from nemo_ee.errors import ConfigError, DataError, Fault
from nemo_ee.evaluation.harness.gen_kwargs import Generation, read_gen_kwargs
from nemo_ee.evaluation.harness.language_model import EarlyExitLM, TokenizedRequest, progress
from nemo_ee.evaluation.harness.scoring import Scored
from nemo_ee.evaluation.scored_model import Score, score_with
from nemo_ee.evaluation.teacher_forced import CONFIDENCE_RULE
from nemo_ee.files.output import write_text
from nemo_ee.generation.generate import continue_sequences
from nemo_ee.generation.generating import generating, position_limit
from nemo_ee.generation.stopping import StopRule

FULL_DEPTH = "full depth"
"""Name of the way without exits."""
SAVE_EVERY = 5.0
"""Seconds, at least, between two times that what was found is written."""


def way_name(threshold: float) -> str:
    """For people, and in files."""
    return str(float(threshold)).removesuffix(".0")


def require_greedy(wanted: Generation) -> None:
    """Raises ConfigError unless texts are greedy."""
    if not wanted.sampling["use_greedy"]:
        rule = "a sweep compares greedy texts"
        raise ConfigError(Fault("gen_kwargs.do_sample", True, rule, "set do_sample=false"))


class Answers:
    """What a sweep has found, in a file that it goes on from: a line that says of what, and one per request.

    Args:
        path: JSONL.
        settings: of all that answers depend on.

    Attributes:
        found: digest of a request -> what was found.

    Raises:
        ConfigError: the file was begun with other settings.
        DataError: it is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self._path, self._settings = path, json.loads(json.dumps(settings))
        self.found: dict[str, dict[str, Any]] = {}
        self._saved = time.monotonic()
        if path.exists():
            lines = [parsed(line, f"{path}:{number}") for number, line in read_text_lines(path)]
            answers = lines[1:]
            if (
                not lines
                or not all(isinstance(line, dict) for line in lines)
                or not all(map(_is_answer, answers))
            ):
                raise DataError(f"{path}: is damaged; delete it to begin anew")
            if lines[0] != self._settings:
                names = sorted(
                    k for k in {*lines[0], *self._settings} if lines[0].get(k) != self._settings.get(k)
                )
                rule = f"{path} was begun with { ({name: lines[0].get(name) for name in names}) }"
                remedy = "give that again to go on, another output_dir, or delete the file"
                raise ConfigError(*(Fault(name, self._settings.get(name), rule, remedy) for name in names))
            self.found = {line.pop("request"): line for line in answers}

    def add(self, request: str, found: Mapping[str, Any]) -> None:
        """Keeps what was found, and writes it if nothing was written for a while."""
        self.found[request] = dict(found)
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Writes all, in one step.

        Raises:
            OutputError: it cannot be written.
        """
        lines = [self._settings, *({"request": key, **found} for key, found in self.found.items())]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        self._saved = time.monotonic()


def _is_answer(line: dict[str, Any]) -> bool:
    parts = [line[name] for name in ("scores", "texts") if name in line]
    return "request" in line and bool(parts) and all(isinstance(part, dict) for part in parts)


class SweepLM(EarlyExitLM):
    """Answers in one way at a time what was answered in all ways, side by side, when it was asked first.

    Args:
        model: a `MegatronGPTEarlyExitModel`.
        answers: kept from run to run.
        **options: of `EarlyExitLM`; texts are generated one at a time.

    Attributes:
        ways: name -> exit layer -> threshold, full depth first.
        current: name of the way that answers.
    """

    def __init__(self, model: Any, answers: Answers, **options: Any):
        super().__init__(model, False, batch_size=1, **options)
        model.start_distributed()
        self.ways: dict[str, dict[int, float]] = {FULL_DEPTH: {}}
        self.current, self._answers, self._warm = FULL_DEPTH, answers, False
        self._asked: list[str] = []

    def begin(self, thresholds: Sequence[float], layers: Sequence[int]) -> None:
        """Sets the ways of the tasks that follow.

        Args:
            thresholds: each for all exits in use.
            layers: of those.
        """
        self.ways = {FULL_DEPTH: {}, **{way_name(each): dict.fromkeys(layers, each) for each in thresholds}}
        self._asked = []

    @cached_property
    def _score(self) -> Score:
        return score_with(self.model)

    def _missing(self, keys: Sequence[str], part: str) -> list[int]:
        """Indices of requests that were not answered in all ways."""
        found = (self._answers.found.get(key, {}).get(part, {}) for key in keys)
        return [i for i, there in enumerate(found) if not self.ways.keys() <= there.keys()]

    def _loglikelihood_tokens(
        self, requests: list[TokenizedRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[Scored]:
        keys = [_digest("score", context, said) for _, context, said in requests]
        missing = self._missing(keys, "scores")
        for place, scores in self.scores(
            [requests[i] for i in missing], list(self.ways.values()), not missing
        ):
            self._answers.add(keys[missing[place]], {"scores": dict(zip(self.ways, scores, strict=True))})
        self._answers.save()
        found = [self._answers.found[key]["scores"][self.current] for key in keys]
        return [(float(logprob), bool(greedy)) for logprob, greedy in found]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Each request in the current way; those that are new in all ways first."""
        wanted = [read_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        for each in wanted:
            require_greedy(each)
        pairs = [
            (self.prompt(request.args[0], each), each) for request, each in zip(requests, wanted, strict=True)
        ]
        keys = [
            _digest("generate", prompt, each.until, each.lengths, each.sampling) for prompt, each in pairs
        ]
        missing = self._missing(keys, "texts")
        with progress("generation", len(missing) * len(self.ways)) as bar:
            for place, i in enumerate(missing):
                self._answers.add(keys[i], self._answer(*pairs[i], place, bar))
        self._answers.save()
        self._asked = keys
        texts = [self._answers.found[key]["texts"][self.current]["tokens"] for key in keys]
        return [self.cut(tokens, each) for tokens, (_, each) in zip(texts, pairs, strict=True)]

    def _answer(self, prompt: list[int], wanted: Generation, place: int, bar: tqdm) -> dict[str, Any]:
        """A prompt in all ways, which take turns at being the first."""
        names = list(self.ways)
        if not self._warm:
            for name in names[:1] + names[-1:]:
                self._timed(prompt, wanted, name)
            self._warm = True
        texts = {}
        for name in names[place % len(names) :] + names[: place % len(names)]:
            texts[name] = self._timed(prompt, wanted, name)
            bar.update()
        agreement = self._agreement(prompt, texts[FULL_DEPTH]["tokens"])
        return {"prompt": len(prompt), "texts": {name: texts[name] for name in names}, "agreeing": agreement}

    def _timed(self, prompt: list[int], wanted: Generation, name: str) -> dict[str, Any]:
        """A greedy text, and how fast its tokens came.

        Returns:
            Its tokens; the layers that they left at and how many did; seconds of the whole call, prompt included; and
            `steps`: the tokens that came behind the first step, and their seconds.
        """
        exits: Mapping[str, Any] | bool = False
        if thresholds := self.ways[name]:
            exits = {"exits": [*thresholds], "threshold": [*thresholds.values()], "always": True}
            exits["confidence"] = CONFIDENCE_RULE
        sampling = {**wanted.sampling, "end_strings": list(wanted.until)}
        request = parse_request(wanted.lengths, sampling, exits, self.model.early_exit)
        limit = min(request.max_length, position_limit(self.model.cfg) + 1 - len(prompt))
        sequence = StopRule(self.model.text_tokenizer, wanted.until).begin(prompt, request, limit)
        with generating(self.model):
            decoding = self.model.decoding_model()
            begun = first = _now()
            before = 0
            for _ in continue_sequences(self.model, decoding, [sequence], 1):
                if not before:
                    first, before = _now(), len(sequence.tokens)
            ended = _now()
        layers = Counter(map(str, sequence.exit_layers))
        steps = [len(sequence.tokens) - before, ended - first]
        return {"tokens": sequence.tokens, "layers": layers, "seconds": ended - begun, "steps": steps}

    @torch.no_grad()
    def _agreement(self, prompt: list[int], text: list[int]) -> dict[str, list[int]]:
        """Of each way: how many of full depth's tokens it would say, given those before, and of how many. The first one
        does not count, which never leaves early."""
        counted = len(text) - 1
        if counted < 1:
            return {name: [0, 0] for name in self.ways}
        ids = torch.tensor([[*prompt, *text]])
        scores = self._score(ids[:, :-1], ids[:, 1:])
        labels, found = ids[0, 1:].to(scores.final.tokens.device), {}
        for name, thresholds in self.ways.items():
            tokens, layers = scores.leaving(thresholds)
            # The final exit's token is the label but for rounding between decoding and this pass.
            same = (tokens[0] == labels) | (layers[0] == 0)
            found[name] = [int(same[-counted:].sum()), counted]
        return found

    def answered(self) -> list[dict[str, Any]]:
        """What was found of the requests that were generated last, in their order."""
        return [self._answers.found[key] for key in self._asked]


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
