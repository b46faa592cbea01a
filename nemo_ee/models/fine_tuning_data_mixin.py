# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's fine-tuning data in tuning: chats, and prompts with their answers."""

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.collections.nlp.data.language_modeling.megatron.data_samplers import MegatronCorePretrainingSampler
from nemo.utils import logging
from torch.utils.data import DataLoader, default_collate

from nemo_ee.data.chats.chat_template import ChatTemplate, TurnTemplate
from nemo_ee.data.chats.fine_tuning import (
    FineTuningData,
    MarkedChatDataset,
    PromptDataset,
    Survey,
    TemplateChatDataset,
    survey,
)
from nemo_ee.data.token_rules import known_id
from nemo_ee.generation.prompts import chat_tokens
from nemo_ee.models.checks.fine_tuning_checks import check_lines, file_names, is_fine_tuning, require
from nemo_ee.runtime.children import end_with_parent
from nemo_ee.runtime.collective import on_first_rank


class FineTuningDataMixin:
    """To be put before `TrainingDataMixin`: where `model.data.train_ds` names files, they are the data.

    Without them all is as there: samples are pieces of text of one length, and every token counts.
    """

    _survey: Survey | None = None

    def model_provider_func(self, *args: Any, **kwargs: Any) -> Any:
        """The next class's, after the files have been looked at with the tokenizer. Collective over the world."""
        if is_fine_tuning(self.cfg.get("data")):
            self.start_distributed()
            self.read_fine_tuning_data()
        return super().model_provider_func(*args, **kwargs)

    def read_fine_tuning_data(self) -> None:
        """Opens the files, and looks at their lines on rank 0. Collective over the world.

        Raises:
            ConfigError: the tokenizer lacks what the data needs.
            DataError: a file or a line cannot be used.
        """
        data = self.cfg.data
        on_first_rank(lambda: check_lines(data))
        training, steps = data.train_ds, max(1, self.trainer.max_steps)
        self._train_ds = FineTuningData(
            self._files("train_ds"),
            steps * self.cfg.global_batch_size,
            training.get("concat_sampling_probabilities"),
            training.get("shuffle", True),
            training.get("seed", 1234),
        )
        validation = self._files("validation_ds")
        self._validation_ds = FineTuningData(validation) if validation else None
        self._test_ds = None
        self._survey = on_first_rank(lambda: survey(self._train_ds, self.true_vocab_size))
        if self._validation_ds is not None:
            on_first_rank(lambda: survey(self._validation_ds, self.true_vocab_size) and None)
        told = f"{self._train_ds.lines} samples to train on, of {self._survey.tokens_per_line:.0f} tokens that count."
        logging.info(f"Fine-tuning data: {told}")
        if self._survey.cut:
            logging.warning(
                f"{self._survey.cut} of {self._survey.lines} lines have more tokens than "
                f"model.data.train_ds.max_seq_length={training.max_seq_length}, and are cut."
            )

    def _files(self, section: str) -> list:
        """NeMo's datasets of the files of a section."""
        cfg, names = self.cfg, file_names(self.cfg.data, section)
        values = cfg.data.get(section) or {}
        tensor_parallel = cfg.get("tensor_model_parallel_size", 1)
        kind, special = PromptDataset, None
        if cfg.data.get("chat", False) and cfg.data.get("chat_prompt_tokens") is not None:
            kind, special = MarkedChatDataset, cfg.data.chat_prompt_tokens
        elif cfg.data.get("chat", False):
            kind, special = TemplateChatDataset, self._chat_template()
        bos, eos = (known_id(getattr(self.tokenizer, name, None)) for name in ("bos_id", "eos_id"))
        plain = kind is PromptDataset and bool(names)
        add_bos, add_eos = values.get("add_bos"), values.get("add_eos", True)
        if add_bos is None:
            add_bos = bool(self.text_tokenizer.before())
        key, rule = f"model.data.{section}.add_", "the checkpoint's tokenizer has no such token"
        separator = known_id(getattr(self.tokenizer, "sep_id", None)) if values.get("add_sep") else None
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
                tokenizer=self.tokenizer,
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

    def _chat_template(self) -> ChatTemplate | TurnTemplate:
        inner = self.tokenizer.tokenizer if isinstance(self.tokenizer, AutoTokenizer) else self.tokenizer
        there = getattr(inner, "chat_template", None) is not None
        rule = "the checkpoint's tokenizer has no chat template"
        remedy = (
            "give lines of input and output with model.data.chat=false, or NeMo's marks of turns, "
            "model.data.chat_prompt_tokens={system_turn_start:…,turn_start:…,label_start:…,end_of_turn:…,end_of_name:…}"
        )
        require(there, "model.data.chat", True, rule, remedy)
        if inner is self.tokenizer:
            return TurnTemplate(partial(chat_tokens, inner))
        return ChatTemplate(inner, self.text_tokenizer.eos_ids)

    def build_train_valid_test_datasets(self) -> Any:
        """The next class's, unless the data are opened already."""
        if self._survey is None:
            return super().build_train_valid_test_datasets()
        self.without_validation()
        return self._train_ds, self._validation_ds, self._test_ds

    def build_pretraining_data_loader(
        self, dataset: Any, consumed_samples: int, dataset_type: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The next class's; of fine-tuning data, batches as its section of `model.data` has them."""
        if not isinstance(dataset, FineTuningData):
            return super().build_pretraining_data_loader(
                dataset, consumed_samples, dataset_type, *args, **kwargs
            )
        values = self.cfg.data.validation_ds if dataset_type == "validation" else self.cfg.data.train_ds
        drop_last = values.get("drop_last", dataset_type != "validation")
        sampler = MegatronCorePretrainingSampler(
            total_samples=len(dataset),
            consumed_samples=consumed_samples,
            micro_batch_size=self.cfg.micro_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            drop_last=drop_last,
            global_batch_size=self.cfg.global_batch_size,
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

    # --- what first weights and logs read of the training data ---------------------------------------------

    @property
    def tokens_per_sample(self) -> float:
        """Tokens of a training sample that count, on average."""
        return self.cfg.data.seq_length if self._survey is None else self._survey.tokens_per_line

    def collate(self, samples: list) -> dict[str, torch.Tensor]:
        """A micro-batch of training samples."""
        return default_collate(samples) if self._survey is None else self._train_ds.collate(samples)

    def sample_from_end(self, index: int) -> Any:
        """The training sample at a place counted from the end; past the first line, nothing to learn."""
        samples = len(self._train_ds)
        if self._survey is None:
            return self._train_ds[samples - 1 - index % samples]
        return self._train_ds[samples - 1 - index if index < self.samples_to_fit else None]

    @property
    def samples_to_fit(self) -> int:
        """Training samples that first weights may be fitted to: of fine-tuning data as many as there are lines, so
        that none is read twice for want of others."""
        return len(self._train_ds) if self._survey is None else self._train_ds.lines

    def samples_from_end(self, tokens: int) -> tuple[int, int]:
        """How many samples at the end hold so many tokens that count, or all there are, and how many these are."""
        if self._survey is None:
            samples = -(-tokens // self.cfg.data.seq_length)
            return samples, samples * self.cfg.data.seq_length
        samples = found = 0
        while found < tokens and samples < self.samples_to_fit:
            found += self._train_ds.learnt_tokens(self.sample_from_end(samples))
            samples += 1
        return samples, found

    def _most_frequent_tokens(self) -> torch.Tensor:
        """[shortlist_size] tokens; of fine-tuning data those that are learnt, since exits are to emit them."""
        if self._survey is None:
            return super()._most_frequent_tokens()
        return self._survey.most_frequent(self.early_exit.head.shortlist_size)
