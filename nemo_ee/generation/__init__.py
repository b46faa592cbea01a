# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What NeMo's users call: requests, prompts, texts that stop, NeMo's text generation strategy, the script's settings.

Nothing that decides on a token.
"""
