# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Decoding whose layers lie on several pipeline stages.

Nothing that one process needs.
"""
