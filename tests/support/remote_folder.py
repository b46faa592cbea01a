# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tiny models with exits as `.nemo` files and exported with their code; what they say themselves, for comparison."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_ee.errors import CheckpointError, ConfigError
from tests.support import tiny_gpt

HEADS = [
    *tiny_gpt.HEADS.values(),
    dict(mlp="beside", linear=True, projection="shortlist", shortlist_size=100),
    dict(norm=False, mlp="none", linear=False, projection="tied"),
]
EXITS = [1, 2, 3, 4, 5, 6, 7]
DEPTH = 8
PROMPT = list(range(7, 19))
STEPS = 40
NEVER = [1.0] * len(EXITS)
SHARES = (0.7, 0.6, 0.75, 0.8, 0.85, 0.9)
"""Of the tokens of a text, those that an exit with a threshold of its own does not let leave: the first with which all
exits are used."""
MOST = 0.999
"""Of such a threshold."""


@dataclass(frozen=True)
class Said:
    """What a model with exits says.

    Attributes:
        ids: [S] a text.
        logits: exit layer, and the depth -> [S, rows] behind each token of the text, and which token [rows] each row
            is, -1 for a bucket.
        thresholds: name -> one for each exit.
        texts: name of thresholds, with "full" for none -> tokens after `PROMPT`, and where each left.
    """

    ids: Tensor
    logits: dict[int, tuple[Tensor, Tensor]]
    thresholds: dict[str, dict[str, Any]]
    texts: dict[str, tuple[list[int], list[int]]]


def write_all(folder: str) -> dict[str, Said]:
    """Writes `llama.nemo` with an exit of every kind, `exits.nemo` with these alone, `qwen2.nemo` with two exits, and
    what is exported of them; run it in a rank of its own."""
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model

    llama = tiny_model(exits=EXITS, head=HEADS)
    llama.save_to(f"{folder}/llama.nemo")
    restored = Model.restore_from(f"{folder}/llama.nemo", trainer=tiny_gpt.tiny_trainer())
    restored.save_adapters(f"{folder}/exits.nemo")
    head = dict(block=True, mlp="beside", linear=True, projection="shortlist", shortlist_size=80)
    qwen2 = tiny_model(exits=[3, 8], head=head, qkv_bias=True)
    qwen2.save_to(f"{folder}/qwen2.nemo")
    export(folder, "llama", "remote", max_shard_size="200KB")
    export(folder, "llama", "base")
    export(folder, "llama", "remote", architecture="mistral")
    export(folder, "qwen2", "remote")
    return {"llama": said(llama), "qwen2": said(qwen2)}


def tiny_model(**config: Any) -> Any:
    """Of `tests.support.tiny_gpt`, with shortlists of tokens here and there."""
    model = tiny_gpt.tiny_model(tiny_gpt.tiny_model_config(**config))
    for n, head in model.gpt.exits.items():
        if head.head.projection == "shortlist":
            ids = torch.randperm(tiny_gpt.VOCABULARY, generator=torch.Generator().manual_seed(int(n)))
            head.projection.set_shortlist(ids[: head.head.shortlist_size])
    return model


def export(folder: str, name: str, kind: str, **settings: Any) -> None:
    """Writes `NAME_KIND` from `NAME.nemo`; by the architecture's name, and with the layer, if these are given."""
    from nemo_ee.export.export import export
    from nemo_ee.export.settings import ExportConfig

    output = Path(folder, f"{settings.get('architecture', name)}_{kind}{settings.get('layer', '')}")
    export(ExportConfig(kind, f"{folder}/{name}.nemo", str(output), **settings))


