# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's own GPT model, under a name whose import lets NeMo read the tokenizer inside a ``.nemo``.

The ``target`` of checkpoints without exits: NeMo imports it before it builds the model, whichever of its classes and
connectors restores the file. ``conf/convert_llama_hf_to_nemo.yaml`` says what to do where this package is missing.
"""

from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

from nemo_ee.runtime.upstream import archived_tokenizer

__all__ = ["MegatronGPTModel"]

archived_tokenizer.install()
