# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Models as Hugging Face folders, which run where this package is not.

No model is built: tensors are read from the checkpoint one by one. Nothing that restores, generates or trains.
"""
