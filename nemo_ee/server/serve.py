# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A server's life: from checkpoints to requests, until a signal ends it."""

import math
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import uvicorn
from nemo.utils import logging

from nemo_ee.config import EarlyExitConfig
from nemo_ee.decoding.assumed_prices import prices_of
from nemo_ee.decoding.pass_prices import read_prices
from nemo_ee.decoding.request import GenerationRequest, parse_request
from nemo_ee.decoding.session import DecodingSession
from nemo_ee.errors import ConfigError, Fault, GenerationError
from nemo_ee.generation.generating import generating, position_limit
from nemo_ee.running.restore import read_exits, restore_model
from nemo_ee.server.app import create_app
from nemo_ee.server.connections.connection import Connection
from nemo_ee.server.connections.lobby import Lobby
from nemo_ee.server.connections.open_files import BACKLOG, connections_within_limit
from nemo_ee.server.engine import Engine
from nemo_ee.server.metrics import Metrics
from nemo_ee.server.probe import POSITIONS
from nemo_ee.server.served_model import ServedModel, SharedTokenizer
from nemo_ee.server.service import Service
from nemo_ee.server.settings import ServerConfig, is_loopback

SPARE_CONNECTIONS = 256
"""Connections beyond those of all sequences that may run and wait: idle ones, for /health, the page, refusals."""
FEWEST_SPARE = 16
"""Of these, where the limit of open files leaves no room for more."""
KEEP_ALIVE_SECONDS = 30
"""How long an idle connection is kept: longer than usual clients do (5 s in OpenAI's), which would otherwise send
a request into a connection that is just being closed."""
SENDING_SECONDS = 2
"""Beyond `shutdown_grace_s`, for the last answers to be sent."""


def serve(config: ServerConfig, trainer: Any) -> None:
    """Restores the model and answers requests until SIGINT or SIGTERM.

    Args:
        config: what to serve, and limits.
        trainer: of one process.

    Raises:
        ConfigError, CheckpointError: before the model is built; a missing BOS token behind it.
    """
    check(config)
    keys = {"precision": trainer.precision, "megatron_amp_O2": config.megatron_amp_O2}
    model = restore_model(config.gpt_model_file, config.adapter_file, trainer, keys)
    service = create_service(config, model)
    if not is_loopback(config.host):
        asks = (
            "which asks nobody who they are"
            if config.api_key is None
            else "over connections that are not encrypted"
        )
        logging.warning(f"host={config.host}: others reach this server, {asks}")
    try:
        Server(service).run_until_signal()
    finally:
        service.engine.stop()


def check(config: ServerConfig) -> None:
    """What the settings and the files' configurations show to be wrong.

    Raises:
        ConfigError, CheckpointError: see `serve`.
    """
    check_address(config.host, config.port)
    most_connections(config)
    base, early_exit = read_exits(config)
    usual_request(config, early_exit)
    read_prices(config.prices_file, base.num_layers, early_exit.layers, config.weights, config.output_layer)
    limit = position_limit(base)
    if config.positions(limit) > limit:
        rule, remedy = f"exceeds the model's {limit} positions", f"use context_length={limit}"
        raise ConfigError(Fault("context_length", config.context_length, rule, remedy))


def check_address(host: str, port: int) -> None:
    """Raises ConfigError for an address that is not this machine's, or taken."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        rule = f"the server cannot listen there ({error})"
        raise ConfigError(Fault("host:port", f"{host}:{port}", rule, "choose another")) from error


def most_connections(config: ServerConfig) -> int:
    """Connections at a time. Raises ConfigError where the operating system allows too few."""
    busy = config.slots + config.queue_size
    return connections_within_limit(busy + SPARE_CONNECTIONS, busy + FEWEST_SPARE)


def usual_request(config: ServerConfig, early_exit: EarlyExitConfig) -> GenerationRequest:
    """What a request gets that says nothing.

    Raises:
        ConfigError: the server's `early_exit` does not fit the model's.
    """
    return parse_request(None, None, asdict(config.early_exit), early_exit)


def create_service(config: ServerConfig, model: Any) -> Service:
    """The model with an engine that has been started.

    Args:
        config: the server's.
        model: a `MegatronGPTEarlyExitModel`.

    Raises:
        ConfigError: `add_BOS` without such a token.
        GenerationError: a model that cannot be served.
    """
    try:
        tokenizer = SharedTokenizer(model.text_tokenizer, config.add_BOS)
    except GenerationError as error:
        rule = "the tokenizer has no BOS token"
        raise ConfigError(Fault("add_BOS", config.add_BOS, rule, "set add_BOS=null")) from error
    usual = usual_request(config, model.early_exit)
    context_length = config.positions(position_limit(model.cfg))
    longest = max(context_length, POSITIONS)
    model.prepare_decoding(
        config.weights,
        rows=config.slots,
        max_length=longest,
        prices_file=config.prices_file,
        output_layer=config.output_layer,
    )
    model.warn_of_untuned_exits()
    if not usual.exits and config.early_exit.exits is None:
        model.say_if_exits_are_off()
    metrics = Metrics()
    engine = Engine(
        lambda: decoding_session(model, config.slots, longest, usual),
        config.slots,
        config.prefill_tokens,
        config.queue_size,
        metrics,
    )
    engine.start()
    with generating(model):
        prices = prices_of(model.decoding_model()).shown()
    gpt = model.gpt
    served = ServedModel(
        config.served_name,
        tokenizer,
        model.early_exit,
        usual,
        gpt.config.num_layers,
        gpt.true_vocab_size,
        context_length,
        config.base_name,
        prices,
    )
    return Service(config, served, engine, metrics)


@contextmanager
def decoding_session(
    model: Any, slots: int, longest: int, usual: GenerationRequest
) -> Iterator[DecodingSession]:
    """A session in which every exit of the model may be used.

    Args:
        model: a `MegatronGPTEarlyExitModel`.
        slots: see `DecodingSession`.
        longest: see `DecodingSession`.
        usual: names the confidence rule and the KV policy.
    """
    with generating(model):
        decoding, exits = model.decoding_model(), list(model.early_exit.layers)
        if decoding.captured is not None:
            decoding.captured.capture_all()
        with DecodingSession(decoding, exits, slots, longest, usual.kv_policy, usual.confidence) as session:
            yield session


class Server(uvicorn.Server):
    """uvicorn's, with a time limit for what is under way when it ends.

    Args:
        service: what it serves.

    Attributes:
        lobby: its connections.
    """

    def __init__(self, service: Service):
        config = service.config
        self.lobby = Lobby(most_connections(config))
        super().__init__(
            uvicorn.Config(
                create_app(service),
                host=config.host,
                port=config.port,
                http=partial(Connection, self.lobby, config.receive_timeout_s),
                ws="none",
                lifespan="on",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                backlog=BACKLOG,
                timeout_graceful_shutdown=math.ceil(config.shutdown_grace_s) + SENDING_SECONDS,
            )
        )
        self._service = service

    async def shutdown(self, sockets: Any = None) -> None:
        """Accepts nothing any more, lets requests go on for `shutdown_grace_s`, and ends."""
        self._service.engine.drain(self._service.config.shutdown_grace_s)
        await super().shutdown(sockets)

    def run_until_signal(self) -> None:
        """Serves until SIGINT or SIGTERM; uvicorn raises it again in the end, when it has been obeyed."""
        handlers = {
            number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            self.run()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
