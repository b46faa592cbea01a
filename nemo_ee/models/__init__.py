# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The NeMo models.

What is not NeMo's lies in `modeling`, `training` and `decoding`.
"""
