# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Passes of few tokens on a CPU as one compiled call.

Nothing that a GPU runs.
"""
