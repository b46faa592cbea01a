# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What torch's restricted unpickler lets files do that no file of weights needs: a `bytearray` of any size."""

from torch._weights_only_unpickler import _get_allowed_globals


def refuse_bytearrays() -> None:
    """Takes `bytearray` off the list of `torch.load(…, weights_only=True)`, in this process.

    It is called with a number as gladly as with bytes, and fills as much memory with zeros. Megatron-core and
    transformers call the same function, and so does who loads a part of a tensor.
    """
    _get_allowed_globals().pop("builtins.bytearray", None)
