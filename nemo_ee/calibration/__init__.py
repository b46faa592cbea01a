# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Thresholds that keep an agreement, with a finite-sample guarantee: mathematics, measurements, report.

Nothing that decoding needs.
"""
