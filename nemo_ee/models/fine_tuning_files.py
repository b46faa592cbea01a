# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What tuning reads: NeMo's fine-tuning data, chats and prompts with their answers, or pieces of indexed text."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.collections.nlp.data.language_modeling.megatron.data_samplers import MegatronCorePretrainingSampler
from nemo.utils import logging
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from nemo_ee.data.chats.chat_template import ChatTemplate, TurnTemplate
from nemo_ee.data.chats.fine_tuning import (
    FineTuningData,
    MarkedChatDataset,
    PromptDataset,
    TemplateChatDataset,
    survey,
)
from nemo_ee.data.token_rules import known_id
from nemo_ee.generation.prompts import chat_tokens
from nemo_ee.generation.text import TextTokenizer
from nemo_ee.models.checks.fine_tuning_checks import check_lines, file_names, require
from nemo_ee.runtime.children import end_with_parent
from nemo_ee.runtime.collective import on_first_rank


class IndexedText:
    """Pieces of one length of indexed text, in which every token counts.

    Args:
        samples: the training dataset.
        length: of a sample, in tokens.
    """

    def __init__(self, samples: Sequence, length: int):
        self._samples, self._length = samples, length

    @property
    def tokens_per_sample(self) -> float:
        """Tokens of a training sample that count, on average."""
        return self._length

    @property
    def samples_to_fit(self) -> int:
        """Training samples that first weights may be fitted to."""
        return len(self._samples)

    def sample_from_end(self, index: int) -> Any:
        """The training sample at a place counted from the end."""
        samples = len(self._samples)
        return self._samples[samples - 1 - index % samples]

    def samples_from_end(self, tokens: int) -> tuple[int, int]:
        """How many samples at the end hold so many tokens that count, and how many these are."""
        samples = -(-tokens // self._length)
        return samples, samples * self._length

    def collate(self, samples: list) -> dict[str, Tensor]:
        """A micro-batch of training samples."""
        return default_collate(samples)


class FineTuningFiles:
    """The files that `model.data.train_ds` and `validation_ds` name, opened. What `IndexedText` says of its samples,
    this says of lines; a shortlist has the tokens that are learnt, since exits are to emit them.

    Collective over the world: rank 0 looks at the lines.

    Args:
        cfg: of the model.
        tokenizer: with the model's rules for texts.
        vocab_size: V, number of token ids.
        steps: of the run.

    Attributes:
        training: samples in the order of training.
        validation: lines one after the other; None without.
        survey: what the training lines are like.

    Raises:
        ConfigError: the tokenizer lacks what the data needs.
        DataError: a file or a line cannot be used.
    """

    def __init__(self, cfg: DictConfig, tokenizer: TextTokenizer, vocab_size: int, steps: int):
        on_first_rank(lambda: check_lines(cfg.data))
        self.cfg, values = cfg, cfg.data.train_ds
        self.training = FineTuningData(
            open_files(cfg, "train_ds", tokenizer),
            max(1, steps) * cfg.global_batch_size,
            values.get("concat_sampling_probabilities"),
            values.get("shuffle", True),
            values.get("seed", 1234),
        )
        validation = open_files(cfg, "validation_ds", tokenizer)
        self.validation = FineTuningData(validation) if validation else None
        self.survey = on_first_rank(lambda: survey(self.training, vocab_size))
        if self.validation is not None:
            on_first_rank(lambda: survey(self.validation, vocab_size) and None)
        told = (
            f"{self.training.lines} samples to train on, of {self.tokens_per_sample:.0f} tokens that count."
        )
        logging.info(f"Fine-tuning data: {told}")
        if self.survey.cut:
            logging.warning(
                f"{self.survey.cut} of {self.survey.lines} lines have more tokens than "
                f"model.data.train_ds.max_seq_length={values.max_seq_length}, and are cut."
            )

    def loader(self, dataset: FineTuningData, consumed_samples: int, dataset_type: str | None) -> DataLoader:
        """Micro-batches of this rank, as the dataset's section of `model.data` has them."""
        cfg = self.cfg
        values = cfg.data.validation_ds if dataset_type == "validation" else cfg.data.train_ds
        drop_last = values.get("drop_last", dataset_type != "validation")
        sampler = MegatronCorePretrainingSampler(
            total_samples=len(dataset),
            consumed_samples=consumed_samples,
            micro_batch_size=cfg.micro_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            drop_last=drop_last,
            global_batch_size=cfg.global_batch_size,
            pad_samples_to_global_batch_size=not drop_last,
        )
        workers = values.get("num_workers", 0)
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=dataset.collate,
            num_workers=workers,
            pin_memory=values.get("pin_memory", True) and torch.cuda.is_available(),
            persistent_workers=workers > 0,
            worker_init_fn=end_with_parent,
        )

    @property
    def tokens_per_sample(self) -> float:
        """Tokens of a training sample that count, on average."""
        return self.survey.tokens_per_line

    @property
    def samples_to_fit(self) -> int:
        """As many as there are lines, so that none is read twice for want of others."""
        return self.training.lines

    def sample_from_end(self, index: int) -> Any:
        """The training sample at a place counted from the end; past the first line, nothing to learn."""
        return self.training[len(self.training) - 1 - index if index < self.samples_to_fit else None]

    def samples_from_end(self, tokens: int) -> tuple[int, int]:
        """How many samples at the end hold so many tokens that count, or all there are, and how many these are."""
        samples = found = 0
        while found < tokens and samples < self.samples_to_fit:
            found += self.training.learnt_tokens(self.sample_from_end(samples))
            samples += 1
        return samples, found

    def collate(self, samples: list) -> dict[str, Tensor]:
        """A micro-batch of training samples."""
        return self.training.collate(samples)


