# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The server's settings, their defaults, and what is wrong before any model is built."""

import dataclasses
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from nemo_ee.decoding.request import ExitOptions
from nemo_ee.errors import ConfigError
from nemo_ee.generation.text import TextTokenizer
from nemo_ee.server.serve import check_address, create_service
from nemo_ee.server.settings import ServerConfig, is_loopback
from tests.support.server import server_config


@pytest.mark.parametrize("bos", [None, -1])
def test_a_tokenizer_without_bos_is_refused(bos):
    model = SimpleNamespace(text_tokenizer=TextTokenizer(SimpleNamespace(bos_id=bos)))
    with pytest.raises(ConfigError, match="add_BOS=true: the tokenizer has no BOS token"):
        create_service(server_config(add_BOS=True), model)


@pytest.mark.parametrize(
    "settings, fault",
    [
        (dict(slots=0), "slots=0: must be positive"),
        (dict(port=70000), "port=70000"),
        (dict(request_timeout_s=0), "request_timeout_s=0.0"),
        (dict(receive_timeout_s=0), "receive_timeout_s=0.0: must be positive; use e.g. 20"),
        (dict(shutdown_grace_s=-1), "shutdown_grace_s=-1.0"),
        (dict(queue_size=3, max_choices=4), "queue_size=3: a request may have max_choices=4"),
        (dict(tensor_model_parallel_size=2), "megatron_gpt_ee_generate.py"),
        (dict(weights="int4"), "weights=int4: not one of native"),
        (dict(allowed_hosts=[]), "allowed_hosts=[]: answers nobody"),
        (dict(allowed_hosts=["a", "b.example:8000"]), "b.example:8000 is no name as Host headers have it"),
        (dict(allowed_hosts=["https://b.example"]), "https://b.example is no name"),
        (dict(allowed_hosts=["*.example"]), "*.example is no name"),
        (dict(allowed_hosts=["::1"]), "::1 is no name"),
        (dict(slotz=3), "did you mean slots"),
        (dict(gpt_model_file="???"), "gpt_model_file=null: is required"),
    ],
    ids=str,
)
def test_settings_that_break_a_rule(settings, fault):
    with pytest.raises(ConfigError) as caught:
        server_config(**settings)
    assert fault in str(caught.value)


def test_names_of_models_and_addresses():
    def config(**settings):
        return ServerConfig.from_dict({"gpt_model_file": "dir/tiny.nemo", **settings})

    assert is_loopback("::1") and is_loopback("127.3.2.1") and not is_loopback("example.org")
    assert config().served_name == "tiny" and config(adapter_file="a/exits.nemo").served_name == "exits"


def test_the_yaml_has_every_setting_with_its_default():
    path = Path(__file__).parents[2] / "conf" / "megatron_gpt_ee_server.yaml"
    values = OmegaConf.to_container(OmegaConf.load(path))
    for section in ("defaults", "hydra", "trainer"):
        del values[section]
    assert set(values) == {field.name for field in dataclasses.fields(ServerConfig)} - {"precision"}
    assert set(values["early_exit"]) == {field.name for field in dataclasses.fields(ExitOptions)}
    assert ServerConfig.from_dict({**values, "gpt_model_file": "x"}) == ServerConfig("x")


def test_an_address_that_cannot_be_listened_at():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"host:port=127.0.0.1:{port}: the server cannot listen there"):
            check_address("127.0.0.1", port)
    check_address("127.0.0.1", port)
    check_address("127.0.0.1", 0)
    with pytest.raises(ConfigError, match="host:port=192.0.2.1:0"):
        check_address("192.0.2.1", 0)
