# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Requests in OpenAI's form, checked field by field before anything else looks at them."""

import json
import math
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from nemo_ee.server.answers.errors import ApiError
from nemo_ee.server.requests.unsupported import MOST_FAULTS, supported_fields

MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 16, 256
"""OpenAI has 4 strings; evaluation harnesses send more."""
MAX_STOP_TOKENS = 128
MAX_LOGPROBS, MAX_CHAT_LOGPROBS = 5, 20
"""OpenAI's: most probable tokens that are told beside each, of completions and chats."""
MAX_EXIT_FIELDS = 16
LONGEST_INTEGER = 20
"""Digits and sign; enough for 64 bits."""


def _text(value: Any) -> Any:
    """Text that can be encoded: JSON may hold halves of surrogate pairs, which no tokenizer takes."""
    if not isinstance(value, str):
        raise ValueError("must be a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} is half of a surrogate pair; send whole characters"
        ) from error
    return value


def _prompts(value: Any) -> Any:
    """A text, texts, token ids, or lists of token ids, as a list of texts and lists of token ids."""
    if isinstance(value, str):
        value = [value]
    elif isinstance(value, list) and value and all(_is_id(item) for item in value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError(
            "must be a text, a list of texts, token ids or a list of lists of token ids; not empty"
        )
    texts = all(isinstance(item, str) for item in value)
    ids = all(isinstance(item, list) and item and all(_is_id(x) for x in item) for item in value)
    if not texts and not ids:
        raise ValueError("its items must all be texts, all token ids, or all non-empty lists of token ids")
    return [_text(item) for item in value] if texts else value


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _stops(value: Any) -> Any:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(item, str) and item for item in strings):
        raise ValueError("must be a non-empty text, or a list of such")
    if len(strings) > MAX_STOP_STRINGS or any(len(item) > MAX_STOP_CHARACTERS for item in strings):
        raise ValueError(f"at most {MAX_STOP_STRINGS} texts of at most {MAX_STOP_CHARACTERS} characters")
    return tuple(_text(item) for item in strings)


def _none_of_false(value: Any) -> Any:
    """Chats' word for no log-probabilities, which clients send here, too."""
    return None if value is False else value


def _token_ids(value: Any) -> Any:
    if not isinstance(value, list) or not all(_is_id(item) for item in value) or len(value) > MAX_STOP_TOKENS:
        raise ValueError(f"must be a list of token ids, at most {MAX_STOP_TOKENS}")
    return tuple(value)


def _content(value: Any) -> Any:
    """A message's text; a list of text parts is joined."""
    if isinstance(value, list):
        if not all(
            isinstance(p, dict) and p.keys() == {"type", "text"} and p["type"] == "text" for p in value
        ):
            raise ValueError('parts must be {"type": "text", "text": …}; images and audio are not supported')
        value = "".join(_text(part["text"]) for part in value)
    return _text(value)


def _exits(value: Any) -> Any:
    """Its fields are checked with the model's exits, by `parse_request`."""
    if not isinstance(value, dict | bool):
        raise ValueError("must be an object with threshold, exits, …, or false for full depth")
    if isinstance(value, dict) and len(value) > MAX_EXIT_FIELDS:
        raise ValueError(f"more than {MAX_EXIT_FIELDS} fields")
    return value


Text = Annotated[str, BeforeValidator(_text)]
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
PROMPT = {"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]}
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
STOP = {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOP_STRINGS}]}
STOP_TOKENS = {"type": "array", "items": {"type": "integer"}, "maxItems": MAX_STOP_TOKENS}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}
LOGPROBS = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS}, {"enum": [False, None]}]}
EXITS = {"type": ["object", "boolean"], "maxProperties": MAX_EXIT_FIELDS}
"""What the functions above take, as JSON schemas."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(_Strict):
    """OpenAI's `stream_options`: whether a last chunk tells the usage."""

    include_usage: bool = False


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content), WithJsonSchema(CONTENT)]

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """As in the request itself: answers that are sent back have all fields of OpenAI's."""
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class GenerationFields(_Strict):
    """What both endpoints have. `temperature=0` is greedy; `top_k` of 0 or -1 is all tokens.

    `top_k`, `min_tokens`, `repetition_penalty`, `stop_token_ids` and `ignore_eos` are vLLM's. `early_exit` is ours:
    fields of `nemo_ee.decoding.request.ExitOptions`, or false for full depth.
    """

    default_max_tokens: ClassVar[int | None] = None

    model: Text
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**63)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    n: int = Field(1, ge=1)
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops), WithJsonSchema(STOP)] = ()
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(_token_ids), WithJsonSchema(STOP_TOKENS)] = ()
    ignore_eos: bool = False
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    early_exit: Annotated[Any, BeforeValidator(_exits), WithJsonSchema(EXITS)] = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "GenerationFields":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream=true; leave it out")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk that tells the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationFields):
    """`/v1/completions`; of `max_tokens=0` nothing is generated."""

    default_max_tokens: ClassVar[int | None] = 16

    max_tokens: int | None = Field(None, ge=0)
    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts), WithJsonSchema(PROMPT)]
    echo: bool = False
    logprobs: Annotated[
        int | None,
        Field(ge=0, le=MAX_LOGPROBS),
        BeforeValidator(_none_of_false),
        WithJsonSchema(LOGPROBS),
    ] = None

    @property
    def kept(self) -> dict[str, int | None]:
        """What is kept of predictions, see `SamplingOptions`."""
        return {"logprobs": self.logprobs, "prompt_logprobs": self.logprobs if self.echo else None}


class ChatRequest(GenerationFields):
    """`/v1/chat/completions`; without a limit the answer may be as long as the context leaves room for."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_CHAT_LOGPROBS)

    @property
    def kept(self) -> dict[str, int | None]:
        """See `CompletionRequest`."""
        return {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}

    @model_validator(mode="after")
    def _fields_that_go_together(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens: the older name of max_completion_tokens; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true; leave it out")
        return self


AnyRequest = CompletionRequest | ChatRequest
Request = TypeVar("Request", bound=GenerationFields)


def parse(kind: type[Request], body: bytes) -> Request:
    """The request in a body.

    Raises:
        ApiError: 400, for what is no JSON object, unknown or unsupported fields, and impossible values, which it
            names.
        RecursionError: it is nested too deeply.
    """
    try:
        values = json.loads(body, parse_int=_integer, parse_float=_float, parse_constant=_refuse_constant)
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from error
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    try:
        return kind.model_validate(supported_fields(values, kind.model_fields))
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)[:MOST_FAULTS]
        texts = [_fault_text(fault) for fault in faults]
        param = ".".join(map(str, faults[0]["loc"])) or texts[0].split(":")[0]
        raise ApiError(400, "\n".join(texts), param, "invalid_value") from error


def _integer(text: str) -> int:
    if len(text) > LONGEST_INTEGER:
        raise ValueError(f"{text[:LONGEST_INTEGER]}…: too large a number")
    return int(text)


def _float(text: str) -> float | int:
    """A number; 3.0 is the integer 3, as JSON knows one kind of numbers alone."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text}: too large a number")
    return int(value) if value.is_integer() else value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _fault_text(fault: Any) -> str:
    message = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:
        return message
    shown = "" if fault["type"] == "missing" else f"={json.dumps(fault['input'])[:80]}"
    return f"{'.'.join(map(str, fault['loc']))}{shown}: {message}"
