# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""From packed tokens to the next ones, with cached keys and values: who leaves where, in one process or over stages.

No NeMo, no text: token ids go in and come out.
"""
