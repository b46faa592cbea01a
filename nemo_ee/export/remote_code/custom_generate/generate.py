# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""`generate(custom_generate=FOLDER)` of transformers from 4.52 on: decoding with exits, see `EarlyExits.generate`."""


def generate(*args, model, **kwargs):
    """As `model.generate`, which may leave early.

    Args:
        *args: as transformers'.
        model: of this folder, loaded with `trust_remote_code=True`.
        **kwargs: as transformers', and `early_exit`.

    Raises:
        ValueError: the model has no exits.
    """
    if not hasattr(model, "exits"):
        raise ValueError(
            f"custom_generate: {type(model).__name__} has no exits; load the folder with trust_remote_code=True"
        )
    return type(model).generate(model, *args, **kwargs)
