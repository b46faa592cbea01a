# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Early exits for NVIDIA NeMo GPT models. Importing this package changes nothing and loads nothing heavy."""

__version__ = "0.2.0"
