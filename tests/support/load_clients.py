# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Clients of a server, good and bad ones, at the same time: ``python -m tests.support.load_clients JSON``.

The JSON file has `url`, `clients`, `seconds`, `seed` and `cases`: requests with the text and exit layers that
the model gives them alone (`exit_layers` null where they may differ). Prints a JSON object: counts of what
happened, and the first `wrong` answers, which should be none.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

PATH = "/v1/completions"
JSON = {"content-type": "application/json"}
MALFORMED: list[tuple[bytes, int, str]] = [
    (b"", 400, "no JSON"),
    (b"{", 400, "no JSON"),
    (b"[]", 400, "must be a JSON object"),
    (b'{"model": "tiny"}', 400, "prompt: Field required"),
    (b'{"model": "tiny", "prompt": "w1", "max_tokens": -1}', 400, "max_tokens=-1"),
    (b'{"model": "tiny", "prompt": "w1", "min_tokens": 100000}', 400, "more than the 16 that may come"),
    (b'{"model": "tiny", "prompt": "w1", "n": 1000}', 400, "1000 choices"),
    (b'{"model": "tiny", "prompt": "' + b"w1 " * 1000 + b'"}', 400, "1000 tokens exceed the server's 64"),
    (b'{"model": "tiny", "prompt": "' + b"w1 " * 10_000 + b'"}', 400, "30000 characters"),
    (b'{"model": "tiny", "prompt": "w1", "temperature": NaN}', 400, "NaN is no JSON number"),
    (b'{"model": "tiny", "prompt": "w1", "temperature": 1e999}', 400, "too large a number"),
    (b'{"model": "tiny", "prompt": [99999]}', 400, "token id 99999"),
    (b'{"model": "tiny", "prompt": "w1", "early_exit": {"exits": [3]}}', 400, "not all of the model's exits"),
    (b'{"model": "tiny", "prompt": "w1", "logit_bias": {"5": 1}}', 400, "logit_bias: not supported"),
    (b'{"model": "tiny", "prompt": "w1", "\\ud800": 1}', 400, "unknown field"),
    (b'{"model": "tiny", "prompt": ' + b"[" * 2000 + b"}", 400, "nested too deeply"),
    (b'{"model": "other", "prompt": "w1"}', 404, "this server has tiny"),
    (b'{"model": "tiny", "prompt": "' + b"x" * 2_000_000 + b'"}', 413, "send less"),
]
"""Body, status, and a part of the message."""
KEPT_WRONG = 5


class Clients:
    """What they share.

    Args:
        task: the JSON file's contents.
    """

    def __init__(self, task: dict[str, Any]):
        self.task, self.counts, self.wrong = task, Counter[str](), []
        self.end = time.monotonic() + task["seconds"]

    async def run(self) -> dict[str, Any]:
        """All clients until the time is up."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=self.task["url"], timeout=120, limits=limits) as http:
            await asyncio.gather(*(self._client(http, n) for n in range(self.task["clients"])))
        return {"counts": self.counts, "wrong": self.wrong[:KEPT_WRONG]}

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        dice = random.Random(f"{self.task['seed']} {number}")
        acts = [self._ask, self._stream, self._hang_up, self._malformed]
        while time.monotonic() < self.end:
            (act,) = dice.choices(acts, weights=[50, 25, 15, 10])
            try:
                await act(http, dice)
            except httpx.HTTPError as error:
                self._note(False, "connection", [act.__name__, repr(error)])

    def _note(self, right: bool, kind: str, detail: Any) -> None:
        self.counts[kind] += 1
        if not right:
            self.wrong.append([kind, detail])

    async def _busy(self, status: int, dice: random.Random) -> bool:
        """Whether the queue was full; a client then waits a little."""
        if status == 429:
            self.counts["queue full"] += 1
            await asyncio.sleep(dice.uniform(0.05, 0.3))
        return status == 429

    async def _ask(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        case = dice.choice(self.task["cases"])
        answer = await http.post(PATH, json=case["request"])
        if not await self._busy(answer.status_code, dice):
            self._compare("whole", case, [answer.json()] if answer.status_code == 200 else answer.text)

    async def _stream(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        case = dice.choice(self.task["cases"])
        async with http.stream("POST", PATH, json={**case["request"], "stream": True}) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        if await self._busy(answer.status_code, dice):
            return
        good = answer.status_code == 200 and lines[-1] == "data: [DONE]"
        self._compare(
            "stream", case, [json.loads(line[6:]) for line in lines[:-1]] if good else "".join(lines)
        )

    def _compare(self, kind: str, case: dict[str, Any], answers: list[dict[str, Any]] | str) -> None:
        if isinstance(answers, str):
            self._note(False, kind, [case["request"], answers])
            return
        parts = [part for answer in answers for part in answer["choices"]]
        text = "".join(part["text"] for part in parts)
        layers = [layer for part in parts for layer in part["early_exit"]["exit_layers"]]
        right = text == case["text"] and case["exit_layers"] in (None, layers)
        self._note(right, kind, [case, text, layers])

    async def _hang_up(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        """Closes the connection: after some events of a stream, or while the answer is waited for."""
        case = dice.choice(self.task["cases"])
        if dice.random() < 0.5:
            left = dice.randint(1, 5)
            async with http.stream("POST", PATH, json={**case["request"], "stream": True}) as answer:
                async for _ in answer.aiter_lines():
                    left -= 1
                    if left < 0:
                        break
        else:
            try:
                await http.post(PATH, json=case["request"], timeout=dice.uniform(0.001, 0.1))
            except httpx.TimeoutException:
                pass
        self.counts["hung up"] += 1

    async def _malformed(self, http: httpx.AsyncClient, dice: random.Random) -> None:
        body, status, why = dice.choice(MALFORMED)
        answer = await http.post(PATH, content=body, headers=JSON)
        right = answer.status_code == status and why in answer.json()["error"]["message"]
        self._note(right, "malformed", [body[:80].decode(), answer.status_code, answer.text[:200]])


if __name__ == "__main__":
    clients = Clients(json.loads(Path(sys.argv[1]).read_text()))
    print(json.dumps(asyncio.run(clients.run())))
