# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A published Hugging Face folder as the reference, and the same model converted, restored and served."""

import json
from contextlib import contextmanager

import httpx
import torch
from omegaconf import OmegaConf

from tests.support.tiny_gpt import tiny_trainer

STEPS = 24
EXITS = {"layers": [2], "init": "copy", "head": {"projection": "tied", "mlp": False}}


def restored(path, exits=EXITS, **changes):
    from nemo_ee.checkpoint import archive
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel

    settings = OmegaConf.merge(archive.read_config(path), {"early_exit": exits, "precision": 32, **changes})
    trainer = tiny_trainer()
    return MegatronGPTEarlyExitModel.restore_from(
        str(path), override_config_path=settings, trainer=trainer
    ).eval()


class Published:
    """A Hugging Face folder, and what transformers makes of it."""

    def __init__(self, folder):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.folder = folder
        self.network = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, prompt):
        if isinstance(prompt, str):
            return self.tokenizer(prompt).input_ids
        return self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True)

    @torch.no_grad()
    def generate(self, prompt, **settings):
        """The new token ids; rows without a token may be among them."""
        ids = torch.tensor([self.ids(prompt)])
        given = dict(do_sample=False, max_new_tokens=STEPS, pad_token_id=0)
        output = self.network.generate(ids, attention_mask=torch.ones_like(ids), **{**given, **settings})
        return output[0, ids.shape[1] :].tolist()

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@contextmanager
def batches_of_one():
    """Converted models have batches of 1, and Megatron remembers those of the first model in a process."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from nemo_ee.models.generation_mixin import kept_microbatches

    with kept_microbatches():
        destroy_num_microbatches_calculator()
        yield


def convert(folder, path):
    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

    convert_to_nemo(str(folder), str(path))
    return path


@contextmanager
def client(model, **settings):
    from nemo_ee.server.serve import create_service
    from tests.support.server import listening, server_config

    service = create_service(server_config(**{"context_length": 64, **settings}), model)
    try:
        with listening(service) as url, httpx.Client(base_url=url, timeout=60) as http:
            yield http
    finally:
        service.engine.stop()


def answers(http, prompt, **fields):
    """Text and reason of an answer, at once and as a stream."""
    chat = not isinstance(prompt, str)
    path, name = ("/v1/chat/completions", "messages") if chat else ("/v1/completions", "prompt")
    body = {
        "model": "tiny",
        "temperature": 0,
        "early_exit": False,
        "max_tokens": STEPS,
        name: prompt,
        **fields,
    }
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    yield choice["message"]["content"] if chat else choice["text"], choice["finish_reason"]
    events = http.post(path, json={**body, "stream": True}).text.split("\n\n")[:-2]
    parts = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    texts = [part["delta"].get("content", "") if chat else part["text"] for part in parts]
    yield "".join(texts), parts[-1]["finish_reason"]
