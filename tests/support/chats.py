# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Chats and prompts of unequal lengths in the words of the tiny model's tokenizer, and what tuning on them is to give.

The reference reads the files itself, asks Hugging Face's template for ids, finds answers by the words around them, and
runs every line alone, so that there is no padding at all. Its gradients are autograd's of the objective as it is
written.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tests.support import tuning
from tests.support.tiny_gpt import VOCABULARY, tokenizer

LONGEST = 32


def write_chats(path: Path, lines: int = 11, seed: int = 0) -> str:
    """A file of conversations of one to three questions, with and without a system's turn."""
    generator = np.random.default_rng(seed)
    with path.open("w") as file:
        for line in range(lines):
            turns = [dict(role="system", content=_words(generator, 3))] if line % 3 == 0 else []
            for _ in range(int(generator.integers(1, 4))):
                turns += [dict(role="user", content=_words(generator, 5))]
                turns += [dict(role="assistant", content=_words(generator, 6))]
            file.write(json.dumps(dict(messages=turns)) + "\n")
    return str(path)


def write_prompts(path: Path, lines: int = 11, seed: int = 0) -> str:
    """A file of `input` and `output`."""
    generator = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(lines):
            line = dict(input=_words(generator, 20), output=_words(generator, 9))
            file.write(json.dumps(line) + "\n")
    return str(path)


def _words(generator: np.random.Generator, most: int) -> str:
    shares = 1.0 / np.arange(1, VOCABULARY - 5) ** 0.8
    count = int(generator.integers(1, most + 1))
    return " ".join(f"w{n}" for n in generator.choice(len(shares), size=count, p=shares / shares.sum()))


def data_section(
    training: list[str], validation: list[str], chat: bool = True, **changes: Any
) -> dict[str, Any]:
    """The `data` section of a run; `changes` are of `train_ds`."""
    both = dict(max_seq_length=LONGEST, prompt_template="{input} {output}", label_key="output", add_bos=None)
    both |= dict(truncation_field="input", truncation_method="right", add_eos=True, add_sep=False)
    return dict(
        tuning.data_section({}),
        data_prefix=None,
        chat=chat,
        chat_prompt_tokens=None,
        train_ds={**both, "file_names": training, "shuffle": False, **changes},
        validation_ds={**both, "file_names": validation},
    )


def expected_line(line: dict[str, Any]) -> tuple[list[int], list[bool]]:
    """Token ids of a line, and which are said by the assistant, its <eos> included."""
    words = tokenizer()
    if "messages" in line:
        ids = words.apply_chat_template(line["messages"])
    else:
        ids = words(f"{line['input']} {line['output']} <eos>")["input_ids"]
        return ids, [i >= len(line["input"].split()) for i in range(len(ids))]
    says, mask = False, []
    for i, word in enumerate(words.convert_ids_to_tokens(ids)):
        mask.append(says)
        if word in ("user", "assistant", "system"):
            says = word == "assistant"
        elif word == "<eos>":
            says = False
        assert i < len(ids)
    return ids, mask


def samples_of(path: str, all_tokens: bool = False) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per line: tokens [S], labels [S], and which labels count [S]; nothing is padded."""
    found = []
    for text in Path(path).read_text().splitlines():
        ids, mask = expected_line(json.loads(text))
        ids, mask = torch.tensor(ids), torch.tensor(mask) | all_tokens
        found.append((ids[:-1][:LONGEST], ids[1:][:LONGEST], mask[1:][:LONGEST]))
    return found


@dataclass
class Alone:
    """What a line gives that is run alone: exit layer -> hidden state; final normed state [S, H]."""

    exits: dict[int, torch.Tensor]
    final: torch.Tensor
    rotary: Any = field(repr=False, default=None)


def run_alone(gpt: Any, tokens: torch.Tensor) -> Alone:
    """Hidden states of one line."""
    with torch.no_grad():
        states = gpt.forward_states(tokens[None], torch.arange(len(tokens))[None], None)
    return Alone(states.exits, states.output[:, 0], states.rotary_pos_emb)


def token_losses(gpt: Any, n: int, line: Alone, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each position of a line: cross-entropy, divergence, agreement, confidence and the objective, [S]."""
    head = gpt.exits[str(n)]
    projection, kept = head.projection, head.projection.num_kept
    teacher = F.log_softmax(line.final @ gpt.output_weight().T[:, : gpt.true_vocab_size], -1)
    state = head(line.exits[n], None, line.rotary)[:, 0]
    weight = gpt.output_weight() if projection.kind == "tied" else projection.weight
    logits = F.linear(state, weight[:kept])
    rows, target = projection.rows_of(labels), teacher.exp()
    best = projection.rows_of(teacher.argmax(-1))
    if projection.kind == "shortlist":
        bucket = state @ projection.bucket_weight + projection.bucket_bias
        logits = torch.cat([logits, bucket[:, None]], 1)
        rows, best = rows.clamp(max=kept), best.clamp(max=kept)
        target = target[:, projection.token_ids]
        target = torch.cat([target, 1 - target.sum(1, keepdim=True)], 1)
    log = F.log_softmax(logits, -1)
    ce, hard = (-log.gather(1, which[:, None])[:, 0] for which in (rows, best))
    kl = (target * (target.clamp_min(1e-30).log() - log)).sum(1)
    emitted = log[:, :kept].max(1)
    terms = gpt.early_exit.tuning
    return dict(
        loss=ce,
        divergence=kl,
        agreement=(projection.tokens_of(emitted.indices) == teacher.argmax(-1)).double(),
        confidence=emitted.values.exp(),
        objective=terms.ce_weight * ce + terms.kl_weight * kl + terms.argmax_weight * hard,
    )


def plain_step(
    gpt: Any, lines: list[tuple], micro_batch: int
) -> tuple[dict[int, tuple], dict[str, torch.Tensor]]:
    """Means over all tokens that count, and the gradient of the mean over micro-batches of their means."""
    sums = {n: torch.zeros(5, dtype=torch.float64) for n in gpt.exit_layers}
    counts, total = [0] * -(-len(lines) // micro_batch), {}
    for i, (tokens, labels, learnt) in enumerate(lines):
        counts[i // micro_batch] += int(learnt.sum())
        line = run_alone(gpt, tokens)
        for n in gpt.exit_layers:
            found = {
                name: (values * learnt).sum() for name, values in token_losses(gpt, n, line, labels).items()
            }
            sums[n] += torch.stack([value.detach() for value in found.values()])
            total[i // micro_batch] = total.get(i // micro_batch, 0.0) + found["objective"]
    mean = sum(total[k] / counts[k] for k in total) / len(counts)
    names, parameters = zip(
        *((k, p) for k, p in gpt.exits.named_parameters() if p.requires_grad), strict=True
    )
    gradients = torch.autograd.grad(mean, parameters, allow_unused=True)
    means = {n: tuple((value / sum(counts)).tolist()) for n, value in sums.items()}
    return means, {k: g for k, g in zip(names, gradients, strict=True) if g is not None}
