# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Chats in a tokenizer's own template, Jinja's or NeMo's: token ids as when the model is asked, and which of them it
would have to emit."""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from nemo_ee.data.chats.chat_rendering import RenderingError, render, render_marked
from nemo_ee.data.token_rules import special_ids
from nemo_ee.errors import GenerationError

ROLES = {"user": "user", "human": "user", "system": "system"} | dict.fromkeys(
    ("assistant", "gpt", "model"), "assistant"
)
"""What the speakers of NeMo's and ShareGPT's conversations are called -> the role in a template."""


def messages_of(line: dict[str, Any]) -> tuple[list[dict[str, Any]], list[bool]]:
    """The messages of one line, and which of them are learnt.

    Args:
        line: with `messages`, a list of `{"role", "content"}`, all assistants' being learnt but those with a `weight`
            of 0, as OpenAI has it; or in NeMo's form with `conversations`, a list of `{"from", "value"}`, and perhaps
            `mask`: speakers, separated by commas, who are not learnt. In both forms perhaps with `system`. Speakers
            other than `ROLES` are users if `mask` names them, else assistants.

    Raises:
        ValueError: what is wrong with it.
    """
    for key in ("tools", "functions", "type"):
        if line.get(key):
            raise ValueError(f"has {key!r}, which chats in the tokenizer's template are not read with")
    for key in ("system", "mask"):
        if line.get(key) and not isinstance(line[key], str):
            raise ValueError(f"has {key!r} that is no text")
    if "messages" in line:
        messages = _turns(line["messages"], "messages", "role", "content")
        if line.get("mask"):
            raise ValueError("has 'mask', which belongs to 'conversations'; give messages a 'weight' of 0")
        if any(message.get("weight") not in (None, 0, 1) for message in messages):
            raise ValueError("has a 'weight' other than 0 (not learnt) and 1")
        learnt = [message["role"] == "assistant" and message.get("weight") != 0 for message in messages]
        if line.get("system"):
            if messages[0]["role"] == "system":
                raise ValueError("has a system's message twice, in 'system' and in 'messages'")
            messages = [{"role": "system", "content": line["system"]}, *messages]
            learnt = [False, *learnt]
    elif "conversations" in line:
        turns = _turns(line["conversations"], "conversations", "from", "value")
        masked = None
        if line.get("mask") is not None:
            masked = {name.strip().lower() for name in str(line["mask"]).split(",")}
        messages = [{"role": "system", "content": line["system"]}] if line.get("system") else []
        learnt = [False] * len(messages)
        for turn in turns:
            name = turn["from"].strip().lower()
            role = ROLES.get(name)
            if role is None and masked is None:
                raise ValueError(
                    f"has a turn from {turn['from']!r}; say in 'mask' whose turns are not to be learnt"
                )
            role = role or ("user" if name in masked else "assistant")
            messages.append({"role": role, "content": turn["value"]})
            learnt.append(role == "assistant" if masked is None else name not in masked and role != "system")
        for message, learn in zip(messages, learnt, strict=True):
            if learn and message["role"] != "assistant":
                raise ValueError(f"would have turns of the {message['role']} learnt; name them in 'mask'")
    else:
        hint = "; it looks like plain text: set model.data.chat=false" if "input" in line else ""
        raise ValueError(f"has neither 'messages' nor 'conversations'{hint}")
    if not any(learnt):
        raise ValueError("has no answer: no turn of an assistant that is to be learnt")
    return messages, learnt


def _turns(value: Any, key: str, who: str, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"has no list of turns in {key!r}")
    for number, turn in enumerate(value, 1):
        texts = isinstance(turn, dict) and all(isinstance(turn.get(name), str) for name in (who, what))
        if not texts:
            raise ValueError(f"has a turn {number} in {key!r} without the texts {who!r} and {what!r}")
    return value


class ChatTemplate:
    """The (Jinja) chat template of a Hugging Face tokenizer, with the ids of its `apply_chat_template`.

    An answer begins where the model would be asked: behind the prompt that the template makes of the turns before. It
    ends with the first special token behind what was said; what a template puts behind that, no model emits.
    In a template with `{% generation %}` marks these say where answers are.

    Args:
        tokenizer: Hugging Face's.
        end_ids: tokens that end a text, if they are not all special.
    """

    def __init__(self, tokenizer: Any, end_ids: Collection[int]):
        self.tokenizer, self.end_ids = tokenizer, frozenset(end_ids)
        self.ends = self.end_ids | special_ids(tokenizer)
        template = tokenizer.get_chat_template()
        self.marked = re.search(r"\{%-?\s*generation\s*-?%\}", template) and tokenizer.is_fast

    def tokens(self, messages: list[dict], learnt: Sequence[bool]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them belong to answers that are learnt.

        Raises:
            ValueError: the template refuses the conversation, or shows an answer where it cannot be found.
        """
        assistants = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        if self.marked and all(learnt[k] for k in assistants):
            return self._marked_tokens(messages)
        shown = _Shown(self.tokenizer, self._render(messages))
        starts = {k: shown.first_token_from(self._start(messages, k, shown.text)) for k in assistants}
        mask = [False] * len(shown.ids)
        for k, following in zip(assistants, [*assistants[1:], None], strict=True):
            if learnt[k]:
                limit = len(shown.ids) if following is None else starts[following]
                end = self._end(messages, k, shown, starts[k], limit)
                mask[starts[k] : end] = [True] * (end - starts[k])
        return shown.ids, mask

    def _render(self, messages: list[dict], prompt: bool = False) -> str:
        try:
            return render(self.tokenizer, messages, prompt)
        except RenderingError as error:
            raise ValueError(f"is refused by the tokenizer's chat template: {error}") from error

    def _marked_tokens(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        """As transformers' `apply_chat_template(…, return_assistant_tokens_mask=True)`."""
        try:
            text, places = render_marked(self.tokenizer, messages)
        except RenderingError as error:
            raise ValueError(f"is refused by the tokenizer's chat template: {error}") from error
        out = self.tokenizer(text, add_special_tokens=False)
        mask = [False] * len(out["input_ids"])
        for start, end in places:
            first, last = out.char_to_token(0, start), out.char_to_token(0, end - 1)
            if first is None:
                break
            stop = last + 1 if last else len(mask)
            mask[first:stop] = [True] * (stop - first)
        return list(out["input_ids"]), mask

    def _start(self, messages: list[dict], k: int, text: str) -> int:
        """Where in the text the answer of turn k begins."""
        try:
            prompt = self._render(messages[:k], prompt=True)
        except ValueError:  # e.g. a conversation that an assistant begins
            prompt = None
        if prompt is not None and text.startswith(prompt):
            return len(prompt)
        # What a template shows of the turns before may depend on those that follow.
        head, _ = self._around(messages, k, text)
        if not text.startswith(head):
            raise ValueError(
                f"has turn {k + 1}, which the tokenizer's chat template shows where it cannot be found"
            )
        return len(head)

    def _around(self, messages: list[dict], k: int, text: str) -> tuple[str, str]:
        """The text before what turn k says, and the text behind it."""
        content = "answer"
        while content in text:
            content += "x"
        other = self._render([*messages[:k], {**messages[k], "content": content}, *messages[k + 1 :]])
        head, found, tail = other.partition(content)
        if not found:
            raise ValueError(f"has turn {k + 1}, which the tokenizer's chat template does not show")
        return head, tail

    def _end(self, messages: list[dict], k: int, shown: "_Shown", start: int, limit: int) -> int:
        """One past the last token of the answer that begins with the token `start`."""
        _, tail = self._around(messages, k, shown.text)
        if shown.text.endswith(tail):
            end = shown.first_token_behind(len(shown.text) - len(tail))
            return next((index + 1 for index in range(end, limit) if shown.ids[index] in self.ends), end)
        for index in range(start, limit):
            if shown.ids[index] in self.end_ids:
                return index + 1
        raise ValueError(f"has turn {k + 1}, whose end in the tokenizer's chat template cannot be found")


class TurnTemplate:
    """NeMo's form of a chat template, which tokenizers of other libraries than Hugging Face's have.

    An answer is what a turn adds to the prompt that the model is asked with: what the template puts in front of the
    answer belongs to it, as no prompt ends with that.

    Args:
        encode: messages -> token ids.
    """

    def __init__(self, encode: Callable[[list[dict]], list[int]]):
        self.encode = encode

    def tokens(self, messages: list[dict], learnt: Sequence[bool]) -> tuple[list[int], list[bool]]:
        """As `ChatTemplate.tokens`."""
        try:
            ids = self.encode(messages)
            mask = [False] * len(ids)
            for k in (k for k, learn in enumerate(learnt) if learn):
                if k == 0:
                    raise ValueError("begins with an answer, and no prompt is before it")
                before, with_it = self.encode(messages[:k]), self.encode(messages[: k + 1])
                if ids[: len(before)] != before or ids[: len(with_it)] != with_it:
                    raise ValueError(f"has turn {k + 1}, which shares a token with a turn beside it")
                mask[len(before) : len(with_it)] = [True] * (len(with_it) - len(before))
        except GenerationError as error:
            raise ValueError(f"is refused: {error}") from error
        return ids, mask


def line_tokens(template: ChatTemplate | TurnTemplate, line: dict[str, Any]) -> tuple[list[int], list[bool]]:
    """Token ids of one line's conversation, and which of them belong to answers that are learnt. Of an answer that was
    cut (`finish_reason` is `length`) the end is not the model's, and left out.

    Raises:
        ValueError: see `messages_of` and `ChatTemplate.tokens`.
    """
    ids, mask = template.tokens(*messages_of(line))
    if line.get("finish_reason") == "length" and any(mask):
        said = max(place for place, learnt in enumerate(mask) if learnt)
        ids, mask = ids[:said], mask[:said]
    return ids, mask


class _Shown:
    """A conversation as text and as tokens, as `apply_chat_template` makes them of it.

    Attributes:
        text: the text.
        ids: its token ids.
    """

    def __init__(self, tokenizer: Any, text: str):
        self.tokenizer, self.text = tokenizer, text
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
        self.ids, self.places = out["input_ids"], out.get("offset_mapping")

    def first_token_from(self, start: int) -> int:
        """The first token that holds characters from `start` on."""
        if self.places is None:
            return self._tokens_before(start)
        return next((i for i, (_, end) in enumerate(self.places) if end > start), len(self.ids))

    def first_token_behind(self, end: int) -> int:
        """The first token that holds no character before `end`."""
        if self.places is None:
            return self._tokens_before(end)
        return next((i for i, (begin, _) in enumerate(self.places) if begin >= end), len(self.ids))

    def _tokens_before(self, place: int) -> int:
        before = self.tokenizer(self.text[:place], add_special_tokens=False)["input_ids"]
        if self.ids[: len(before)] != before:
            raise ValueError(
                "has an answer that shares a token with what is around it, which only a fast tokenizer can tell; "
                "set ++model.tokenizer.use_fast=true"
            )
        return len(before)
