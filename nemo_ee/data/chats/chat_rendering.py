# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Renders a Hugging Face tokenizer's chat template within limits, in a process of its own.

The text is that of transformers' `apply_chat_template`, which has no limits: one line of a tokenizer's file may take
all of a machine's memory, or hold the server for good. The process starts with the first chat, takes some 20 MB, and
ends with this one; a rendering takes a tenth of a millisecond longer than it would here.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any

from nemo_ee.data.chats import template_process

MOST_CHARACTERS = 2**20
"""Of a template; published ones have up to some 20,000."""


class RenderingError(ValueError):
    """A template refuses a conversation, or takes or writes too much for it."""


def render(tokenizer: Any, messages: list[dict[str, Any]], prompt: bool = False) -> str:
    """The text of a conversation, as `tokenizer.apply_chat_template(messages, tokenize=False)` writes it.

    Args:
        tokenizer: Hugging Face's.
        messages: of the conversation; what JSON can hold.
        prompt: end with what the model is asked with (`add_generation_prompt`).

    Raises:
        RenderingError: says why.
    """
    return render_marked(tokenizer, messages, prompt)[0]


def render_marked(
    tokenizer: Any, messages: list[dict[str, Any]], prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """As `render`, with the places of what stands in `{% generation %}`: first character, and one past the last."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # there is none, or none by the name of default
        raise RenderingError(str(error)) from error
    if not isinstance(template, str) or len(template) > MOST_CHARACTERS:
        raise RenderingError(f"it is no text of at most {MOST_CHARACTERS} characters")
    values = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": prompt,
        **tokenizer.special_tokens_map,
    }
    try:
        size = len(json.dumps(messages))
        request = json.dumps({"template": template, "values": values, "size": size})
    except (TypeError, ValueError, RecursionError) as error:
        raise RenderingError(f"the conversation holds more than JSON can ({error})") from error
    found = _process.ask(request)
    if "error" in found:
        raise RenderingError(found["error"])
    return found["text"], [(start, end) for start, end in found["places"]]


def prompt_ids(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    """Token ids of what the model is asked with: those of `apply_chat_template(messages, add_generation_prompt=True)`.

    Raises:
        RenderingError: says why there is no such text.
    """
    return tokenizer(render(tokenizer, messages, prompt=True), add_special_tokens=False)["input_ids"]


class _Process:
    """The one process of this one; a forked child starts its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: str) -> dict[str, Any]:
        """The answer of `template_process`, or an error in its form."""
        if self._owner != os.getpid():  # whoever held the lock in the parent is not here to release it
            self._lock, self._child, self._owner = threading.Lock(), None, os.getpid()
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._child = _started()
            child = self._child
            try:
                line = _answer(child, request)
            except BaseException:  # interrupted: the next one who asks would read this answer
                self._child = None
                child.kill()
                child.wait()
                raise
            if line.endswith(b"\n"):
                return json.loads(line)
            self._child = None
            return {"error": _why(child.wait())}


_process = _Process()


def _answer(child: "subprocess.Popen[bytes]", request: str) -> bytes:
    """A line, or what there is of it where the process ends."""
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(request.encode() + b"\n")
        child.stdin.flush()
    except BrokenPipeError:
        pass  # its end says why
    return child.stdout.readline()


def _started() -> "subprocess.Popen[bytes]":
    # without `site`, which would cost a tenth of a second and import what it likes; the path says what that knows
    path = json.dumps([each for each in sys.path if isinstance(each, str)])  # imports pass over all else
    command = [sys.executable, "-S", str(template_process.__file__), path]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _why(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"it takes more than {template_process.SECONDS} seconds of the processor"
    if status == -signal.SIGALRM:
        return f"it takes more than {template_process.PATIENCE:.0f} seconds"
    return f"the process that renders it ended with status {status}"
