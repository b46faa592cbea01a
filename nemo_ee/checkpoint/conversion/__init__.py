# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Hugging Face folders and GGUF files to `.nemo`.

Nothing that restores.
"""
