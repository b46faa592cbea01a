# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tiny models with an exit of every kind, their files, and what each exit says of the same tokens."""

from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_gpt import VOCABULARY, tiny_model, tiny_model_config, tiny_trainer

KINDS: dict[int, dict[str, Any]] = {
    1: dict(mlp="none", linear=False, projection="tied"),
    2: dict(mlp="residual", linear=False, projection="tied"),
    3: dict(block=True, mlp="none", linear=False, projection="untied"),
    4: dict(block=True, mlp="residual", linear=False, projection="tied"),
    5: dict(mlp="beside", linear=True, projection="tied"),
    6: dict(mlp="none", linear=True, projection="untied"),
    7: dict(mlp="none", norm=False, linear=False, projection="tied"),
    8: dict(block=True, mlp="beside", linear=True, projection="shortlist", shortlist_size=61),
}
"""Exit layer -> its head; together all kinds, with every projection."""
TOKENS = (8, 64)
"""Texts and their length."""


def tokens() -> torch.Tensor:
    """Random token ids."""
    return torch.randint(0, VOCABULARY, TOKENS, generator=torch.Generator().manual_seed(3))


def write_all(folder: str, variants: dict[str, dict[str, Any]]) -> dict[str, dict[int, torch.Tensor]]:
    """For each variant of a tiny model, `NAME.nemo` with all exits and `NAME_exits.nemo` with these alone.

    Args:
        folder: to write to.
        variants: name -> further keys of the configuration.

    Returns:
        Name -> layer -> logits [B, S, V] in float32, without a bucket; those of tokens off a shortlist are -inf. Layer
        0 stands for the final exit.
    """
    return {name: _write(Path(folder), name, changes) for name, changes in variants.items()}


@torch.no_grad()
def _write(folder: Path, name: str, changes: dict[str, Any]) -> dict[int, torch.Tensor]:
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel

    config = tiny_model_config(list(KINDS), list(KINDS.values()), **changes)
    model = tiny_model(config)
    for layer, exit_head in model.gpt.exits.items():
        if exit_head.head.projection == "shortlist":
            ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(int(layer)))
            exit_head.projection.set_shortlist(ids[: exit_head.head.shortlist_size])
    path = str(folder / f"{name}.nemo")
    model.save_to(path)
    restored = MegatronGPTEarlyExitModel.restore_from(path, trainer=tiny_trainer()).eval()
    restored.save_adapters(str(folder / f"{name}_exits.nemo"))
    return exit_logits(model.gpt, tokens())


@torch.no_grad()
def exit_logits(gpt: Any, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """What every exit, and under 0 the final one, says of texts [B, S]; see `write_all`."""
    states = gpt.forward_states(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
    output = gpt.output_weight()[: gpt.true_vocab_size]
    found = {0: (states.output @ output.T).transpose(0, 1)}
    for layer, exit_head in gpt.exits.items():
        state = exit_head(states.exits[int(layer)], None, states.rotary_pos_emb)
        projection = exit_head.projection
        own = output if projection.weight is None else projection.weight
        logits = torch.full((*state.shape[:2], gpt.true_vocab_size), -torch.inf)
        listed = projection.tokens_of(torch.arange(projection.num_kept))
        logits[..., listed] = state @ own[: projection.num_kept].T
        found[int(layer)] = logits.transpose(0, 1)
    return found


def write_sharded(path: str, layout: dict[str, int]) -> None:
    """Writes the tiny model with its exits from a rank of a parallel layout."""
    config = tiny_model_config(list(KINDS), list(KINDS.values()), **layout)
    tiny_model(config, torch.distributed.get_world_size()).save_to(path)


@torch.no_grad()
def best_two(gpt: Any, ids: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """By layer, each exit's most probable token [B, S] and by how much its logit exceeds the next; text by text."""
    found: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for row in ids:
        for layer, logits in exit_logits(gpt, row[None]).items():
            best = logits.topk(2)
            gaps = best.values[..., 0] - best.values[..., 1]
            found.setdefault(layer, []).append((best.indices[..., 0], gaps))
    return {layer: tuple(map(torch.cat, zip(*rows, strict=True))) for layer, rows in found.items()}
