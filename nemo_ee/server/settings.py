# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The settings of the server, read once from `conf/megatron_gpt_ee_server.yaml` and its overrides."""

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from nemo_ee.decoding.cpu.lean_weights import WEIGHT_KINDS
from nemo_ee.decoding.cpu.output_search import OUTPUT_LAYERS
from nemo_ee.decoding.request import ExitOptions
from nemo_ee.errors import Fault
from nemo_ee.generation.generating import USUAL_LENGTH
from nemo_ee.schema import Positive, Rule, Settings, choice, holds

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
ALL_HOSTS, ADDRESSES = "*", "*.*"
"""In place of a name in a `Host` header: all of them; all that are IP addresses."""
KEY_VARIABLE = "NEMO_EE_API_KEY"
"""Of the environment; has the key where `api_key` has none."""
KEY = re.compile(r"[!-~]+")
HOST_NAME = re.compile(r"\[[0-9A-Fa-f:.]+\]|[^\s/:*\[\]]+")
"""As a `Host` header has it, without its port; IPv6 in brackets."""
PORT = holds(lambda port: 0 <= port < 2**16, "lies within 0 to 65535", "use e.g. 8000; 0 takes a free one")
GRACE = holds(lambda seconds: seconds >= 0, "must be 0 or more", "use e.g. 10")
ONE_PROCESS = holds(
    lambda size: size == 1,
    "the server runs the model in one process",
    "set it to 1; scripts/megatron_gpt_ee_generate.py generates over several processes",
)


def _above_0(remedy: str) -> Rule:
    return holds(lambda seconds: seconds > 0, "must be positive", remedy)


