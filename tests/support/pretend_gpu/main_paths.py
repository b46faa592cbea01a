# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What is run on the CPU and on a pretend GPU, to be compared: the same functions, by ranks of either pool.

All results are the host's. Weights depend on names alone, so both start from the same model.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.support import pretraining, tuning
from tests.support.drafting import drafting_eagerly
from tests.support.pretend_gpu import waits
from tests.support.pretend_gpu.waits import Wait
from tests.support.tiny_gpt import HEADS, fill, tiny_model, tiny_model_config
from tests.unit import test_exit_init

TEXTS = ["w1 w2 w3", "w9 w10 w11 w12 w13 w14 w15", "w40"]
LENGTH = dict(max_length=16, min_length=4)
GREEDY = dict(use_greedy=True, add_BOS=False)
REQUESTS: dict[str, tuple[dict, Any]] = {
    "exits": (GREEDY, dict(threshold=[0.6, 0.5, 0.7], always=True)),
    "lossless": (GREEDY, dict(threshold=0.3, lossless=True)),
    "full depth": (GREEDY, False),
    "sampled": (
        dict(use_greedy=False, add_BOS=False, temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.2),
        dict(threshold=0.5, always=True),
    ),
    "sampled, lossless": (dict(use_greedy=False, add_BOS=False), dict(threshold=0.3, lossless=True)),
    "probabilities": ({**GREEDY, "all_probs": True}, dict(threshold=0.5, always=True)),
    "log-probabilities": (
        {**GREEDY, "logprobs": 3, "prompt_logprobs": 1},
        dict(threshold=0.5, always=True),
    ),
}
"""Sampling parameters and `early_exit` of calls of `model.generate`."""


