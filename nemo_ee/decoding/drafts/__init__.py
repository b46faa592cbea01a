# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Lossless decoding: exits draft, full depth verifies; when that pays.

Nothing that is not lossless.
"""
