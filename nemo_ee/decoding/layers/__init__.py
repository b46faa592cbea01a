# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Layers and heads as functions of their weights, on packed tokens with caches.

Nothing of sequences or exits' decisions.
"""
