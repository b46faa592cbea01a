# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""When asking exits pays, and drafting with them: by prices of passes and by what exits said so far.

Nothing that runs a model.
"""
