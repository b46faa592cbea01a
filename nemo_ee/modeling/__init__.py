# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The GPT with exit heads as megatron-core modules: layers, heads, projections, their first weights.

No NeMo, and nothing of how it is trained or decoded.
"""
