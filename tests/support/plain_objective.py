# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The plainest reference of pre-training: one process that adds the losses up as the objective is written.

It calls backward once per global batch: no deferred losses, no schedule, no chunks. Attention masks, positions and
the training statistics are computed anew as well.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.pretraining import Recorder
from tests.support.tuning import EOS


@dataclass
class Prediction:
    """One exit on one micro-batch, all [S, B]: cross-entropy, highest probability, most probable token."""

    loss: Tensor
    confidence: Tensor
    best: Tensor


def by_document(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Where positions [B, S] see nothing of other documents: what they do not see [B, 1, S, S], and the
    positions [B, S] within documents. A document ends with `EOS`."""
    batch, length = tokens.shape
    hidden = torch.ones(batch, 1, length, length, dtype=torch.bool)
    positions = torch.zeros_like(tokens)
    for row, sequence in enumerate(tokens.tolist()):
        start = 0
        for place, token in enumerate(sequence):
            positions[row, place] = place - start
            hidden[row, 0, place, start : place + 1] = False
            if token == EOS:
                start = place + 1
    return hidden, positions


def PlainObjective() -> type:  # noqa: N802  (a class, made late: importing NeMo takes long)
    """The reference, in one process."""

    class Plain(Recorder()):
        def fwd_bwd_step(
            self, dataloader_iter: Iterator, forward_only: bool, first_val_step: Any = None
        ) -> Any:
            if forward_only:
                return super().fwd_bwd_step(dataloader_iter, forward_only, first_val_step)
            from megatron.core.num_microbatches_calculator import get_num_microbatches

            count = self.counts[self.trainer.global_step] if self.counts else get_num_microbatches()
            weights, total, finals = self.loss_weights_now(), 0.0, []
            sums: dict[str, float] = defaultdict(float)
            for index in range(count):
                batch = self.get_batch(dataloader_iter, False)
                mask = batch["loss_mask"].double().t()
                found = self.predictions(batch, index)
                for n, prediction in found.items():
                    loss = prediction.loss
                    if n and self.training_config.token_weighting == "confidence":
                        loss = loss * prediction.confidence.detach()
                    mean = (loss * mask).sum() / mask.sum()
                    total = total + (weights[n] if n else 1.0) * mean
                    finals += [] if n else [mean.detach()]
                self.add_statistics(sums, found, mask)
            (total / count).backward()
            self.log_statistics(sums, weights)
            return torch.stack(finals).mean()

        def predictions(self, batch: dict, index: int) -> dict[int, Prediction]:
            """Of every exit, and of the final one (0)."""
            gpt, data = self.gpt, self.cfg.data
            gpt.layer_dropout = self.layer_dropout(index)
            tokens = batch["tokens"]
            hidden, within = by_document(tokens)
            mask = hidden if data.reset_attention_mask else None
            positions = within if data.reset_position_ids else torch.arange(tokens.shape[1]).expand_as(tokens)
            assert batch["loss_mask"].bool().equal(tokens != EOS if data.eod_mask_loss else tokens > -1)
            with gpt.capture() as states:
                logits = gpt(tokens, positions, mask).transpose(0, 1)[..., : gpt.true_vocab_size]
            best = logits.detach().softmax(-1).max(-1)
            log = logits.float().log_softmax(-1)  # megatron-core's precision
            losses = -log.gather(-1, batch["labels"].t()[..., None])[..., 0]
            found = {0: Prediction(losses, best.values, best.indices)}
            rotary = gpt._preprocess(tokens, positions)[1]
            for n in gpt.exit_layers:
                head = gpt.exits[str(n)]
                found[n] = self.of_exit(head.projection, head(states[n], mask, rotary), batch["labels"].t())
            return found

        def of_exit(self, projection: Any, state: Tensor, labels: Tensor) -> Prediction:
            weight = self.gpt.output_weight() if projection.kind == "tied" else projection.weight
            logits = F.linear(state, weight[: projection.num_kept])
            rows, kept = projection.rows_of(labels), projection.num_kept
            if projection.kind == "shortlist":
                bucket = state @ projection.bucket_weight + projection.bucket_bias
                logits = torch.cat([logits, bucket[..., None]], -1)
                rows = rows.masked_fill(rows >= kept, kept)
            log = F.log_softmax(logits, -1)
            best = log[..., :kept].max(-1)
            loss = -log.gather(-1, rows[..., None])[..., 0]
            return Prediction(loss, best.values.exp(), projection.tokens_of(best.indices))

        def add_statistics(self, sums: dict, found: dict[int, Prediction], mask: Tensor) -> None:
            sums["tokens"] += mask.sum().item()
            for n, one in found.items():
                values = {"loss": one.loss, "confidence": one.confidence}
                values |= {"agreement": one.best == found[0].best} if n else {}
                for what, value in values.items():
                    sums[f"train_{what}/exit_{n}" if n else f"train_{what}/final"] += (
                        (value * mask).sum().item()
                    )

        def log_statistics(self, sums: dict[str, float], weights: dict[int, float]) -> None:
            """Means per token, and the weights; exits of weight 0 are not computed, so they have none."""
            tokens = sums.pop("tokens")
            silent = {f"exit_{n}" for n, weight in weights.items() if weight == 0}
            means = {name: total / tokens for name, total in sums.items()}
            means |= {f"train_loss_weight/exit_{n}": weight for n, weight in weights.items()}
            for name, value in means.items():
                if name.split("/")[1] not in silent:
                    self.log(name, value, rank_zero_only=True, batch_size=1)

    return Plain
