# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which tokens end a model's text: a chat model often has one for a turn and another for a document."""

import json
from collections.abc import Iterable
from pathlib import Path

from nemo_ee.errors import CheckpointError
from nemo_ee.files import plain_json

KEY = "eos_token_ids"
"""Of the ``tokenizer`` section; all ids that end a text. Absent or null: the tokenizer's own EOS alone."""
_FILES = ("generation_config.json", "config.json")


def of_folder(folder: Path, rows: int) -> tuple[int, ...]:
    """The ids that a Hugging Face folder's ``generation_config.json`` and ``config.json`` say end a text.

    Args:
        folder: a model directory; either file may be missing, and ``eos_token_id`` an id, a list or null.
        rows: of the embedding; an id must be below.

    Raises:
        CheckpointError: a file is no JSON; or names what is no id of this model, each on a line of its own.
    """
    found, faults = [], []
    for file in (folder / name for name in _FILES):
        value = plain_json.load_section(file).get("eos_token_id") if file.is_file() else None
        ids = value if isinstance(value, list) else [value] if value is not None else []
        if all(type(token) is int and 0 <= token < rows for token in ids):
            found += ids
        else:
            rule = f"must be an id below vocab_size={rows}, a list of such, or null"
            faults.append(f"{file}: eos_token_id={json.dumps(value)}: {rule}; correct it in that file")
    if faults:
        raise CheckpointError("\n".join(faults))
    return tuple(found)


def setting(own: int | None, others: Iterable[int]) -> list[int] | None:
    """What `KEY` says for a tokenizer whose own EOS is ``own``: it first, every id once; None: it alone."""
    ids = list(dict.fromkeys([*([] if own is None else [own]), *others]))
    return None if ids == [own] or not ids else ids
