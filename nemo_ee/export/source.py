# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What an export reads: a base and perhaps exits, checked before weights are read."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from nemo_ee.checkpoint import archive, keys, model_config
from nemo_ee.checkpoint.conversion.base import BaseCheckpoint
from nemo_ee.checkpoint.conversion.llama import ROWS
from nemo_ee.checkpoint.exits import adapter
from nemo_ee.checkpoint.stored_tensors import StoredTensor, stored_tensors
from nemo_ee.config import EarlyExitConfig
from nemo_ee.errors import CheckpointError, ConfigError, Fault
from nemo_ee.export.llama_weights import LlamaWeights
from nemo_ee.export.plain_llama import check_plain
from nemo_ee.export.settings import ExportConfig
from nemo_ee.export.tokenizer_folder import ExportedTokenizer, exported_tokenizer
from nemo_ee.models.checks.model_checks import read_early_exit

TUNE_FIRST = (
    "set adapter_file to exits tuned on this base; to tune some: python scripts/megatron_gpt_ee_tuning.py "
    "model.restore_from_path={} … (docs/tuning.md)"
)
"""What to do where there are no exits at all."""


@dataclass(frozen=True)
class Source:
    """An open checkpoint whose backbone is a plain Llama, Mistral or Qwen2.

    Attributes:
        model: the base's `model` section.
        early_exit: the exits; without layers where there are none.
        tensors: the base's, and the exits' under `exits.`, by canonical name.
        rows: of the embedding, padding apart.
        tokenizer: the base's.
        name: of the base's file, for people.
        exits_name: of the file with the exits.
    """

    model: DictConfig
    early_exit: EarlyExitConfig
    tensors: Mapping[str, StoredTensor]
    rows: int
    tokenizer: ExportedTokenizer
    name: str
    exits_name: str

    def weights(self) -> LlamaWeights:
        """The tensors under Hugging Face's names."""
        return LlamaWeights(self.tensors, self.model, self.rows, self.name)


@contextmanager
def opened(config: ExportConfig) -> Iterator[Source]:
    """Opens what an export reads. Configurations are checked before anything is unpacked.

    Raises:
        CheckpointError: a file is missing, damaged, hostile, or the exits are another base's.
        ConfigError: no plain Llama, Mistral or Qwen2 computes the base; a tokenizer that is another model's.
    """
    base = archive.read_config(config.gpt_model_file)
    model_config.refuse_adapter(config.gpt_model_file, base)
    model_config.require(base, config.gpt_model_file)
    check_plain(base, config.gpt_model_file)
    exits = None if config.adapter_file is None else adapter.read_adapter_config(config.adapter_file)
    if exits is not None:
        adapter.check_fit(config.adapter_file or "", exits, base)
    early_exit = read_early_exit(base if exits is None else exits)
    with ExitStack() as stack:
        tokenizer = stack.enter_context(exported_tokenizer(config.gpt_model_file, base, config.tokenizer))
        tensors = stack.enter_context(stored_tensors(config.gpt_model_file))
        if exits is not None:
            checkpoint = BaseCheckpoint(config.gpt_model_file)
            adapter.check_hash(config.adapter_file or "", exits, checkpoint.name, checkpoint.content_hash)
            theirs = stack.enter_context(stored_tensors(config.adapter_file or ""))
            tensors = {key: tensor for key, tensor in tensors.items() if not keys.is_exit(key)} | theirs
        yield Source(
            model=base,
            early_exit=early_exit,
            tensors=tensors,
            rows=_rows(base, tensors, tokenizer, config),
            tokenizer=tokenizer,
            name=Path(config.gpt_model_file).name,
            exits_name=Path(config.adapter_file or config.gpt_model_file).name,
        )


def _rows(
    model: DictConfig, tensors: Mapping[str, StoredTensor], tokenizer: ExportedTokenizer, config: ExportConfig
) -> int:
    """Rows of the embedding that count, as `used_rows` has it for restored models."""
    embedding = tensors.get("embedding.word_embeddings.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{config.gpt_model_file}: has no embedding.word_embeddings.weight; copy the checkpoint again"
        )
    most = model.get(ROWS) or embedding.shape[0]
    padding = model.get("make_vocab_size_divisible_by", 128) * model.get("tensor_model_parallel_size", 1) - 1
    least = 1 if model.get(ROWS) else most - padding
    if config.tokenizer is not None and not least <= tokenizer.rows <= most:
        rule = f"has token ids up to {tokenizer.rows - 1}, and the model has {most} rows of an embedding"
        if tokenizer.rows < least:
            rule += f", of which at most {padding} are padding"
        raise ConfigError(Fault("tokenizer", config.tokenizer, rule, "give one with the model's own ids"))
    return model.get(ROWS) or min(tokenizer.rows, embedding.shape[0])
