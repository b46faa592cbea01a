# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Chats that a model writes itself, for tuning its exits: prompts, answers at full depth, NeMo's JSONL."""
