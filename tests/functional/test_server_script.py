# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""scripts/megatron_gpt_ee_server.py with a tiny model, asked by OpenAI's own client; its end by a signal."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import httpx
import openai
import pytest

from tests.functional.test_generate_script import HEAD, ROOT

PROMPTS = ["w1 w2 w3", "w9 w10 w11 w12 w13", "w40"]
EXITS = {"threshold": 0.5, "exits": [2, 6], "always": True}
TOKENS = 12
SETTINGS = [
    "gpt_model_file=full.nemo",
    "port=0",
    "slots=4",
    "context_length=64",
    "model_name=tiny",
    "early_exit.threshold=0.6",
    "early_exit.always=true",
    "shutdown_grace_s=30",
]


def write_checkpoint(directory):
    """A full model; returns what it generates itself: with the server's exits, with `EXITS`, at full depth."""
    from tests.support.tiny_gpt import tiny_model, tiny_model_config

    model = tiny_model(tiny_model_config(head=HEAD, share_embeddings_and_output_weights=False))
    model.save_to(f"{directory}/full.nemo")
    model.prepare_decoding()  # as the server does

    def generated(prompts, early_exit):
        output = model.generate(prompts, dict(max_length=TOKENS), dict(add_BOS=False), early_exit=early_exit)
        return [
            (model.tokenizer.ids_to_tokens(ids[-len(row["exit_layers"]) :]), row["exit_layers"])
            for ids, row in zip(output["token_ids"], output["early_exit"], strict=True)
        ]

    chat = [[{"role": "user", "content": "w5 w6"}]]
    usual = dict(threshold=0.6, always=True)
    return (
        generated(PROMPTS, usual),
        generated(PROMPTS, EXITS),
        generated(PROMPTS, False),
        generated(chat, usual),
    )


class Script:
    """The server as a process; `url` is where it listens."""

    def __init__(self, directory, *overrides):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.support.eager_server", *SETTINGS, *overrides]
        self.process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        self._url = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._url.wait(300) and self.process.poll() is None, "".join(self.log)[-3000:]

    def _read(self):
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                self.url = found[1]
                self._url.set()
        self._url.set()


@pytest.fixture(scope="module")
def expected(tmp_path_factory, workers):
    directory = tmp_path_factory.mktemp("server")
    (results,) = workers(1).run(write_checkpoint, str(directory))
    return directory, *results