def on_host(value: Any) -> Any:
    """The same with all tensors on the host."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: on_host(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(each) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: on_host(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def tiny(head: str, **overrides: Any) -> Any:
    """The tiny model with exits of one kind; embeddings are tied where the exits are."""
    tied = HEADS[head]["projection"] == "tied"
    config = tiny_model_config(head=HEADS[head], share_embeddings_and_output_weights=tied, **overrides)
    model = tiny_model(config)
    return model.cuda() if torch.cuda.is_available() else model


def generated(heads: list[str]) -> dict[str, dict[str, Any]]:
    """Head -> request -> what `model.generate` returned."""
    return {head: answers(tiny(head)) for head in heads}


def answers(model: Any) -> dict[str, Any]:
    """Request -> what `model.generate` returned: for all texts at once, and for one."""
    found = {}
    for name, (sampling, early_exit) in REQUESTS.items():
        for several, texts in (("batch", TEXTS), ("one", TEXTS[1:2])):
            generator = torch.Generator().manual_seed(3)
            with drafting_eagerly():  # no policy would draft with a model as small as this one
                found[f"{name}, {several}"] = model.generate(
                    texts, LENGTH, sampling, early_exit=early_exit, generator=generator
                )
    return on_host(found)


@dataclass
class Decoding:
    """What happened while a session decoded.

    Attributes:
        exits_asked: calls of an exit's head.
        steps: tokens fed, prompts among them, and verifications: what may wait once.
        waits: in the session.
        replays: of graphs.
        drafts: that were made.
    """

    exits_asked: int = 0
    steps: int = 0
    waits: list[Wait] = field(default_factory=list)
    replays: int = 0
    drafts: int = 0


def decoding_waits(heads: list[str], graphs: bool) -> dict[str, dict[str, Decoding]]:
    """Head -> request -> waits in decoding."""
    found = {}
    for head in heads:
        model = tiny(head)
        model.prepare_decoding(cuda_graphs=graphs)
        found[head] = {}
        for name, (sampling, early_exit) in REQUESTS.items():
            if name == "log-probabilities":  # which wait for each token that asks
                continue
            for several, texts in (("batch", TEXTS), ("one", TEXTS[1:2])):
                generator = torch.Generator().manual_seed(3)
                with drafting_eagerly(), _watched() as seen:
                    output = model.generate(
                        texts, LENGTH, sampling, early_exit=early_exit, generator=generator
                    )
                seen.drafts = sum(each["drafts"] for each in output["early_exit"])
                found[head][f"{name}, {several}"] = seen
    return found


@contextmanager
def _watched() -> Iterator[Decoding]:
    from nemo_ee.decoding.decoder import EarlyExitDecoder
    from nemo_ee.decoding.exit_point import ExitPoint
    from nemo_ee.decoding.session import DecodingSession

    seen = Decoding()

    def counted(original: Callable, counter: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            setattr(seen, counter, getattr(seen, counter) + 1)
            return original(*args, **kwargs)

        return call

    def watched(original: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with waits.counting() as found:
                result = original(*args, **kwargs)
            seen.waits += found
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("first_step", "step", "flush"):
            patch.setattr(EarlyExitDecoder, name, counted(getattr(EarlyExitDecoder, name), "steps"))
        patch.setattr(ExitPoint, "predict", counted(ExitPoint.predict, "exits_asked"))
        for name in ("add", "step"):
            patch.setattr(DecodingSession, name, watched(getattr(DecodingSession, name)))
        before = torch.cuda.CUDAGraph.replays
        yield seen
        seen.replays = torch.cuda.CUDAGraph.replays - before


def training_waits(
    prefixes: dict, cases: dict[str, Any], layout: tuning.Layout
) -> dict[str, list[list[str]]]:
    """Case -> step -> what waits between its first forward and its last backward."""
    found = {}
    for name, case in cases.items():
        trainer = tuning.tuning_trainer(layout, 2, limit_val_batches=0)
        if isinstance(case, tuning.Case):
            kind, config = tuning.recorder(), tuning.tuning_config(prefixes, case, layout)
        else:
            kind, config = pretraining.Recorder(), pretraining.pretraining_config(prefixes, case, layout)
        model = waits.of_steps(kind)(config, trainer)
        fill(model)
        model.first_weights.complete, model.keep_gradients = True, False
        trainer.fit(model)
        found[name] = model.waits
    return found


def closed_form_waits(head: dict) -> list[Wait]:
    """What waits while the closed form, and then its quality on other text, read micro-batches."""
    from nemo_ee.modeling.first_weights.exit_init import RidgeInitialiser, initialise_projections
    from nemo_ee.modeling.first_weights.fit_quality import HeldOutFit
    from nemo_ee.training.tuning_step import run_backbone

    gpt = test_exit_init.build(head)
    initialise_projections(gpt, torch.arange(0, 200, 4), None)
    for each in gpt.exits.values():
        each.reset_for_fit()
    made = test_exit_init.micro_batches()
    batches = [
        dataclasses.replace(
            one, **{name: part.cuda() for name, part in vars(one).items() if part is not None}
        )
        for one in made
    ]
    found = []
    for reader in (RidgeInitialiser(gpt), HeldOutFit(gpt)):
        with waits.counting() as seen:
            run_backbone(gpt, iter(batches), len(batches), True, reader)
        if isinstance(reader, RidgeInitialiser):
            reader.finish(test_exit_init.PENALTY)
        found += seen
    return found


def tuned(*args: Any) -> dict[str, tuning.Outcome]:
    """`tests.support.tuning.tune` in float32."""
    return on_host(tuning.tune(*args, torch.float32))


def pretrained(*args: Any, dtype: torch.dtype = torch.float32) -> dict[str, pretraining.Outcome]:
    """`tests.support.pretraining.pretrain` with parameters of a type."""
    return on_host(pretraining.pretrain(*args, False, dtype))


def pretrained_with_main_params(prefixes: dict, case: Any, layout: tuning.Layout) -> tuple[list[float], bool]:
    """Losses with bfloat16 weights and NeMo's own optimizer of their float32 copies, and whether it reduces gradients
    while the backward pass goes on."""
    from nemo.collections.nlp.parts.nlp_overrides import MegatronHalfPrecisionPlugin

    device = "cuda" if torch.cuda.is_available() else "cpu"
    plugin = MegatronHalfPrecisionPlugin("bf16-mixed", device=device)
    trainer = tuning.tuning_trainer(layout, case.steps, limit_val_batches=0, precision=None, plugins=[plugin])
    model = pretraining.Recorder()(pretraining.pretraining_config(prefixes, case, layout), trainer)
    fill(model)
    model.first_weights.complete, model.keep_gradients = True, False
    trainer.fit(model)
    return model.seen_losses, model.optimizers(use_pl_optimizer=False).async_master_grads_allreudce


def served(directory: str) -> dict[str, tuple[list[str], list[list[int]]]]:
    """Client -> texts and exit layers of what a server answered to two clients that asked at once."""
    import httpx
    from omegaconf import OmegaConf

    from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder
    from nemo_ee.running.restore import restore_model
    from nemo_ee.server.serve import create_service
    from tests.support.server import listening, server_config

    trainer = dict(devices=1, num_nodes=1, accelerator="auto", precision=32, logger=False)
    settings = dict(trainer=dict(trainer, enable_checkpointing=False), model=dict(precision=32))
    builder = EarlyExitTrainerBuilder(OmegaConf.create(settings))
    trainer = builder.create_trainer()
    files = f"{directory}/base.nemo", f"{directory}/exits.nemo"
    model = restore_model(*files, trainer, {"precision": trainer.precision})
    service = create_service(server_config(model_name="tiny"), model)
    found, together = {}, threading.Barrier(2)

    def client(name: str, prompts: list[str], temperature: float) -> None:
        body = dict(model="tiny", prompt=prompts, max_tokens=12, temperature=temperature, seed=5)
        body["early_exit"] = dict(threshold=0.5, always=True)
        together.wait()
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        found[name] = [c["text"] for c in choices], [c["early_exit"]["exit_layers"] for c in choices]

    try:
        with listening(service) as url:
            clients = [("greedy", TEXTS, 0), ("sampling", TEXTS[:2], 1)]
            with ThreadPoolExecutor(len(clients)) as pool:
                for done in [pool.submit(client, *each) for each in clients]:
                    done.result()
    finally:
        service.engine.stop()
    return found
