# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Chats: templates, which tokens are answers, NeMo's fine-tuning datasets."""
