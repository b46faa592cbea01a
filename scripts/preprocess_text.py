# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Turns text files into Megatron's indexed dataset for training, validation and test.

    python scripts/preprocess_text.py input=articles.json json_key=extract output_prefix=data/wiki \\
        tokenizer.type=DIRECTORY_OF_A_HUGGING_FACE_TOKENIZER

writes data/wiki_train.bin and .idx, data/wiki_validation.bin and .idx, and data/wiki.json with the counts.
Every setting is explained in conf/preprocess_text.yaml; override it on the command line as above.
"""

from omegaconf import DictConfig, OmegaConf

from nemo_ee.preprocessing.preprocess import preprocess
from nemo_ee.preprocessing.preprocess_config import PreprocessConfig
from nemo_ee.runtime.script import script, user_errors


@script("preprocess_text")
def main(cfg: DictConfig) -> None:
    """Runs the preprocessing that ``cfg`` describes; a user's error ends it with one message and status 1."""
    with user_errors(cfg, nemo=False):
        summary = preprocess(PreprocessConfig.from_dict(OmegaConf.to_container(cfg, resolve=True)))
    for split, count in (summary["splits"] or {"all": summary}).items():
        print(f"{split}: {count['documents']:,} documents, {count['tokens']:,} tokens")


if __name__ == "__main__":
    main()
