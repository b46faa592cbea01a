# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint says under ``target``: the class that NeMo builds for whoever asks for `MegatronGPTModel`.

Not the class that wrote it: one that trains asks for data, and has nothing to add for those who read.
"""

PLAIN = "nemo_ee.models.megatron_gpt_model.MegatronGPTModel"
"""Without exits: NeMo's own, by a name whose import lets NeMo read the tokenizer inside."""
WITH_EXITS = "nemo_ee.models.megatron_gpt_early_exit_model.MegatronGPTEarlyExitModel"
KNOWN = (
    PLAIN,
    WITH_EXITS,
    "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
)
"""All that are imported. NeMo imports whatever module is named; another class in a file counts as none."""
