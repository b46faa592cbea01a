# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How exits learn: losses and where their gradients join, schedules, the tuning step, what fills a pipeline's bubbles.

No NeMo, and nothing that only decoding needs.
"""
