# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Trains a byte-level BPE tokenizer on the training documents of a corpus.

    python scripts/train_tokenizer.py input=articles.json json_key=extract output=tokenizer

writes a Hugging Face tokenizer directory, for tokenizer.type of preprocess_text.py and for
model.tokenizer.type of pre-training. Every setting is explained in conf/train_tokenizer.yaml.
"""

from omegaconf import DictConfig, OmegaConf

from nemo_ee.preprocessing.tokenizer_training import TokenizerTrainingConfig, train_tokenizer
from nemo_ee.runtime.script import script, user_errors


@script("train_tokenizer")
def main(cfg: DictConfig) -> None:
    """Trains what `cfg` describes; a user's error ends it with one message and status 1."""
    with user_errors(cfg, nemo=False):
        config = TokenizerTrainingConfig.from_dict(OmegaConf.to_container(cfg, resolve=True))
        trained = train_tokenizer(config)
    print(
        f"{config.output}: {trained.vocabulary_size:,} tokens, learned from {trained.documents:,} documents; "
        f"{trained.bytes_per_token:.2f} bytes per token of them"
    )
    if trained.vocabulary_size < config.vocabulary_size:
        print(f"fewer than vocabulary_size={config.vocabulary_size}: the text has no more pairs to merge")


if __name__ == "__main__":
    main()
