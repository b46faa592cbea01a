# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Passes on a GPU: graphs captured and replayed, flash attention.

Nothing that a CPU runs.
"""
