# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What the server answers, as models; the answers themselves are made elsewhere, and tests hold them to these."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Confidence = Annotated[float, Field(ge=0, le=1)]
Nats = Annotated[float, Field(le=0.001)]  # log-probabilities, and what rounds
Ending = Literal["stop", "length"]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TokenExits(_Answer):
    """For each token its text, the layer that it left at, and how sure that exit was."""

    tokens: list[str]
    exit_layers: list[Annotated[int, Field(ge=1)]]
    confidences: list[Confidence]


class Cost(_Answer):
    """Passes of one token through one layer: those that were run, those of full depth; lossless decoding's drafts."""

    layers_run: Count
    full_depth_layers: Count
    drafts: Count
    accepted: Count


class Usage(_Answer):
    """Tokens, and what they cost."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    early_exit: Cost


class _Choice(_Answer):
    index: Count
    finish_reason: Ending
    early_exit: TokenExits


class _Part(_Choice):
    finish_reason: Ending | None


class CompletionLogprobs(_Answer):
    """Of each token its text, how probable it was and which were the most probable, in nats, and where it begins in the
    text; null for a prompt's first token."""

    tokens: list[str]
    token_logprobs: list[Nats | None]
    top_logprobs: list[dict[str, Nats] | None]
    text_offset: list[Count]


class CompletionChoice(_Choice):
    """One text."""

    text: str
    logprobs: CompletionLogprobs | None


class CompletionPart(_Part):
    """More of one text."""

    text: str
    logprobs: CompletionLogprobs | None


class ProbableToken(_Answer):
    """A token, the bytes of UTF-8 that it stands for, and how probable it was, in nats."""

    token: str
    bytes: list[int]
    logprob: Nats


class ChosenToken(ProbableToken):
    """One that came, and the most probable ones in its place."""

    top_logprobs: list[ProbableToken]


class ChatLogprobs(_Answer):
    """Of each token of an answer."""

    content: list[ChosenToken]
    refusal: None


class AssistantMessage(_Answer):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str


class MessagePart(_Answer):
    """Who speaks, once, and more of what is said."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(_Choice):
    """One answer."""

    message: AssistantMessage
    logprobs: ChatLogprobs | None


class ChatPart(_Part):
    """More of one answer."""

    delta: MessagePart
    logprobs: ChatLogprobs | None


class _Envelope(_Answer):
    id: str
    created: Count
    model: str


class Completion(_Envelope):
    """Answers `/v1/completions`."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(_Envelope):
    """An event of its stream; if `usage` is asked for, the last one has it and no choice, and it is null before."""

    object: Literal["text_completion"]
    choices: list[CompletionPart]
    usage: Usage | None = None


class ChatCompletion(_Envelope):
    """Answers `/v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(_Envelope):
    """An event of its stream; if `usage` is asked for, the last one has it and no choice, and it is null before."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatPart]
    usage: Usage | None = None


class ModelExits(_Answer):
    """The model that exits belong to, which these are, and how the server decodes."""

    base: str
    exits: list[int]
    num_layers: int
    default_thresholds: dict[str, Confidence]
    default_lossless: bool
    confidence: str
    kv_policy: str
    pass_prices: dict[str, str | dict[str, float]]


class Limits(_Answer):
    """Of a request."""

    context_length: int
    max_choices: int


class ModelCard(_Answer):
    """The model."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    early_exit: ModelExits
    limits: Limits


class ModelList(_Answer):
    """All models: one."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(_Answer):
    """Whether requests are accepted, and how many sequences there are."""

    status: Literal["ok", "draining", "failed", "not_finite", "stopped"]
    running: Count
    waiting: Count


class ErrorDetail(_Answer):
    """What is wrong and what to do instead; the field at fault; a word for programs."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class Error(_Answer):
    """In OpenAI's form."""

    error: ErrorDetail


ANSWERS: tuple[type[BaseModel], ...] = (
    Completion,
    CompletionChunk,
    ChatCompletion,
    ChatCompletionChunk,
    ModelCard,
    ModelList,
    Health,
    Error,
)
"""All that endpoints name."""
