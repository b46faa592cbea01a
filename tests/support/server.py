# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A server over a fake session, listening on this machine."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from nemo_ee.config import parse_early_exit
from nemo_ee.generation.text import TextTokenizer
from nemo_ee.server.engine import Engine
from nemo_ee.server.metrics import Metrics
from nemo_ee.server.serve import Server, usual_request
from nemo_ee.server.served_model import ServedModel, SharedTokenizer
from nemo_ee.server.service import Service
from nemo_ee.server.settings import ServerConfig
from tests.support.fake_session import EXIT_LAYERS, FakeSession
from tests.support.tiny_gpt import VOCABULARY, tokenizer_folder

LIMITS = dict(context_length=40, slots=4, prefill_tokens=60, queue_size=16, max_choices=4)


@lru_cache
def tiny_tokenizer(chat: bool = True) -> Any:
    """NeMo's, of `tests.support.tiny_gpt`."""
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    return AutoTokenizer(tokenizer_folder(chat))


def server_config(**settings: Any) -> ServerConfig:
    """Of a small server that listens on a free port."""
    given = dict(gpt_model_file="tiny.nemo", port=0, **LIMITS)
    return ServerConfig.from_dict({**given, **settings})


def served_model(config: ServerConfig, tokenizer: Any = None) -> ServedModel:
    """The fake session's model."""
    exits = parse_early_exit(
        {"layers": list(EXIT_LAYERS[:-1]), "inference": {"threshold": [0.9, 0.8]}}, num_layers=EXIT_LAYERS[-1]
    )
    shared = SharedTokenizer(TextTokenizer(tokenizer or tiny_tokenizer()), config.add_BOS)
    usual = usual_request(config, exits)
    length, base = config.positions(VOCABULARY), config.base_name
    return ServedModel(config.served_name, shared, exits, usual, EXIT_LAYERS[-1], VOCABULARY, length, base)


def fake_service(session: FakeSession, tokenizer: Any = None, **settings: Any) -> Service:
    """A service over a fake session; its engine has been started."""
    config = server_config(slots=session.slots, **settings)
    metrics = Metrics()
    engine = Engine(session.opened, config.slots, config.prefill_tokens, config.queue_size, metrics)
    engine.start()
    return Service(config, served_model(config, tokenizer), engine, metrics)


@contextmanager
def listening(service: Service) -> Iterator[str]:
    """Serves in a thread until the end of the block; gives the base URL."""
    with serving(service) as server:
        yield server.url


@contextmanager
def serving(service: Service) -> Iterator[Server]:
    """The same, and gives the server."""
    server = Server(service)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        server.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Waits for something that another thread does.

    Raises:
        TimeoutError: it did not happen.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it did not happen")
        time.sleep(0.005)
