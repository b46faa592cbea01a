# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Who may ask a server: keys, names of hosts, and what is refused before it starts."""

import logging
import socket

import httpx
import openai
import pytest

from nemo_ee.errors import ConfigError
from nemo_ee.server.requests.api_key import OPEN_PATHS
from nemo_ee.server.settings import KEY_VARIABLE, ServerConfig
from tests.support.fake_session import FakeSession
from tests.support.server import fake_service, listening, server_config

KEY = "sk-Zq9_~!-0123456789abcdef"
BEYOND = ("0.0.0.0", "::", "", "192.0.2.1", "example.org", "::ffff:127.0.0.1")


@pytest.fixture(autouse=True)
def _no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def url():
    with listening(fake_service(FakeSession(), api_key=KEY)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, timeout=10) as client:
        yield client


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def refusal(answer):
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert KEY not in answer.text
    return error["message"]


ASKING = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/metrics"),
    ("GET", "/nowhere"),
    ("GET", "/health/"),
    ("GET", "/health/../v1/models"),
    ("OPTIONS", "/v1/models"),
]


@pytest.mark.parametrize("method, path", ASKING)
def test_every_endpoint_but_the_open_ones_asks_for_the_key(client, method, path):
    assert "asks for an API key" in refusal(client.request(method, path))
    assert client.request(method, path, headers=bearer(KEY)).status_code != 401


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_the_open_ones_do_not(client, path):
    assert client.get(path).status_code == 200
    assert client.get(path, headers=bearer("wrong")).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        "Bearer",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}0",
        f"Bearer {KEY.upper()}",
        f"Bearer {KEY} {KEY}",
        f"Bearer {KEY},",
        f'Bearer "{KEY}"',
        f"Basic {KEY}",
        KEY,
        "Bearer \u00e9",
        b"Bearer \xff\xfe",
    ],
    ids=repr,
)
def test_other_keys_are_wrong(client, header):
    header = header if isinstance(header, bytes) else header.encode()
    assert "key is wrong" in refusal(client.get("/v1/models", headers=[(b"Authorization", header)]))


def test_two_keys_are_none(client):
    headers = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer other")]
    assert "key is wrong" in refusal(client.get("/v1/models", headers=headers))


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER   "])
def test_the_scheme_is_written_as_one_likes(client, scheme):
    assert client.get("/v1/models", headers={"Authorization": f"{scheme}{KEY}"}).status_code == 200


def test_the_refusal_does_not_wait_for_the_body(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(4096).startswith(b"HTTP/1.1 401")


def test_openais_client_has_the_key(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        assert client.models.list().data[0].id == "tiny"
        text = client.completions.create(model="tiny", prompt="w1", max_tokens=2).choices[0].text
        stream = client.completions.create(model="tiny", prompt="w1", max_tokens=2, stream=True)
        assert text and "".join(chunk.choices[0].text for chunk in stream) == text
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
            client.models.list()


def test_hosts_are_checked_before_keys(client):
    headers = {**bearer(KEY), "Host": "evil.example"}
    assert client.get("/v1/models", headers=headers).status_code == 403


def config(**settings):
    return ServerConfig.from_dict({"gpt_model_file": "tiny.nemo", **settings})


@pytest.mark.parametrize("host", BEYOND)
def test_beyond_loopback_a_key_is_needed_or_the_word_that_none_is(host):
    with pytest.raises(ConfigError) as caught:
        config(host=host)
    assert f"host={host}: others reach this server" in str(caught.value)
    assert "insecure=true" in str(caught.value) and KEY_VARIABLE in str(caught.value)
    assert config(host=host, insecure=True).api_key is None
    assert config(host=host, api_key=KEY).api_key == KEY


def test_on_loopback_a_key_is_for_those_who_want_one(monkeypatch):
    assert config().api_key is None
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert config().api_key == config(host="0.0.0.0").api_key == KEY
    assert config(api_key="other").api_key == "other", "the configuration goes first"


@pytest.mark.parametrize(
    "key",
    ["", " ", f" {KEY}", f"{KEY}\n", "two words", "clé", "\x7f", "\ud800", 1234567, 1.5, True, [KEY]],
    ids=repr,
)
def test_keys_that_cannot_be_sent_are_refused_and_not_shown(key, monkeypatch):
    with pytest.raises(ConfigError) as caught:
        config(api_key=key)
    assert "api_key=(not shown): must be a text of visible ASCII characters" in str(caught.value)
    assert not str(key).strip() or str(key) not in str(caught.value)


@pytest.mark.parametrize("key", ["", " ", "two words"])
def test_an_empty_key_of_the_environment_is_not_none(key, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ConfigError, match=r"api_key=\(not shown\)"):
        config()


def test_insecure_and_a_key_contradict_each_other(monkeypatch):
    with pytest.raises(
        ConfigError, match="insecure=true: means that nobody is asked for a key, and there is one"
    ):
        config(insecure=True, api_key=KEY)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with pytest.raises(ConfigError, match=f"unset {KEY_VARIABLE}"):
        config(insecure=True, host="0.0.0.0")


def test_the_key_is_not_shown(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    given = server_config(api_key=KEY)
    assert KEY not in repr(given) + str(given)
    with listening(fake_service(FakeSession(), api_key=KEY)) as url:
        assert httpx.get(f"{url}/v1/models", headers=bearer(KEY)).status_code == 200
        assert KEY not in httpx.get(f"{url}/openapi.json").text + httpx.get(url).text
        assert KEY not in httpx.get(f"{url}/metrics", headers=bearer(KEY)).text
    out, err = capfd.readouterr()
    assert KEY not in out + err
    assert KEY not in "".join(
        record.getMessage() for record in caplog.records if record.name != "httpcore.http11"
    )


def test_which_names_are_answered(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "Box-7")
    wide = dict(host="0.0.0.0")
    assert "localhost" in config().answered_hosts and "*" not in config().answered_hosts
    assert config(**wide, api_key=KEY).answered_hosts == ("*",)
    assert "*" not in config(**wide, insecure=True).answered_hosts
    assert config(**wide, insecure=True, allowed_hosts=["a.example"]).answered_hosts == ("a.example",)
    given = config(**wide, insecure=True, allowed_hosts=None)
    service = fake_service(FakeSession(), allowed_hosts=list(given.answered_hosts))
    with listening(service) as url:
        for host, status in (
            ("192.0.2.7:8000", 200),
            ("[2001:db8::1]:8000", 200),
            ("localhost", 200),
            ("box-7:8000", 200),
            ("evil.example", 403),
            ("1.2.3.4.evil.example", 403),
            ("127.0.0.1.nip.io:8000", 403),
            ("", 403),
        ):
            assert httpx.get(f"{url}/health", headers={"host": host}).status_code == status, host
