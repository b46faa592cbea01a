# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Chats in a tokenizer's own (Jinja) template: token ids as Hugging Face's `apply_chat_template` gives them, and
which of them a model would have to emit."""

import re
from collections.abc import Collection, Sequence
from typing import Any

ROLES = {"user": "user", "human": "user", "system": "system"} | dict.fromkeys(
    ("assistant", "gpt", "model"), "assistant"
)
"""What the speakers of NeMo's and ShareGPT's conversations are called -> the role in a template."""


def messages_of(line: dict[str, Any]) -> tuple[list[dict[str, Any]], list[bool]]:
    """The messages of one line, and which of them are learnt.

    Args:
        line: with `messages`, a list of `{"role", "content"}`, all assistants' being learnt; or in NeMo's form with
            `conversations`, a list of `{"from", "value"}`, perhaps `system`, and perhaps `mask`: speakers, separated by
            commas, who are not learnt. Speakers other than `ROLES` are users if `mask` names them, else assistants.

    Raises:
        ValueError: what is wrong with it.
    """
    for key in ("tools", "functions", "type"):
        if line.get(key):
            raise ValueError(f"has {key!r}, which chats in the tokenizer's template are not read with")
    if "messages" in line:
        messages = _turns(line["messages"], "messages", "role", "content")
        learnt = [message["role"] == "assistant" for message in messages]
    elif "conversations" in line:
        turns = _turns(line["conversations"], "conversations", "from", "value")
        masked = None if line.get("mask") is None else {name.strip() for name in str(line["mask"]).split(",")}
        messages = [{"role": "system", "content": line["system"]}] if line.get("system") else []
        learnt = [False] * len(messages)
        for turn in turns:
            name = turn["from"]
            role = ROLES.get(name.lower())
            if role is None and masked is None:
                raise ValueError(f"has a turn from {name!r}; say in 'mask' whose turns are not to be learnt")
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
    """The chat template of a Hugging Face tokenizer.

    An answer begins where the model would be asked: behind the prompt that the template makes of the turns before. It
    ends with the first token that ends a text, as generation does; what a template puts behind it no model emits.
    In a template with `{% generation %}` marks these say where answers are.

    Args:
        tokenizer: Hugging Face's.
        end_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: Any, end_ids: Collection[int]):
        self.tokenizer, self.end_ids = tokenizer, frozenset(end_ids)
        template = tokenizer.get_chat_template()
        self.marked = re.search(r"\{%-?\s*generation\s*-?%\}", template) and tokenizer.is_fast

    def tokens(self, messages: list[dict], learnt: Sequence[bool]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them belong to answers that are learnt.

        Raises:
            ValueError: the template refuses the conversation, or shows an answer where it cannot be found.
        """
        text = self._render(messages)
        assistants = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        if self.marked and all(learnt[k] for k in assistants):
            out = self.tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True
            )
            return list(out["input_ids"]), [bool(mark) for mark in out["assistant_masks"]]
        ids, begins = self._encode(text)
        starts = {k: self._index(ids, begins, text, self._start(messages, k, text)) for k in assistants}
        mask = [False] * len(ids)
        for k, following in zip(assistants, [*assistants[1:], None], strict=True):
            if learnt[k]:
                limit = len(ids) if following is None else starts[following]
                end = self._end(messages, k, text, ids, begins, starts[k], limit)
                mask[starts[k] : end] = [True] * (end - starts[k])
        return ids, mask

    def _render(self, messages: list[dict], prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except (
            Exception
        ) as error:  # a template is a program by the tokenizer's authors; it raises what it likes
            raise ValueError(f"is refused by the tokenizer's chat template: {error}") from error

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
        """Ids, and for fast tokenizers the characters of each."""
        if not self.tokenizer.is_fast:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"], None
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return out["input_ids"], out["offset_mapping"]

    def _start(self, messages: list[dict], k: int, text: str) -> int:
        """Where in the text the answer of turn k begins."""
        try:
            prompt = self._render(messages[:k], prompt=True)
        except ValueError:  # e.g. a conversation that an assistant begins
            prompt = None
        if prompt is not None and text.startswith(prompt):
            return len(prompt)
        # What a template shows of the turns before may depend on those that follow.
        head, _, _ = self._around(messages, k, text)
        if not text.startswith(head):
            raise ValueError(
                f"has turn {k + 1}, which the tokenizer's chat template shows where it cannot be found"
            )
        return len(head)

    def _around(self, messages: list[dict], k: int, text: str) -> tuple[str, str, str]:
        """The text before a content of turn k, that content, and the text behind it."""
        content = "answer"
        while content in text:
            content += "x"
        other = self._render([*messages[:k], {**messages[k], "content": content}, *messages[k + 1 :]])
        head, found, tail = other.partition(content)
        if not found:
            raise ValueError(f"has turn {k + 1}, which the tokenizer's chat template does not show")
        return head, content, tail

    def _index(self, ids: list[int], begins: list | None, text: str, start: int) -> int:
        """The first token that holds characters from `start` on."""
        if begins is not None:
            return next((i for i, (_, end) in enumerate(begins) if end > start), len(ids))
        before, _ = self._encode(text[:start])
        if ids[: len(before)] != before:
            raise ValueError(
                "has an answer that shares a token with its prompt; set ++model.tokenizer.use_fast=true"
            )
        return len(before)

    def _end(
        self,
        messages: list[dict],
        k: int,
        text: str,
        ids: list[int],
        begins: list | None,
        start: int,
        limit: int,
    ) -> int:
        """One past the last token of an answer."""
        for index in range(start, limit):
            if ids[index] in self.end_ids:
                return index + 1
        _, _, tail = self._around(messages, k, text)
        if not text.endswith(tail):
            raise ValueError(f"has turn {k + 1}, whose end in the tokenizer's chat template cannot be found")
        end = self._index(ids, begins, text, len(text) - len(tail))
        special = set(self.tokenizer.all_special_ids) | {
            token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special
        }
        return next((index + 1 for index in range(end, limit) if ids[index] in special), end)
