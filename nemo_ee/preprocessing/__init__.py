# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Text of strangers to indexed datasets.

Nothing that reads these.
"""
