# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What every worker process of `tests.support.distributed` has imported before it is forked."""

from nemo_ee.runtime import stand_ins

stand_ins.enable()

import nemo.collections.nlp.models.language_modeling.megatron_gpt_model  # noqa: E402, F401
import pytest  # noqa: E402, F401
