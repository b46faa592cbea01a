# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""GGUF files as a source of models: every key and tensor is used as llama.cpp uses it, or refused by name."""

from nemo_ee.checkpoint.gguf.file import GGUFFile, inspect, is_gguf

__all__ = ["GGUFFile", "inspect", "is_gguf"]
