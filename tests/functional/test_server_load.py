# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Many clients at once, some of whom hang up or send nonsense: answers stay those of a request alone.

The tiny model computes in float64, so that no batch rounds a token to another one.
"""

import io
import json
import logging
import os
import statistics
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HEAD = dict(block=True, mlp=True, linear=True, projection="shortlist", shortlist_size=100)
MODES = {
    "usual": None,
    "eager": {"threshold": 0.3, "always": True},
    "one exit": {"threshold": 0.6, "exits": [4], "always": True},
    "full depth": False,
    "lossless": {"threshold": 0.3, "lossless": True},
}
SETTINGS = dict(
    gpt_model_file="tiny.nemo",
    port=0,
    slots=8,
    context_length=64,
    queue_size=48,
    early_exit={"threshold": 0.5, "always": True},
)
FLAT_MIB = 24
"""How much memory may grow in the second half of the time."""
SAMPLE_SECONDS = 0.5


def cases(model):
    """Requests, with the text and exit layers that `model.generate` gives them alone."""
    from nemo_ee.server.served_model import SharedTokenizer

    tokenizer, made = SharedTokenizer(model.text_tokenizer), []
    for n in range(6):
        prompt, limit = " ".join(f"w{(7 * n + 3 * i) % 190}" for i in range(1 + 6 * n)), 6 + 3 * n
        for name, mode in MODES.items():
            options = mode if mode is not None else SETTINGS["early_exit"]
            output = model.generate([prompt], dict(max_length=limit), dict(add_BOS=False), early_exit=options)
            ids, layers = output["token_ids"][0], output["early_exit"][0]["exit_layers"]
            before = ids[: len(ids) - len(layers)]
            request = {
                "model": "tiny",
                "prompt": prompt,
                "max_tokens": limit,
                "temperature": 0,
                "early_exit": mode,
            }
            text = tokenizer.decode(ids)[len(tokenizer.decode(before)) :]
            # which exit drafts a token depends on how many tokens a round of the batch drafts
            made.append(
                {"request": request, "text": text, "exit_layers": None if name == "lossless" else layers}
            )
    return made


def serve(clients, seconds):
    """A server in this process, clients in another.

    Returns:
        What they saw, this process's memory in MiB over time, the engine's failures, and metrics.
    """
    from nemo_ee.server.serve import Server, create_service
    from nemo_ee.server.settings import ServerConfig
    from tests.support.drafting import drafting_eagerly
    from tests.support.server import until
    from tests.support.tiny_gpt import tiny_model, tiny_model_config

    model = tiny_model(
        tiny_model_config(head=HEAD, share_embeddings_and_output_weights=False), dtype=torch.float64
    )
    model.prepare_decoding()  # as the server does
    requests = cases(model)
    eager = drafting_eagerly()
    eager.start()  # a tiny model would never draft by itself
    service = create_service(ServerConfig.from_dict(SETTINGS), model)
    server, done, memory, failures = Server(service), threading.Event(), [], []
    log = logging.StreamHandler(io.StringIO())
    log.emit = lambda record: failures.append(log.format(record))
    logging.getLogger("nemo_ee.server").addHandler(log)
    serving = threading.Thread(target=server.run)
    serving.start()

    def measure():
        while not done.wait(SAMPLE_SECONDS):
            memory.append(psutil.Process().memory_info().rss / 2**20)

    measuring = threading.Thread(target=measure)
    try:
        until(lambda: server.started)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        task = {"url": url, "clients": clients, "seconds": seconds, "seed": 1, "cases": requests}
        Path("task.json").write_text(json.dumps(task))
        measuring.start()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.support.load_clients", "task.json"]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds + 180
        )
        assert result.returncode == 0, result.stderr[-3000:]
        engine = service.engine
        until(lambda: engine.running == engine.waiting == 0)
    finally:
        done.set()
        server.should_exit = True
        serving.join(60)
        eager.stop()
    assert not serving.is_alive(), "the server ends"
    return json.loads(result.stdout), memory, failures, service.metrics.text().decode()


def value(metrics, name):
    """Of a sample, as Prometheus would read it."""
    return float(next(line.split()[-1] for line in metrics.splitlines() if line.startswith(name)))


def expect(seen, failures, metrics, least):
    """Every answer was right, and each kind of client came at least so many times."""
    assert failures == [] and seen["wrong"] == []
    counts = seen["counts"]
    assert min(counts.get(kind, 0) for kind in ("whole", "stream", "hung up", "malformed")) >= least, counts
    answered = value(metrics, 'nemo_ee_requests_total{endpoint="/v1/completions",outcome="ok"}')
    assert answered >= counts["whole"] + counts["stream"]
    assert (
        value(metrics, 'nemo_ee_requests_total{endpoint="/v1/completions",outcome="invalid"}')
        == counts["malformed"]
    )
    assert value(metrics, 'nemo_ee_requests_total{endpoint="/v1/completions",outcome="cancelled"}') > 0
    assert value(metrics, 'nemo_ee_drafts_total{result="rejected"}') > 0


def test_many_clients_get_what_they_get_alone(workers):
    ((seen, _, failures, metrics),) = workers(1).run(serve, 24, 8)
    expect(seen, failures, metrics, least=3)


@pytest.mark.slow
def test_200_clients_for_a_minute(workers):
    """More than may run and wait."""
    ((seen, _, failures, metrics),) = workers(1).run(serve, 200, 60, timeout=600)
    print(seen["counts"])
    expect(seen, failures, metrics, least=100)
    assert seen["counts"]["queue full"] > 0


@pytest.mark.slow
def test_64_clients_for_five_minutes(workers):
    ((seen, memory, failures, metrics),) = workers(1).run(serve, 64, 300, timeout=900)
    quarter = len(memory) // 4
    early, late = statistics.median(memory[quarter : 2 * quarter]), statistics.median(memory[-quarter:])
    print(f"{seen['counts']}; memory {early:.0f} MiB in the second quarter, {late:.0f} MiB in the last")
    expect(seen, failures, metrics, least=200)
    assert late - early < FLAT_MIB, memory
