# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's GPT model with early exits: construction, checkpoints and generation."""

from collections.abc import Collection

import torch
from lightning.pytorch import Trainer
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import (
    MegatronGPTModel,
    mcore_model_customize,
)
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf, open_dict
from torch.nn.functional import gelu

from nemo_ee.checkpoint import targets
from nemo_ee.checkpoint.connector import start_distributed
from nemo_ee.checkpoint.exits.adapter_mixin import EarlyExitAdapterMixin
from nemo_ee.checkpoint.keys import exit_layer, is_exit
from nemo_ee.data.token_rules import named_templates
from nemo_ee.errors import CheckpointError, ConfigError, Fault, OutputError
from nemo_ee.head_config import heads_in_words
from nemo_ee.modeling.activations import tanh_gelu
from nemo_ee.modeling.gpt import EarlyExitGPTModel
from nemo_ee.models.checks.model_checks import (
    adapt_to_machine,
    check_model,
    fuses_gelu,
    machine_settings,
    read_early_exit,
)
from nemo_ee.models.fused_adam import choose_kernels
from nemo_ee.models.generation_mixin import GenerationMixin
from nemo_ee.models.vocabulary import used_rows
from nemo_ee.runtime.upstream.legacy_sentencepiece import name_special_pieces


class MegatronGPTEarlyExitModel(GenerationMixin, EarlyExitAdapterMixin, MegatronGPTModel):
    """`MegatronGPTModel` whose module is an `EarlyExitGPTModel`.

    A plain NeMo GPT `.nemo` restores as a model without exits, or with untrained ones if the override
    configuration has `early_exit`.

    Args:
        cfg: NeMo's GPT model configuration, with `early_exit` (see `nemo_ee.config.EarlyExitConfig`).
        trainer: a Lightning trainer with an NLPDDPStrategy.

    Raises:
        ConfigError: for a configuration that cannot be run, before anything is allocated.
    """

    exits_dtype: torch.dtype | None = None
    """Dtype of the exits' weights; None takes the backbone's."""

    leaves_exits = False
    """Whether restoring may leave exits of a checkpoint behind that the configuration has no place for."""

    def __init__(self, cfg: DictConfig, trainer: Trainer):
        early_exit = read_early_exit(cfg)
        check_model(cfg, trainer.world_size, self.built_layers(cfg))
        given, self._fused_gelu = machine_settings(cfg), fuses_gelu(cfg)
        if off := adapt_to_machine(cfg):
            logging.info(f"Off on this machine: {', '.join(off)}.")
        adapted = machine_settings(cfg)
        with open_dict(cfg):
            cfg.target = f"{type(self).__module__}.{type(self).__qualname__}"
            if early_exit.layers:  # in the words of today, for all that is written from it
                head = OmegaConf.to_container(cfg.early_exit, resolve=True).get("head")
                cfg.early_exit.head = OmegaConf.create(heads_in_words(head))
        super().__init__(cfg, trainer)
        self.early_exit = early_exit
        self._adapted = {key: (given[key], adapted[key]) for key in given if given[key] != adapted[key]}

    @classmethod
    def built_layers(cls, cfg: DictConfig) -> int:
        """Transformer layers that this configuration builds."""
        return cfg.num_layers

    def build_transformer_config(self) -> TransformerConfig:
        """NeMo's; without the kernels that approximate GELU it is approximated all the same."""
        config = super().build_transformer_config()
        if self._fused_gelu and not config.bias_activation_fusion and config.activation_func is gelu:
            config.activation_func = tanh_gelu
        return config

    def model_provider_func(self, pre_process: bool, post_process: bool) -> EarlyExitGPTModel:
        """Builds this pipeline stage's module."""
        self.start_distributed()
        early_exit = read_early_exit(self.cfg, self.true_vocab_size)
        module = EarlyExitGPTModel(
            config=self.transformer_config,
            early_exit=early_exit,
            padded_vocab_size=self.padded_vocab_size,
            vocab_size=self.true_vocab_size,
            truncated=self.transformer_config.num_layers < self.cfg.num_layers,
            exits_dtype=self.exits_dtype or self.transformer_config.params_dtype,
            use_te=None if self.cfg.get("transformer_engine", False) else False,
            max_sequence_length=self.cfg.encoder_seq_length,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=self.cfg.get("share_embeddings_and_output_weights", True),
            position_embedding_type=self.cfg.get("position_embedding_type", "learned_absolute"),
            rotary_percent=self.cfg.get("rotary_percentage", 1.0),
            seq_len_interpolation_factor=self.cfg.get("seq_len_interpolation_factor"),
            rotary_base=self.cfg.get("rotary_base", 10000),
            **self.module_arguments(),
        )
        mcore_model_customize(self.cfg, module)  # Llama 3.1's RoPE scaling, among others
        return module

    def module_arguments(self) -> dict:
        """Further arguments of `EarlyExitGPTModel`, for subclasses."""
        return {}

    def setup_optimization(self, *args, **kwargs):
        """NeMo's; then the kernels of torch's Adam and AdamW, see `fused_adam.choose_kernels`."""
        result = super().setup_optimization(*args, **kwargs)
        if self._optimizer is not None:
            choose_kernels(self._optimizer, self.cfg.optim)
        return result

    def _optim_config_copy(self, optim_config: DictConfig | dict | None) -> DictConfig | None:
        """NeMo's, all of which it hands to the optimizer: without a null that leaves the choice of kernels open."""
        copied = super()._optim_config_copy(optim_config)
        if copied is not None and "fused" in copied and copied.fused is None:
            with open_dict(copied):
                del copied.fused
        return copied

    def start_distributed(self) -> None:
        """Brings up torch.distributed and the model-parallel groups, which attention needs to be built."""
        start_distributed(self.trainer)

    def _build_tokenizer(self) -> None:
        """NeMo's, with what its legacy mode leaves out; refuses a `tokenizer` section that breaks a rule."""
        try:
            super()._build_tokenizer()
        except (CheckpointError, ConfigError, OutputError):
            raise
        except Exception as error:  # every library fails in its own way
            raise ConfigError(_unloadable(self._cfg.tokenizer, error)) from error
        name_special_pieces(self.tokenizer)
        inner = getattr(self.tokenizer, "tokenizer", None)
        if OmegaConf.is_config(
            template := getattr(inner, "chat_template", None)
        ):  # which transformers cannot read
            inner.chat_template = named_templates(OmegaConf.to_container(template))
        self.text_tokenizer  # noqa: B018, before anything is allocated

    def _build_vocab(self) -> None:
        """NeMo's; `padded_vocab_size` is also that of a checkpoint that overrides it."""
        super()._build_vocab()
        self.padded_vocab_size = self.cfg.get("override_vocab_size") or self.padded_vocab_size
        self.true_vocab_size = used_rows(self.cfg, self.text_tokenizer, self.padded_vocab_size)
        self.text_tokenizer.check_ends(self.true_vocab_size)

    def to_config_file(self, path2yaml_file: str) -> None:
        """NeMo's, with the settings that were given instead of those adapted to this machine, for any reader."""
        mine = self._cfg
        self._cfg = mine.copy()
        with open_dict(self._cfg):
            self._cfg.target = targets.WITH_EXITS if self.early_exit.layers else targets.PLAIN
            for key, (given, adapted) in self._adapted.items():
                if self._cfg.get(key) == adapted:
                    self._cfg[key] = given
                if self._cfg.get(key) is None:
                    self._cfg.pop(key, None)
        try:
            super().to_config_file(path2yaml_file)
        finally:
            self._cfg = mine

    @property
    def gpt(self) -> EarlyExitGPTModel:
        """This pipeline stage's module, unwrapped."""
        return self.get_model_module_list()[0]

    def exits_to_take(self, here: Collection[int], saved: DictConfig) -> Collection[int]:
        """Exits whose weights restoring takes from a full checkpoint: all, or none if it has none at all.

        Args:
            here: exit layers that the checkpoint has weights of.
            saved: the checkpoint's configuration.
        """
        return self.early_exit.layers if here else ()

    def state_to_restore(self, taken: Collection[int]) -> ShardedStateDict:
        """What restoring reads from a full checkpoint; exits other than `taken` keep their first weights."""
        whole = MegatronGPTModel.sharded_state_dict(self)
        return {key: entry for key, entry in whole.items() if not is_exit(key) or exit_layer(key) in taken}


def _unloadable(section: DictConfig, error: Exception) -> Fault:
    key = next((key for key in ("type", "model", "vocab_file") if section.get(key) is not None), "library")
    lines = str(error).strip().splitlines() or [type(error).__name__]
    remedy = f"set ++model.tokenizer.{key} to one that is on this machine"
    return Fault(f"model.tokenizer.{key}", section.get(key), f"cannot be loaded ({lines[0][:300]})", remedy)
