# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What scripts that run a model share: restoring it, prompts in files, texts on a terminal; and generation's script.

Nothing that trains, and nothing of one such script alone but generation's.
"""
