# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The settings of the server, read once from `conf/megatron_gpt_ee_server.yaml` and its overrides."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nemo_ee.errors import Fault
from nemo_ee.inference.request import ExitOptions
from nemo_ee.megatron.lean_weights import WEIGHT_KINDS
from nemo_ee.schema import one_of, read_settings

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
AT_LEAST_ONE = (
    "slots",
    "max_prompt_tokens",
    "max_tokens",
    "max_choices",
    "prefill_tokens",
    "queue_size",
    "max_body_bytes",
)


@dataclass(frozen=True)
class ServerConfig:
    """A server.

    Attributes:
        gpt_model_file: the base, or a model merged with its exits, a `.nemo`.
        adapter_file: the exits alone; null if they are part of the model.
        model_name: what clients call the model; null for the name of the exits' file, or of the model's.
        host: address to listen at.
        port: 0 takes a free one.
        allowed_hosts: names in `Host` headers that are answered, `*` for all; null for `localhost` and its
            addresses where `host` is one of these, and for all elsewhere.
        early_exit: when tokens may leave, for requests that do not say; confidence and kv_policy are those of
            all requests.
        weights: how decoding holds weights, see `nemo_ee.megatron.lean_weights`.
        add_BOS: put the tokenizer's BOS before each prompt that is a text, or not; null for the model's rule.
        slots: sequences that decode together.
        max_prompt_tokens: of one prompt.
        max_tokens: to generate per choice.
        max_choices: prompts times `n` of one request.
        prefill_tokens: prompt tokens that join between two steps, at most; a longer prompt joins alone.
        queue_size: sequences that wait for a slot, at most.
        max_body_bytes: of one request.
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
    port: int = 8000
    allowed_hosts: tuple[str, ...] | None = None
    early_exit: ExitOptions = field(default_factory=ExitOptions)
    weights: str = "native"
    add_BOS: bool | None = None
    slots: int = 8
    max_prompt_tokens: int = 1024
    max_tokens: int = 512
    max_choices: int = 8
    prefill_tokens: int = 2048
    queue_size: int = 64
    max_body_bytes: int = 1_048_576
    request_timeout_s: float = 300.0
    shutdown_grace_s: float = 10.0
    tensor_model_parallel_size: int = 1
    megatron_amp_O2: bool = False
    precision: str | int = 32

    @classmethod
    def from_dict(cls, values: Mapping) -> "ServerConfig":
        """Checks plain values (as from YAML) and builds the configuration.

        Raises:
            ConfigError: listing every unknown key, missing value and value that breaks its rule.
        """
        return read_settings(cls, values, _faults)

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.model_name or Path(self.adapter_file or self.gpt_model_file).stem

    @property
    def answered_hosts(self) -> tuple[str, ...]:
        """Names in `Host` headers that are answered; `*` stands for all."""
        if self.allowed_hosts is not None:
            return self.allowed_hosts
        return (*LOOPBACK_NAMES, self.host) if is_loopback(self.host) else ("*",)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _faults(config: ServerConfig) -> list[Fault]:
    faults = [
        Fault(name, getattr(config, name), "must be positive", "use 1 or more")
        for name in AT_LEAST_ONE
        if getattr(config, name) < 1
    ]
    if config.weights not in WEIGHT_KINDS:
        faults.append(one_of("weights", config.weights, WEIGHT_KINDS))
    if not 0 <= config.port < 2**16:
        faults.append(
            Fault("port", config.port, "lies within 0 to 65535", "use e.g. 8000; 0 takes a free one")
        )
    if config.allowed_hosts == ():
        remedy = 'name some, ["*"] for all, or null for those of host'
        faults.append(Fault("allowed_hosts", [], "answers nobody", remedy))
    if config.request_timeout_s <= 0:
        faults.append(
            Fault("request_timeout_s", config.request_timeout_s, "must be positive", "use e.g. 300")
        )
    if config.shutdown_grace_s < 0:
        faults.append(Fault("shutdown_grace_s", config.shutdown_grace_s, "must be 0 or more", "use e.g. 10"))
    if config.queue_size < config.max_choices:
        rule = f"a request may have max_choices={config.max_choices} sequences, which must fit in the queue"
        faults.append(Fault("queue_size", config.queue_size, rule, f"use {config.max_choices} or more"))
    if config.tensor_model_parallel_size != 1:
        rule = "the server runs the model in one process"
        remedy = "set it to 1; scripts/megatron_gpt_ee_generate.py generates over several processes"
        faults.append(Fault("tensor_model_parallel_size", config.tensor_model_parallel_size, rule, remedy))
    return faults
