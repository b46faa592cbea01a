# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's fine-tuning datasets are imported also where Hugging Face's `datasets` is broken."""

import sys

import pytest

from nemo_ee.runtime.upstream.hugging_face_datasets import datasets_or_stand_in


def test_a_stand_in_lasts_as_long_as_the_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # `import datasets` fails
    with datasets_or_stand_in():
        import datasets

        datasets.builder.has_sufficient_disk_space = None
    assert "datasets" not in sys.modules
    with pytest.raises(ImportError, match="datasets cannot be imported"):
        datasets.load_dataset("json")