@dataclass(frozen=True)
class ServerConfig(Settings):
    """A server.

    Attributes:
        gpt_model_file: the base, or a model merged with its exits, a `.nemo`.
        adapter_file: the exits alone; null if they are part of the model.
        model_name: what clients call the model; null for the name of the exits' file, or of the model's.
        host: address to listen at.
        port: 0 takes a free one.
        api_key: clients must send it; null for `KEY_VARIABLE`'s, or for none where that is not set either.
        insecure: others may be answered without a key.
        allowed_hosts: names in `Host` headers that are answered, `*` for all; null for `localhost` and its
            addresses where `host` is one of these; elsewhere for all where there is a key, and for IP addresses
            and this machine's name where there is none.
        early_exit: when tokens may leave, for requests that do not say; confidence and kv_policy are those of
            all requests.
        prices_file: JSON, see `prepare_decoding`.
        weights: how decoding holds weights, see `nemo_ee.decoding.cpu.lean_weights`.
        output_layer: how it finds greedy tokens of full depth, see `nemo_ee.decoding.cpu.output_search`.
        add_BOS: put the tokenizer's BOS before each prompt that is a text, or not; null for the model's rule.
        slots: sequences that decode together.
        context_length: positions of a sequence: tokens of a prompt, and of its answer but the last; null for the
            model's, or 2048 if these are more.
        max_choices: prompts times `n` of one request.
        prefill_tokens: prompt tokens that join between two steps, at most; a longer prompt joins alone.
        queue_size: sequences that wait for a slot, at most.
        max_body_bytes: of one request.
        receive_timeout_s: seconds for a request's headers to arrive, then for its body; and how long an answer may
            wait for a client that does not read.
        request_timeout_s: seconds for a request, waiting included.
        shutdown_grace_s: seconds that requests may go on after SIGTERM.
        tensor_model_parallel_size: processes that share the model; must be 1.
        megatron_amp_O2: keep weights in `precision` rather than in float32.
        precision: of the computation: 32, bf16 or 16.
    """

    gpt_model_file: str
    adapter_file: str | None = None
    model_name: str | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, PORT] = 8000
    api_key: str | None = field(default=None, repr=False)
    insecure: bool = False
    allowed_hosts: tuple[str, ...] | None = None
    early_exit: ExitOptions = field(default_factory=ExitOptions)
    prices_file: str | None = None
    weights: Annotated[str, choice(*WEIGHT_KINDS)] = "native"
    output_layer: Annotated[str, choice(*OUTPUT_LAYERS)] = "exact8"
    add_BOS: bool | None = None
    slots: Positive = 8
    context_length: Positive | None = None
    max_choices: Positive = 8
    prefill_tokens: Positive = 2048
    queue_size: Positive = 64
    max_body_bytes: Positive = 1_048_576
    receive_timeout_s: Annotated[float, _above_0("use e.g. 20")] = 20.0
    request_timeout_s: Annotated[float, _above_0("use e.g. 300")] = 300.0
    shutdown_grace_s: Annotated[float, GRACE] = 10.0
    tensor_model_parallel_size: Annotated[int, ONE_PROCESS] = 1
    megatron_amp_O2: bool = False
    precision: str | int = 32

    @classmethod
    def from_dict(cls, values: Mapping) -> "ServerConfig":
        """See `Settings`; no message shows the key, which may come from the environment."""
        key = values.get("api_key")
        if key is None:
            key = os.environ.get(KEY_VARIABLE)
        elif not isinstance(key, str):
            key = ""  # of another type; the fault of that shows no value
        return super().from_dict({**values, "api_key": key})

    def faults(self) -> list[Fault]:
        """See `Settings`."""
        faults = []
        if self.allowed_hosts == ():
            remedy = """name some, 'allowed_hosts=["*"]' for all, or allowed_hosts=null for those of host"""
            faults.append(Fault("allowed_hosts", [], "answers nobody", remedy))
        for name in self.allowed_hosts or ():
            if name not in (ALL_HOSTS, ADDRESSES) and not HOST_NAME.fullmatch(name):
                rule = (
                    f"{name} is no name as Host headers have it, less their port, so it would answer nobody"
                )
                remedy = """use e.g. 'allowed_hosts=["server.example","[::1]"]', or 'allowed_hosts=["*"]' for all"""
                faults.append(Fault("allowed_hosts", list(self.allowed_hosts or ()), rule, remedy))
        faults += _access_faults(self)
        if self.queue_size < self.max_choices:
            rule = f"a request may have max_choices={self.max_choices} sequences, which must fit in the queue"
            faults.append(Fault("queue_size", self.queue_size, rule, f"use {self.max_choices} or more"))
        return faults

    def positions(self, limit: int) -> int:
        """`context_length`, of a model with so many positions."""
        return self.context_length or min(limit, USUAL_LENGTH)

    @property
    def base_name(self) -> str:
        """The model that exits belong to."""
        return Path(self.gpt_model_file).stem

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.model_name or Path(self.adapter_file or self.gpt_model_file).stem

    @property
    def answered_hosts(self) -> tuple[str, ...]:
        """Names in `Host` headers that are answered; also `ALL_HOSTS`, `ADDRESSES`."""
        if self.allowed_hosts is not None:
            return self.allowed_hosts
        if is_loopback(self.host):
            return (*LOOPBACK_NAMES, self.host)
        return (
            (ADDRESSES, *LOOPBACK_NAMES, self.host, socket.gethostname())
            if self.api_key is None
            else (ALL_HOSTS,)
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _access_faults(config: ServerConfig) -> list[Fault]:
    """Who may ask; no message shows the key."""
    faults = []
    if config.api_key is not None and not KEY.fullmatch(config.api_key):
        rule = "must be a text of visible ASCII characters, at least one, without spaces"
        remedy = f"export {KEY_VARIABLE}=$(openssl rand -hex 32), or unset {KEY_VARIABLE} for none"
        faults.append(Fault("api_key", "(not shown)", rule, remedy))
    if config.insecure and config.api_key is not None:
        rule = "means that nobody is asked for a key, and there is one"
        faults.append(
            Fault("insecure", True, rule, f"use insecure=false, or unset {KEY_VARIABLE} and api_key=null")
        )
    if not config.insecure and config.api_key is None and not is_loopback(config.host):
        rule = "others reach this server, and it has no api_key to ask them for"
        remedy = f"export {KEY_VARIABLE}=$(openssl rand -hex 32) first, or insecure=true to answer everybody"
        faults.append(Fault("host", config.host, rule, remedy))
    return faults
