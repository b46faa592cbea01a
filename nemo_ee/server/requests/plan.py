# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""From a checked request to the sequences that answer it."""

import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.decoding.request import GenerationRequest, parse_request
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.generation.detokenizer import Detokenizer
from nemo_ee.generation.text_stream import TextStream
from nemo_ee.server.answers.errors import ApiError
from nemo_ee.server.requests.protocol import AnyRequest, ChatRequest
from nemo_ee.server.served_model import ServedModel
from nemo_ee.server.settings import ServerConfig

CHARACTERS_PER_TOKEN = 128
"""A prompt that has more per token of `context_length` is refused before it is tokenized, which takes seconds
for a megabyte. Hardly any tokenizer has longer tokens."""


@dataclass(frozen=True)
class RequestPlan:
    """A request, ready to be queued.

    Attributes:
        prompts: token ids of each.
        echo: text of each prompt, to begin its choices with; "" where it is not asked for.
        offsets: of each prompt, where its tokens begin in that text, in characters; empty where prompts are not scored.
        choices: the sequences to generate, each with a `TextStream`; `n` of the first prompt, then of the next.
    """

    prompts: list[list[int]]
    echo: list[str]
    offsets: list[list[int]]
    choices: list[GeneratedSequence]


def make_plan(call: AnyRequest, model: ServedModel, config: ServerConfig) -> RequestPlan:
    """Tokenizes and checks what depends on the model.

    Raises:
        ApiError: 404 for another model's name; 400 for what cannot be generated, with the field and the limit.
    """
    model.require(call.model)
    count = call.n * (1 if isinstance(call, ChatRequest) else len(call.prompt))
    if count > config.max_choices:
        text = f"n={call.n}: {count} choices (prompts times n) exceed the server's {config.max_choices}; ask for fewer"
        raise ApiError(400, text, "n", "too_many_choices")
    prompts = list(_prompts(call, model))
    _check_ids(call.stop_token_ids, "stop_token_ids", model)
    limit = _limit(call, model)
    request = _generation_request(call, model, config, limit)
    decode = model.tokenizer.decode
    end_tokens, stop_strings = _ends(call, model)
    shared = request, end_tokens, tuple(sorted(end_tokens))
    seed = secrets.randbits(63) if call.seed is None else call.seed
    choices = [
        GeneratedSequence(
            prompt,
            *shared,
            min(limit, model.context_length + 1 - len(prompt)),  # the last token is not fed
            _seed(seed, i),
            TextStream(decode, prompt, stop_strings),
        )
        for i, prompt in enumerate(prompt for prompt in prompts for _ in range(call.n))
    ]
    echo, scored = _echo(call, decode), request.sampling.prompt_logprobs is not None
    offsets = [_offsets(decode, *each) for each in zip(prompts, echo, strict=True)] if scored else []
    return RequestPlan(prompts, echo, offsets, choices)


def _ends(call: AnyRequest, model: ServedModel) -> tuple[frozenset[int], list[str]]:
    """Tokens that end a choice, and strings to look for in its text."""
    tokens, strings = model.tokenizer.end_tokens(call.stop, ignore_eos=call.ignore_eos)
    return tokens | frozenset(call.stop_token_ids), strings


def _offsets(decode: Callable[[list[int]], str], prompt: list[int], text: str) -> list[int]:
    """Where each token of a prompt begins in its text."""
    detokenizer = Detokenizer(decode, [])
    pieces = [piece for token in prompt for piece in detokenizer.feed(token)] + detokenizer.close()
    ends = accumulate(map(len, pieces), initial=0)
    return [min(end, len(text)) for end, _ in zip(ends, prompt, strict=False)]


