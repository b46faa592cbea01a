# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What keys may say, checked before memory is allocated.

Nothing that builds a model.
"""
