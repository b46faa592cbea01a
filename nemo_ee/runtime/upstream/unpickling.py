# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What unpicklers let files do that no file of weights needs: a `bytearray` of any size, other classes' attributes."""

import pickle
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch._weights_only_unpickler import _get_allowed_globals


def refuse_bytearrays() -> None:
    """Takes `bytearray` off the list of `torch.load(…, weights_only=True)`, in this process.

    It is called with a number as gladly as with bytes, and fills as much memory with zeros. Megatron-core and
    transformers call the same function, and so does who loads a part of a tensor.
    """
    _get_allowed_globals().pop("builtins.bytearray", None)


@contextmanager
def unchanged(kinds: Collection[type]) -> Iterator[None]:
    """Undoes what a pickle does to classes that it may name: it can set attributes of them as of objects.

    Raises:
        pickle.UnpicklingError: it did.
    """
    before = {kind: dict(vars(kind)) for kind in kinds}
    try:
        yield
    finally:
        changed = [kind for kind, said in before.items() if dict(vars(kind)) != said]
        for kind in changed:
            for name in vars(kind).keys() - before[kind].keys():
                delattr(kind, name)
            for name, value in before[kind].items():
                if vars(kind).get(name) is not value:
                    setattr(kind, name, value)
    if changed:
        raise pickle.UnpicklingError(f"it changes {changed[0].__name__}")
