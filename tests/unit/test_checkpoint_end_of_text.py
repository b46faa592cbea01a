# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""All ids that end a text come from a Hugging Face folder; what is no id is refused by name."""

import json

import pytest

from nemo_ee.checkpoint import end_of_text
from nemo_ee.errors import CheckpointError


def folder(path, **files):
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": value}))
    return path


@pytest.mark.parametrize(
    ("own", "files", "ids"),
    [
        (2, {"config": 2}, None),
        (2, {}, None),
        (2, {"config": None, "generation_config": None}, None),
        (2, {"config": 2, "generation_config": [2, 18]}, [2, 18]),
        (2, {"config": [18, 2]}, [2, 18]),
        (18, {"config": 2, "generation_config": [2, 2, 7]}, [18, 2, 7]),
        (None, {"config": 2}, [2]),
        (None, {}, None),
        (0, {"config": 0, "generation_config": [0]}, None),
        (2, {"config": []}, None),
    ],
)
def test_the_tokenizers_own_is_first_and_none_is_lost(tmp_path, own, files, ids):
    assert end_of_text.setting(own, end_of_text.of_folder(folder(tmp_path, **files), 100)) == ids


@pytest.mark.parametrize("value", [100, -1, "</s>", True, [2, 100], [2, None], 2.0, {"id": 2}])
def test_what_is_no_id_is_refused_by_name(tmp_path, value):
    folder(tmp_path, config=2, generation_config=value)
    with pytest.raises(CheckpointError) as error:
        end_of_text.of_folder(tmp_path, 100)
    text = str(error.value)
    assert f"{tmp_path}/generation_config.json: eos_token_id={json.dumps(value)}: must be" in text
    assert "below vocab_size=100" in text and text.count("\n") == 0


def test_every_bad_file_is_named(tmp_path):
    with pytest.raises(CheckpointError) as error:
        end_of_text.of_folder(folder(tmp_path, config=500, generation_config=[600]), 100)
    assert "/config.json: eos_token_id=500" in str(error.value)
    assert "/generation_config.json: eos_token_id=[600]" in str(error.value)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config.json: is no JSON"):
        end_of_text.of_folder(tmp_path, 100)