def _seed(seed: int, choice: int) -> int:
    """Of a choice's random numbers: no other choice has them, of this request or of one with the next seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{choice}".encode()).digest()[:8], "big")


def _echo(call: AnyRequest, decode: Callable[[list[int]], str]) -> list[str]:
    if isinstance(call, ChatRequest):
        return [""]
    return [(p if isinstance(p, str) else decode(p)) if call.echo else "" for p in call.prompt]


def _prompts(call: AnyRequest, model: ServedModel) -> Iterator[list[int]]:
    """Token ids of each; none is tokenized behind one that cannot be continued."""
    if isinstance(call, ChatRequest):
        turns = [message.model_dump() for message in call.messages]
        _check_characters(sum(len(turn["content"]) for turn in turns), "messages", model)
        tokens = model.tokenizer.encode_chat(turns)
        _check_prompt(tokens, "messages", model)
        yield tokens
        return
    for prompt in call.prompt:
        if isinstance(prompt, str):
            _check_characters(len(prompt), "prompt", model)
            prompt = model.tokenizer.encode(prompt)
        _check_prompt(prompt, "prompt", model)
        yield prompt


def _check_characters(count: int, field: str, model: ServedModel) -> None:
    if count > CHARACTERS_PER_TOKEN * model.context_length:
        text = f"{field}: {count} characters, and at most {model.context_length} tokens; shorten it"
        raise ApiError(400, text, field, "context_length_exceeded")


def _check_prompt(prompt: list[int], field: str, model: ServedModel) -> None:
    if not prompt:
        raise ApiError(400, f"{field}: it has no tokens; give at least one", field, "invalid_value")
    if len(prompt) > model.context_length:
        text = f"{field}: {len(prompt)} tokens exceed the server's {model.context_length}; shorten it"
        raise ApiError(400, text, field, "context_length_exceeded")
    _check_ids(prompt, field, model)


def _check_ids(tokens: Sequence[int], field: str, model: ServedModel) -> None:
    outside = next((token for token in tokens if not 0 <= token < model.vocabulary), None)
    if outside is not None:
        text = f"{field}: token id {outside} lies outside the vocabulary, 0 to {model.vocabulary - 1}"
        raise ApiError(400, text, field, "invalid_value")


def _limit(call: AnyRequest, model: ServedModel) -> int:
    """Tokens to generate, at most, if the context leaves room for them."""
    asked = call.max_tokens
    if isinstance(call, ChatRequest) and call.max_completion_tokens is not None:
        asked = call.max_completion_tokens
    if asked is None:
        asked = call.default_max_tokens or model.context_length
    if call.min_tokens > asked:
        text = f"min_tokens={call.min_tokens}: more than the {asked} that may come; lower it, or raise max_tokens"
        raise ApiError(400, text, "min_tokens", "invalid_value")
    return min(asked, model.context_length)


def _generation_request(
    call: AnyRequest, model: ServedModel, config: ServerConfig, limit: int
) -> GenerationRequest:
    greedy = call.temperature == 0
    sampling = {
        "use_greedy": greedy,
        "temperature": 1.0 if greedy else call.temperature,
        "top_k": call.top_k,
        "top_p": call.top_p,
        "repetition_penalty": call.repetition_penalty,
        **call.kept,
    }
    try:
        request = parse_request(
            {"max_length": limit, "min_length": call.min_tokens},
            sampling,
            exit_options(call.early_exit, config, model.usual),
            model.early_exit,
            call.seed is not None,
        )
    except ConfigError as error:
        raise ApiError.from_faults(error) from error
    for name in ("confidence", "kv_policy"):
        asked, served = getattr(request, name), getattr(model.usual, name)
        if asked != served:
            text = f"early_exit.{name}={asked}: this server decodes all requests with {served}; leave it out"
            raise ApiError(400, text, f"early_exit.{name}", "invalid_value")
    return request


def exit_options(
    asked: dict[str, Any] | bool | None, config: ServerConfig, server: GenerationRequest
) -> dict[str, Any]:
    """A request's early-exit options, completed with the server's.

    Args:
        asked: the request's.
        config: the server's.
        server: what a request gets that says nothing of exits.

    Raises:
        ConfigError: exits for which the server has no thresholds, where it has one for each.
    """
    usual, own = asdict(config.early_exit), asked if isinstance(asked, dict) else {}
    if asked is False:
        usual |= {"threshold": None, "lossless": False, "max_pending": None, "always": None}
        return {**usual, "exits": []}
    if own.get("exits") == []:  # full depth; what the server has for exits is not meant then
        usual |= {"threshold": None, "lossless": None, "max_pending": None, "always": None}
    if own.get("lossless"):
        usual |= {"max_pending": None, "always": None}  # which lossless decoding does not have
    layers = own.get("exits")
    if "threshold" not in own and isinstance(layers, list) and isinstance(usual["threshold"], tuple):
        if without := [n for n in layers if n not in server.exits]:
            rule = f"this server has thresholds for exits {list(server.exits)}, none for {without}"
            raise ConfigError(Fault("early_exit.threshold", None, rule, "give one, or one per exit"))
        usual["threshold"] = [server.exits[n] for n in layers] or None
    return {**usual, **own}