def refused(folder: str) -> dict[str, str]:
    """Why bad exits of `llama.nemo` are not exported; run it in a rank of its own."""
    from nemo_ee.export.remote import export_remote
    from nemo_ee.export.settings import ExportConfig
    from nemo_ee.export.source import opened

    config, found = ExportConfig("remote", f"{folder}/llama.nemo", f"{folder}/none"), {}
    with opened(config) as source:
        norm, ids = (source.tensors[f"exits.3.{name}"] for name in ("norm.weight", "projection.token_ids"))
        backwards = replace(ids, read=lambda: ids.read().flip(0))
        for name, change in {
            "none": dict(early_exit=replace(source.early_exit, layers=())),
            "surplus": dict(tensors={**source.tensors, "exits.3.other.weight": norm}),
            "shape": dict(tensors={**source.tensors, "exits.3.norm.weight": replace(norm, shape=(7,))}),
            "shortlist": dict(tensors={**source.tensors, "exits.3.projection.token_ids": backwards}),
        }.items():
            try:
                export_remote(config, replace(source, **change), Path(folder, "none"))
            except (ConfigError, CheckpointError) as error:
                found[name] = str(error)
    return found


def said(model: Any) -> Said:
    """Its own words: the text at full depth, exits' logits on it, and texts by thresholds that use all exits."""
    prompt = model.tokenizer.ids_to_text(PROMPT)
    assert model.tokenizer.text_to_ids(prompt) == PROMPT

    def text(early_exit: Any) -> tuple[list[int], list[int]]:
        lengths = dict(max_length=STEPS, min_length=0)
        out = model.generate([prompt], lengths, dict(add_BOS=False), early_exit=early_exit)
        return out["token_ids"][0][len(PROMPT) :], out["early_exit"][0]["exit_layers"]

    texts = {"full": text(False)}
    ids = torch.tensor([*PROMPT, *texts["full"][0]])
    logits = logits_of(model.gpt, ids)
    exits = model.gpt.exit_layers
    sure = [confidences(*logits[n]) for n in exits]
    for share in SHARES:
        middle = [min(each.quantile(share).item(), MOST) for each in sure]
        if set(text(dict(threshold=middle, always=True))[1]) == {*exits, DEPTH}:
            break
    thresholds = {
        "each": dict(threshold=middle),
        "one": dict(threshold=0.3),
        "always the second": dict(threshold=[1.0, 0.0, *NEVER][: len(exits)]),
        "some": dict(threshold=middle[::2], exits=list(exits[::2])),
        "entropy": dict(threshold=0.3, confidence="entropy"),
        "margin": dict(threshold=0.1, confidence="margin"),
    }
    texts |= {name: text(dict(always=True, **options)) for name, options in thresholds.items()}
    return Said(ids, logits, thresholds, texts)


@torch.no_grad()
def logits_of(gpt: Any, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """See `Said`: by the modules that train, without a cache."""
    states = gpt.forward_states(ids[None], torch.arange(len(ids))[None], None)
    found = {}
    for n in gpt.exit_layers:
        head = gpt.exits[str(n)]
        state = head(states.exits[n], None, states.rotary_pos_emb)[:, 0]
        logits = head.projection.local_logits(state, gpt.output_weight())
        known = logits[0] > float("-inf")
        found[n] = logits[:, known], head.projection.tokens_of(torch.arange(logits.shape[-1]))[known]
    final = (states.output[:, 0] @ gpt.output_weight().T)[:, : gpt.true_vocab_size]
    return {gpt.config.num_layers: (final, torch.arange(final.shape[-1])), **found}


def confidences(logits: Tensor, tokens: Tensor) -> Tensor:
    """[S] the probability of the most probable token, from logits of `Said`."""
    return logits.softmax(-1)[:, tokens >= 0].amax(-1)


def rounds(text: Sequence[int], said: Sequence[tuple[int, float]], most: int, sure: float = 0.4) -> int:
    """How many passes at full depth transformers' assisted generation needs, by teacher forcing.

    Args:
        text: tokens of the greedy text at full depth, none of which ends it.
        said: for each of them, what the exit says in its place, having read the text before, and how sure it is.
        most: drafts in a round.
        sure: a round ends with the first draft that is less sure.
    """
    place = count = 0
    while place < len(text):
        accepted = 0
        for j in range(place, place + min(most, len(text) - place - 1)):
            token, confidence = said[j]
            if token != text[j]:
                break
            accepted += 1
            if confidence < sure:
                break
        place, count = place + accepted + 1, count + 1
    return count
