# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How many rows of a padded embedding are tokens: a tokenizer may have gaps, and fewer or more tokens than rows."""

from nemo.utils.app_state import AppState
from omegaconf import DictConfig

from nemo_ee.checkpoint.conversion.llama import ROWS, vocabulary_divisor
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.generation.text import TextTokenizer


def used_rows(cfg: DictConfig, tokenizer: TextTokenizer, padded: int) -> int:
    """Rows of the embedding that a model may read and choose; those behind are padding.

    Args:
        cfg: model configuration; where it has ``embedding_rows``, as converted models whose embedding is no fit for
            their tokenizer have, they are those. Else one more than the tokenizer's largest id.
        tokenizer: whose `vocab_size` is still one more than its largest id.
        padded: rows that NeMo makes for the *number* of the tokenizer's tokens.

    Raises:
        ConfigError: there are fewer rows than `embedding_rows`, or, in a new model, than ids.
    """
    rows, divisor = cfg.get(ROWS), cfg.get("make_vocab_size_divisible_by", 128)
    tokens = int(tokenizer.nemo.vocab_size)
    if rows is None:
        rows = tokenizer.vocab_size
        if AppState().is_model_being_restored:
            return min(rows, padded)  # it can do without tokens that have no row, as long as no text has them
    if rows > padded:
        rule = f"makes {padded} rows for {tokens} tokens, and {rows} are needed"
        fitting = vocabulary_divisor(tokens, rows)
        remedy = f"set ++model.make_vocab_size_divisible_by={fitting}"
        raise ConfigError(Fault("model.make_vocab_size_divisible_by", divisor, rule, remedy))
    return int(rows)
