# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""From a checked request to the sequences that answer it."""

import hashlib
import secrets
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.decoding.request import GenerationRequest, parse_request
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.generation.text_stream import TextStream
from nemo_ee.server.answers.errors import ApiError
from nemo_ee.server.requests.protocol import AnyRequest, ChatRequest
from nemo_ee.server.served_model import ServedModel
from nemo_ee.server.settings import ServerConfig

CHARACTERS_PER_TOKEN = 128
"""A prompt that has more per token of `max_prompt_tokens` is refused before it is tokenized, which takes seconds
for a megabyte. Hardly any tokenizer has longer tokens."""


@dataclass(frozen=True)
class RequestPlan:
    """A request, ready to be queued.

    Attributes:
        prompts: token ids of each.
        echo: text of each prompt, to begin its choices with; "" where it is not asked for.
        choices: the sequences to generate, each with a `TextStream`; `n` of the first prompt, then of the next.
    """

    prompts: list[list[int]]
    echo: list[str]
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
    prompts = list(_prompts(call, model, config))
    limit = _limit(call, config)
    request = _generation_request(call, model, config, limit)
    tokenizer, decode = model.tokenizer, model.tokenizer.decode
    end_tokens, stop_strings = tokenizer.end_tokens(call.stop)
    shared = request, end_tokens, tokenizer.eos, limit
    seed = secrets.randbits(63) if call.seed is None else call.seed
    choices = [
        GeneratedSequence(prompt, *shared, _seed(seed, i), TextStream(decode, prompt, stop_strings))
        for i, prompt in enumerate(prompt for prompt in prompts for _ in range(call.n))
    ]
    return RequestPlan(prompts, _echo(call, decode), choices)


def _seed(seed: int, choice: int) -> int:
    """Of a choice's random numbers: no other choice has them, of this request or of one with the next seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{choice}".encode()).digest()[:8], "big")


def _echo(call: AnyRequest, decode: Callable[[list[int]], str]) -> list[str]:
    if isinstance(call, ChatRequest):
        return [""]
    return [(p if isinstance(p, str) else decode(p)) if call.echo else "" for p in call.prompt]


def _prompts(call: AnyRequest, model: ServedModel, config: ServerConfig) -> Iterator[list[int]]:
    """Token ids of each; none is tokenized behind one that cannot be continued."""
    if isinstance(call, ChatRequest):
        turns = [message.model_dump() for message in call.messages]
        _check_characters(sum(len(turn["content"]) for turn in turns), "messages", config)
        tokens = model.tokenizer.encode_chat(turns)
        _check_prompt(tokens, "messages", model, config)
        yield tokens
        return
    for prompt in call.prompt:
        if isinstance(prompt, str):
            _check_characters(len(prompt), "prompt", config)
            prompt = model.tokenizer.encode(prompt)
        _check_prompt(prompt, "prompt", model, config)
        yield prompt


def _check_characters(count: int, field: str, config: ServerConfig) -> None:
    if count > CHARACTERS_PER_TOKEN * config.max_prompt_tokens:
        text = f"{field}: {count} characters, and at most {config.max_prompt_tokens} tokens; shorten it"
        raise ApiError(400, text, field, "context_length_exceeded")


def _check_prompt(prompt: list[int], field: str, model: ServedModel, config: ServerConfig) -> None:
    if not prompt:
        raise ApiError(400, f"{field}: it has no tokens; give at least one", field, "invalid_value")
    if len(prompt) > config.max_prompt_tokens:
        text = f"{field}: {len(prompt)} tokens exceed the server's {config.max_prompt_tokens}; shorten it"
        raise ApiError(400, text, field, "context_length_exceeded")
    outside = next((token for token in prompt if not 0 <= token < model.vocabulary), None)
    if outside is not None:
        text = f"{field}: token id {outside} lies outside the vocabulary, 0 to {model.vocabulary - 1}"
        raise ApiError(400, text, field, "invalid_value")


def _limit(call: AnyRequest, config: ServerConfig) -> int:
    """Tokens to generate, at most."""
    asked, field = call.max_tokens, "max_tokens"
    if isinstance(call, ChatRequest) and call.max_completion_tokens is not None:
        asked, field = call.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        return min(call.default_max_tokens or config.max_tokens, config.max_tokens)
    if asked > config.max_tokens:
        text = f"{field}={asked}: exceeds the server's {config.max_tokens}; ask for fewer"
        raise ApiError(400, text, field, "context_length_exceeded")
    return asked


def _generation_request(
    call: AnyRequest, model: ServedModel, config: ServerConfig, limit: int
) -> GenerationRequest:
    greedy = call.temperature == 0
    sampling = {
        "use_greedy": greedy,
        "temperature": 1.0 if greedy else call.temperature,
        "top_k": call.top_k,
        "top_p": call.top_p,
    }
    try:
        request = parse_request(
            {"max_length": limit},
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
