# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Imports NeMo modules that name Hugging Face's `datasets` at their top where that cannot be imported.

NeMo's fine-tuning datasets (nemo-toolkit 2.4.1, `gpt_sft_dataset`) need it for `hf_dataset=true` alone. It is easily
broken: releases of pyarrow, which it needs, want NumPy 2, and NeMo wants NumPy 1.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any


@contextmanager
def datasets_or_stand_in() -> Iterator[None]:
    """Within, `import datasets` works: it gives the package, or where that fails a module that can load nothing."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        reason = error
    else:
        yield
        return

    def load_dataset(*_: Any, **__: Any) -> None:
        raise ImportError(f"Hugging Face's datasets cannot be imported: {reason}")

    stand_in = ModuleType("datasets")
    stand_in.builder, stand_in.load_dataset = SimpleNamespace(), load_dataset
    sys.modules["datasets"] = stand_in
    try:
        yield
    finally:
        del sys.modules["datasets"]
