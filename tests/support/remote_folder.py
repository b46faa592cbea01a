# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A tiny model with an exit of every kind, as a `.nemo` and exported; what it says itself, for comparison."""

from pathlib import Path
from typing import Any

import torch

from tests.support import tiny_gpt

HEADS = [
    *tiny_gpt.HEADS.values(),
    dict(mlp="beside", linear=True, projection="shortlist", shortlist_size=100),
]
EXITS = [1, 2, 3, 4, 5, 6]
PROMPT = list(range(7, 19))
STEPS = 24
TEXT = [*PROMPT, *range(60, 84)]


def write(folder: str, **overrides: Any) -> dict[str, Any]:
    """Writes `tiny.nemo`, and `remote` and `base` from it; run it in a rank of its own.

    Returns:
        Exit layer -> rows of logits [S, rows] after each token of `TEXT`, and `tokens` -> which token each row is, -1
        for a bucket; under the depth the final exit's.
    """
    from nemo_ee.export.export import export
    from nemo_ee.export.settings import ExportConfig

    config = tiny_gpt.tiny_model_config(exits=EXITS, head=HEADS, **overrides)
    model = tiny_gpt.tiny_model(config)
    path = Path(folder, "tiny.nemo")
    model.save_to(str(path))
    for kind in ("base", "remote"):
        export(ExportConfig(kind=kind, gpt_model_file=str(path), output_path=str(Path(folder, kind))))
    return {"logits": logits_of(model.gpt), "texts": texts_of(model)}


@torch.no_grad()
def logits_of(gpt: Any) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """See `write`."""
    ids = torch.tensor([TEXT])
    states = gpt.forward_states(ids, torch.arange(len(TEXT))[None], None)
    found = {}
    for n in gpt.exit_layers:
        head = gpt.exits[str(n)]
        state = head(states.exits[n], None, states.rotary_pos_emb)[:, 0]
        logits = head.projection.local_logits(state, gpt.output_weight())
        rows = head.projection.tokens_of(torch.arange(logits.shape[-1]))
        known = logits[0] > float("-inf")
        found[n] = logits[:, known], rows[known]
    final = (states.output[:, 0] @ gpt.output_weight().T)[:, : gpt.true_vocab_size]
    found[gpt.config.num_layers] = final, torch.arange(final.shape[-1])
    return found


THRESHOLDS = {
    "all": [0.3, 0.35, 0.4, 0.3, 0.4, 0.4],
    "first and last": [1.0, 0.0, 1.0, 1.0, 1.0, 1.0],
}


def texts_of(model: Any) -> dict[str, tuple[list[int], list[int]]]:
    lengths, sampling = dict(max_length=STEPS, min_length=STEPS), dict(add_BOS=False)
    prompt = model.tokenizer.ids_to_text(PROMPT)
    assert model.tokenizer.text_to_ids(prompt) == PROMPT
    found = {}
    for name, threshold in {"full": None, **THRESHOLDS}.items():
        early = False if threshold is None else dict(threshold=threshold, always=True)
        out = model.generate([prompt], lengths, sampling, early_exit=early)
        layers = out["early_exit"][0]["exit_layers"] if early else None
        found[name] = out["token_ids"][0][len(PROMPT) :], layers
    return found