@pytest.fixture(scope="module")
def script(expected):
    server = Script(expected[0])
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def client(script):
    with openai.OpenAI(base_url=f"{script.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, **fields):
    return client.completions.create(model="tiny", temperature=0, max_tokens=TOKENS, **fields)


def expect(choice, generated):
    words, layers = generated
    assert choice.text.split() == [word for word in words if not word.startswith("<")]
    assert choice.early_exit["exit_layers"] == layers and "".join(choice.early_exit["tokens"]) == choice.text
    assert len(choice.early_exit["confidences"]) == len(layers)


def test_completions_of_several_prompts(client, expected):
    answer = complete(client, prompt=PROMPTS)
    for choice, generated in zip(answer.choices, expected[1], strict=True):
        expect(choice, generated)
    used = {layer for choice in answer.choices for layer in choice.early_exit["exit_layers"]}
    assert len(used) > 1, "exits are used"
    cost = answer.usage.early_exit
    assert 0 < cost["layers_run"] < cost["full_depth_layers"]


def test_exits_by_request(client, expected):
    for prompt, generated, full in zip(PROMPTS, expected[2], expected[3], strict=True):
        expect(complete(client, prompt=prompt, extra_body={"early_exit": EXITS}).choices[0], generated)
        expect(complete(client, prompt=prompt, extra_body={"early_exit": False}).choices[0], full)
        lossless = complete(
            client, prompt=prompt, extra_body={"early_exit": {"lossless": True, "threshold": 0.3}}
        )
        assert lossless.choices[0].text.split() == [word for word in full[0] if not word.startswith("<")]
        drafts = lossless.usage.early_exit
        assert drafts["drafts"] > 0 and drafts["drafts"] >= drafts["accepted"]


def test_a_streamed_completion(client, expected):
    stream = complete(client, prompt=PROMPTS[1], stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert "".join(c.choices[0].text for c in chunks).split() == expected[1][1][0]
    assert sum((c.choices[0].early_exit["exit_layers"] for c in chunks), []) == expected[1][1][1]
    assert len(chunks) > 1 and last.usage.completion_tokens == TOKENS


def test_chats(client, expected):
    words, layers = expected[4][0]
    fields = dict(model="tiny", messages=[{"role": "user", "content": "w5 w6"}], temperature=0)
    answer = client.chat.completions.create(**fields, max_completion_tokens=TOKENS)
    assert answer.choices[0].message.content.split() == words
    assert answer.choices[0].early_exit["exit_layers"] == layers
    chunks = list(client.chat.completions.create(**fields, max_tokens=TOKENS, stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks).split() == words


def test_sampling_is_repeatable_by_seed(client):
    def sampled(seed):
        fields = dict(prompt=PROMPTS[0], model="tiny", temperature=1.5, max_tokens=TOKENS, seed=seed, n=2)
        return [choice.text for choice in client.completions.create(**fields).choices]

    first = sampled(1)
    assert sampled(1) == first != sampled(2) and first[0] != first[1]


def test_errors_are_those_that_the_client_knows(client):
    with pytest.raises(openai.BadRequestError, match="65 tokens exceed the server's 64") as caught:
        client.completions.create(model="tiny", prompt="w1 " * 65, max_tokens=1)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError, match="logit_bias: not supported"):
        complete(client, prompt="w1", logit_bias={"5": 3})
    with pytest.raises(openai.NotFoundError, match="this server has tiny"):
        client.completions.create(model="other", prompt="w1")


def test_models_health_and_metrics(client, script):
    (model,) = client.models.list().data
    assert (
        model.id == "tiny" and model.early_exit["exits"] == [2, 4, 6] and model.early_exit["num_layers"] == 8
    )
    assert client.models.retrieve("tiny") == model
    assert httpx.get(f"{script.url}/health").json()["status"] == "ok"
    metrics = httpx.get(f"{script.url}/metrics").text
    assert re.search(r'nemo_ee_generated_tokens_total\{exit_layer="8"\} [1-9]', metrics)
    assert re.search(r'nemo_ee_drafts_total\{result="rejected"\} \d', metrics)


def messages_of(directory, overrides):
    """Of the script's checks, before any model is built, for each list of overrides."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from nemo_ee.errors import CheckpointError, ConfigError
    from nemo_ee.server.serve import check
    from nemo_ee.server.settings import ServerConfig

    def message(extra):
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            values = OmegaConf.to_container(compose("megatron_gpt_ee_server", SETTINGS + extra), resolve=True)
        trainer = values.pop("trainer")
        try:
            check(ServerConfig.from_dict({**values, "precision": trainer["precision"]}))
        except (CheckpointError, ConfigError) as error:
            return str(error)
        return None

    os.chdir(directory)
    return [message(extra) for extra in overrides]


def test_refused_before_the_model_is_built(expected, workers):
    faults = {
        "context_length=65": "context_length=65: exceeds the model's 64 positions; use context_length=64",
        "early_exit.exits=[5]": "not all of the model's exits",
        "gpt_model_file=none.nemo": "none.nemo",
        "tensor_model_parallel_size=2": "runs the model in one process",
        "host=0.0.0.0": "host=0.0.0.0: others reach this server, and it has no api_key to ask them for",
        "api_key=1234567": "api_key=(not shown): must be a text",
    }
    overrides = [[], *([text] for text in faults)]
    (messages,) = workers(1).run(messages_of, str(expected[0]), overrides)
    assert messages[0] is None
    for message, fault in zip(messages[1:], faults.values(), strict=True):
        assert fault in message


def test_sigterm_lets_requests_finish_and_ends_with_zero(script):
    """The last test: it ends the server of the others."""
    fields = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 32, "stream": True, "n": 8}
    with httpx.Client(base_url=script.url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=fields) as answer:
            lines = answer.iter_lines()
            next(lines)
            script.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        reasons = [part["finish_reason"] for line in rest[:-1] for part in json.loads(line[6:])["choices"]]
        assert len([reason for reason in reasons if reason]) == 8
    assert script.process.wait(60) == 0
    log = "".join(script.log)
    assert "Traceback" not in log and "POST" not in log, log[-3000:]
