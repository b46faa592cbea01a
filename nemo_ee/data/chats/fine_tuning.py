# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's fine-tuning datasets, with what training exits on them needs besides.

NeMo's classes read, tokenize, truncate and collate. Changed is that files have no index beside them, that what is
wrong with a line is said with its number, and that a chat may be in the tokenizer's own template.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import helpers
from torch import Tensor
from torch.utils.data import Dataset

from nemo_ee.data.chats.chat_template import ChatTemplate, TurnTemplate, line_tokens
from nemo_ee.data.chats.json_lines import JsonLines
from nemo_ee.errors import DataError
from nemo_ee.runtime.upstream.hugging_face_datasets import datasets_or_stand_in

with datasets_or_stand_in():
    from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import GPTSFTChatDataset
    from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset

SURVEYED = 20_000
"""Lines of a file, evenly spread, whose tokens are looked at before training."""


class _Lines:
    """To be put before NeMo's dataset classes; an index that is None gives a sample of which nothing is learnt."""

    def _load_dataset(self) -> None:
        self.indexed_dataset = JsonLines(self.file_path)

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        where = self.indexed_dataset.where(index or 0)
        try:
            item = self._process_example(self.indexed_dataset[index or 0])
        except KeyError as error:
            hint = "; set model.data.chat=true for chats" if not isinstance(self, GPTSFTChatDataset) else ""
            raise DataError(f"{where} has no {error}{hint}") from error
        except (ValueError, AssertionError, AttributeError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{where} {error or 'is not in the form that NeMo reads'}") from error
        item["nothing"] = index is None
        if index is not None and not any(self.loss_mask(item)):
            rule = (
                f"has no token of an answer among its first model.data.….max_seq_length={self.max_seq_length}"
            )
            raise DataError(f"{where} {rule}; raise it, or shorten or drop the line")
        return item

    def loss_mask(self, item: dict[str, Any]) -> list[float]:
        """Of each token that is predicted, whether it is learnt."""
        return self._build_loss_mask(item)[1:]

    def cut(self, item: dict[str, Any]) -> bool:
        """Whether a line is longer than what is read of it."""
        return item["cut"]

    def _build_loss_mask(self, item: dict[str, Any]) -> list[float]:
        return [0.0] * len(item["input_ids"]) if item["nothing"] else super()._build_loss_mask(item)

    def _collate_item(self, item: list, max_length: int, pad_id: int | None) -> list:
        return super()._collate_item(item, max_length, 0 if pad_id is None else pad_id)

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """NeMo's, tensors of [B, S] alone."""
        collated = super().collate_fn(batch)
        return {key: collated[key] for key in ("tokens", "labels", "loss_mask", "position_ids")}


class PromptDataset(_Lines, GPTSFTDataset):
    """Lines of `input` and `output`, or of the keys of another prompt template."""

    def _maybe_validate_prompt_template(self) -> None:
        # NeMo resolves escapes by a codec that takes every byte for a character of Latin-1.
        self.prompt_template = (self.prompt_template or "").encode("ascii", "backslashreplace").decode()
        super()._maybe_validate_prompt_template()

    def _multiple_truncation(self, template_ids: list[list[int]], keys: list[str]) -> tuple[list, list]:
        before = sum(map(len, template_ids))
        context, label = super()._multiple_truncation(template_ids, keys)
        self._cut = len(context) + len(label) < before
        return context, label

    def _process_example(self, example: dict) -> dict[str, Any]:
        return {**super()._process_example(example), "cut": self._cut}


class MarkedChatDataset(_Lines, GPTSFTChatDataset):
    """NeMo's conversations, turns marked by `chat_prompt_tokens`."""

    def _process_example(self, example: dict) -> dict[str, Any]:
        if "conversations" not in example:
            raise ValueError(
                "has no 'conversations', NeMo's form of chats with model.data.chat_prompt_tokens"
            )
        item = super()._process_example({**example, "system": example.get("system") or ""})
        if (
            example.get("finish_reason") == "length" and item["mask"][-1]
        ):  # the answer's end is not the model's
            end = len(item["mask"]) - self._tokens_of_end()
            item |= {key: item[key][:end] for key in ("input_ids", "mask")}
        return item

    def _tokens_of_end(self) -> int:
        """Tokens that NeMo puts behind the last answer."""
        before, marks = "x\n", (self.special_tokens[name] for name in ("end_of_turn", "turn_start"))
        with_end, without = (self.tokenizer.text_to_ids(text) for text in (before + "".join(marks), before))
        return len(with_end) - len(without)

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        item = super().__getitem__(index)
        if item["nothing"]:
            item["mask"] = torch.zeros_like(item["mask"])
        elif not self.answer_only_loss:
            item["mask"] = torch.ones_like(item["mask"])
        return item

    def loss_mask(self, item: dict[str, Any]) -> list[float]:
        return item["mask"][1 : self.max_seq_length + 1].float().tolist()

    def cut(self, item: dict[str, Any]) -> bool:
        return len(item["mask"]) - 1 > self.max_seq_length


class TemplateChatDataset(MarkedChatDataset):
    """Chats in the tokenizer's own template; `special_tokens` is its `ChatTemplate` or `TurnTemplate`."""

    def _build_samples_mapping(self) -> None:
        self.samples_mapping = None

    def _process_example(self, example: dict) -> dict[str, Any]:
        template: ChatTemplate | TurnTemplate = self.special_tokens
        ids, mask = line_tokens(template, example)
        ids, none = torch.tensor(ids), torch.empty(0, dtype=torch.long)
        return dict(input_ids=ids, mask=torch.tensor(mask), context_ids=none, answer_ids=none, metadata={})


class FineTuningData(Dataset):
    """Samples of several files in the order of training, or one after the other.

    In training every file is read again and again, each time in another order, and files in turns, by weight. The
    order of the first samples does not depend on how many there are.

    Args:
        files: one dataset each.
        size: samples of a run; None for every line once.
        weights: of the files; None for their numbers of lines.
        shuffle: read lines in another order than the file's.
        seed: of that order.
    """

    def __init__(
        self,
        files: Sequence[_Lines],
        size: int | None = None,
        weights: Sequence[float] | None = None,
        shuffle: bool = False,
        seed: int = 1234,
    ):
        self.files, lengths = files, [len(file) for file in files]
        self.lines = sum(lengths)
        size = self.lines if size is None else max(size, self.lines)
        self.file_of, self.sample_of = np.zeros(size, np.int16), np.arange(size, dtype=np.int64)
        if len(files) > 1:
            shares = np.array(lengths if weights is None else weights, dtype=np.float64)
            helpers.build_blending_indices(
                self.file_of, self.sample_of, shares / shares.sum(), len(files), size, False
            )
        for n, length in enumerate(lengths):
            mine = self.file_of == n
            epochs, lines = np.divmod(self.sample_of[mine], length)
            if shuffle:
                for epoch in range(epochs.max(initial=-1) + 1):
                    now = epochs == epoch
                    lines[now] = np.random.RandomState([seed, n, epoch]).permutation(length)[lines[now]]
            self.sample_of[mine] = lines

    def __len__(self) -> int:
        return len(self.sample_of)

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        if index is None:
            return self.files[0][None]
        return self.files[self.file_of[index]][int(self.sample_of[index])]

    def collate(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A micro-batch, padded to its longest sample."""
        return self.files[0].collate_fn(batch)

    def learnt_tokens(self, item: dict[str, Any]) -> int:
        """Tokens of a sample that count."""
        return int(sum(self.files[0].loss_mask(item)))


@dataclass(frozen=True)
class Survey:
    """What the lines of files are like.

    Attributes:
        learnt: [V] how often each token is learnt.
        read: [V] how often each token is there at all.
        lines: number of lines looked at.
        cut: how many of them are longer than what is read of them.
    """

    learnt: Tensor
    read: Tensor
    lines: int
    cut: int

    @property
    def tokens_per_line(self) -> float:
        """Mean number of tokens of a line that are learnt."""
        return float(self.learnt.sum()) / self.lines

    def most_frequent(self, count: int) -> Tensor:
        """[count] tokens that are learnt most often; then those that are read most often; then the first."""
        order = self.learnt.double() + self.read.double() / (self.read.sum() + 1)
        return torch.sort(order, descending=True, stable=True).indices[:count]


def survey(data: FineTuningData, vocab_size: int) -> Survey:
    """Reads up to `SURVEYED` lines of every file. Reads files only; call it on one rank.

    Args:
        data: the files.
        vocab_size: V, number of token ids.

    Raises:
        DataError: a line cannot be used, or has token ids beyond the vocabulary.
    """
    learnt, read = torch.zeros(vocab_size, dtype=torch.int64), torch.zeros(vocab_size, dtype=torch.int64)
    lines = cut = 0
    for file in data.files:
        step = -(-len(file) // SURVEYED)
        for index in range(0, len(file), step):
            item = file[index]
            batch = file.collate_fn([item])
            labels, mask = batch["labels"][0], batch["loss_mask"][0] > 0
            if int(labels.max()) >= vocab_size:
                raise DataError(
                    f"{file.indexed_dataset.where(index)} has token id {int(labels.max())}, but the model's "
                    f"vocabulary ends at {vocab_size - 1}; use the tokenizer of this model"
                )
            labels, mask = labels[: len(item["input_ids"]) - 1], mask[: len(item["input_ids"]) - 1]
            read += torch.bincount(labels, minlength=vocab_size)
            learnt += torch.bincount(labels[mask], minlength=vocab_size)
            lines, cut = lines + 1, cut + file.cut(item)
    return Survey(learnt, read, lines, cut)