def open_files(cfg: DictConfig, section: str, text: TextTokenizer) -> list:
    """NeMo's datasets of the files of a section of `model.data`."""
    tokenizer, names = text.nemo, file_names(cfg.data, section)
    values = cfg.data.get(section) or {}
    tensor_parallel = cfg.get("tensor_model_parallel_size", 1)
    kind, special = PromptDataset, None
    if cfg.data.get("chat", False) and cfg.data.get("chat_prompt_tokens") is not None:
        kind, special = MarkedChatDataset, cfg.data.chat_prompt_tokens
    elif cfg.data.get("chat", False):
        kind, special = TemplateChatDataset, _chat_template(text)
    bos, eos = (known_id(getattr(tokenizer, name, None)) for name in ("bos_id", "eos_id"))
    plain = kind is PromptDataset and bool(names)
    add_bos, add_eos = values.get("add_bos"), values.get("add_eos", True)
    if add_bos is None:
        add_bos = bool(text.before())
    key, rule = f"model.data.{section}.add_", "the checkpoint's tokenizer has no such token"
    separator = known_id(getattr(tokenizer, "sep_id", None)) if values.get("add_sep") else None
    for name, wanted, token in (
        ("bos", add_bos, bos),
        ("eos", add_eos, eos),
        ("sep", values.get("add_sep"), separator),
    ):
        lacks = plain and wanted and token is None
        require(not lacks, f"{key}{name}", True, rule, f"set {key}{name}=false")
    return [
        kind(
            file_path=name,
            tokenizer=tokenizer,
            max_seq_length=values.max_seq_length,
            pad_seq_length_to_mult=8 * tensor_parallel if cfg.get("sequence_parallel", False) else 16,
            add_bos=add_bos,
            add_eos=add_eos,
            add_sep=values.get("add_sep", False),
            sep_id=separator,
            label_key=values.get("label_key", "output"),
            answer_only_loss=cfg.get("answer_only_loss", True),
            truncation_field=values.get("truncation_field"),
            pad_to_max_length=values.get("pad_to_max_length", False),
            prompt_template=values.get("prompt_template"),
            truncation_method=values.get("truncation_method", "right"),
            special_tokens=special,
            get_attention_mask_from_fusion=True,  # right padding needs no mask but the causal one
        )
        for name in names
    ]


def _chat_template(text: TextTokenizer) -> ChatTemplate | TurnTemplate:
    rule = "the checkpoint's tokenizer has no chat template"
    remedy = (
        "give lines of input and output with model.data.chat=false, or NeMo's marks of turns, "
        "model.data.chat_prompt_tokens={system_turn_start:…,turn_start:…,label_start:…,end_of_turn:…,end_of_name:…}"
    )
    template = chat_template_of(text)
    require(template is not None, "model.data.chat", True, rule, remedy)
    return template


def chat_template_of(text: TextTokenizer) -> ChatTemplate | TurnTemplate | None:
    """The chat template of a model's tokenizer; None if it has none."""
    tokenizer = text.nemo
    inner = tokenizer.tokenizer if isinstance(tokenizer, AutoTokenizer) else tokenizer
    if getattr(inner, "chat_template", None) is None:
        return None
    if inner is tokenizer:
        return TurnTemplate(partial(chat_tokens, inner))
    return ChatTemplate(inner, text.eos_ids)
