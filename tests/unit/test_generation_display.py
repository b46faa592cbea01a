# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Marked text, end strings, prompts files: what needs a tokenizer but no model."""

import json

import pytest
from PIL import ImageColor
from rich.color import ColorSystem

from nemo_ee.errors import ConfigError
from nemo_ee.generation.text import TextTokenizer
from nemo_ee.report.style import layer_colours
from nemo_ee.running.display import RESET, marked, painter, summary, token_pieces
from nemo_ee.running.settings import GenerateConfig
from tests.support.tiny_tokenizer import EOS, save_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    return TextTokenizer(AutoTokenizer(str(save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))))


def test_pieces_join_to_the_text_and_characters_stay_whole(tokenizer):
    before, text = tokenizer.encode("the"), " cat é漢 sat"
    tokens = tokenizer.encode(text)
    pieces = token_pieces(tokens, tokenizer, before)
    assert len(pieces) == len(tokens) and "".join(pieces) == text
    assert "é" in pieces and "漢" in pieces and pieces.count("") == 1 + 2  # bytes before a character's last


def test_special_tokens_show_as_their_names(tokenizer):
    cat, sat = tokenizer.encode(" cat"), tokenizer.encode(" sat é")
    pieces = token_pieces([*cat, tokenizer.nemo.eos_id, *sat, tokenizer.nemo.eos_id], tokenizer)
    assert pieces.count(EOS) == 2 and pieces[-1] == EOS
    assert "".join(pieces) == f" cat{EOS} sat é{EOS}" and pieces[-3:-1] == ["", "é"]


def test_marks_and_colours_name_every_exit():
    pieces, layers = ["a", " b", " c"], [10, 20, 30]
    assert marked(pieces, layers, 30, colour=False) == "a[10] b[20] c[30]"
    coloured = marked(pieces, layers, 30, colour=True)
    assert coloured.count(RESET) == 2 and coloured.endswith(" c")
    assert len(set(coloured.split(RESET)[0:2])) == 2


def test_a_terminal_has_the_colours_of_plots():
    """A layer's colour does not depend on which others a text left at."""
    one = marked([" b"], [20], 30, True, exits=(10, 20))
    assert (
        one
        == marked(["a", " b"], [10, 20], 30, True).split(RESET)[1] + RESET
        != marked([" b"], [20], 30, True)
    )
    assert "\n" in marked(["a\n"], [10], 30, True) and marked(["a\n"], [10], 30, True).endswith(f"{RESET}\n")
    wide = painter((10, 20), 30, ColorSystem.TRUECOLOR)("b", 20)
    assert f"48;2;{';'.join(map(str, ImageColor.getrgb(layer_colours((10, 20), 30)[20])))}m" in wide


def test_summary_shares():
    line = summary([10, 10, 30, 20], [0.9, 0.9, 0.5, 0.7], 30, colour=False)
    assert line == "4 tokens: layer 10 50 %, layer 20 25 %, all layers 25 %; mean confidence 0.75"
    assert summary([], [], 30, colour=False) == "no tokens"


def test_end_strings(tokenizer):
    from nemo_ee.generation.stopping import StopRule
    from tests.support.stopping import ended

    ids = tokenizer.encode
    stop = StopRule(tokenizer, ["<|endoftext|>", "the dog", EOS])
    assert stop.texts == ["the dog"] and stop.token_ids == {tokenizer.nemo.eos_id}
    for text in (
        "ran after the dog",
        "ran after the do",
        "the dog ran",
        "the cat sat on the mat " * 40 + "the dog",
    ):
        expected = len(ids(text[: text.find("the dog") + 7])) if "the dog" in text else None
        assert ended(tokenizer, ids(text), ["the dog"]) == expected
    assert (
        ended(tokenizer, [*ids("the cat"), tokenizer.nemo.eos_id, 5], ["the dog"]) == len(ids("the cat")) + 1
    )


def settings(**values):
    return GenerateConfig.from_dict({"gpt_model_file": "m.nemo", **values})


def test_prompts_files(tmp_path):
    lines, records = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("one\n\n two \n")
    records.write_text("\n".join(json.dumps(x) for x in ({"prompt": "a"}, {"text": "b\nc"}, "d")) + "\n")
    assert settings(prompts_file=str(lines)).read_prompts() == ["one", " two "]
    assert settings(prompts_file=str(records)).read_prompts() == ["a", "b\nc", "d"]
    assert settings(prompts=["x"]).read_prompts() == ["x"]


@pytest.mark.parametrize(
    "line, message", [('{"a": 1}', "p.jsonl:3: has no text"), ("{", "p.jsonl:3: is no JSON")]
)
def test_prompts_files_that_are_refused(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n\n{line}\n')
    with pytest.raises(ConfigError, match=message):
        settings(prompts_file=str(path)).read_prompts()


def test_empty_prompts_file_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match="holds no prompts"):
        settings(prompts_file=str(tmp_path / "p.txt")).read_prompts()


def test_every_setting_is_documented_in_the_yaml():
    from pathlib import Path

    from omegaconf import OmegaConf

    import nemo_ee

    root = Path(nemo_ee.__file__).parents[1]
    values = OmegaConf.to_container(OmegaConf.load(root / "conf" / "megatron_gpt_ee_generate.yaml"))
    for key in ("defaults", "hydra", "trainer"):
        del values[key]
    ours = GenerateConfig.from_dict({**values, "gpt_model_file": "m.nemo", "prompts": ["x"]})
    assert ours == settings(prompts=["x"]), "defaults in code and YAML agree"
    fields = set(GenerateConfig.__dataclass_fields__) - {"precision"}
    assert set(values) == fields
    for section in ("inference", "early_exit"):
        assert set(values[section]) == set(getattr(ours, section).__dataclass_fields__)


def test_prompts_may_be_token_ids(tmp_path):
    assert settings(prompts=[[1, 2], [3]]).read_prompts() == [[1, 2], [3]]
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": [7, 8]}\n[9]\n')
    assert settings(prompts_file=str(path)).read_prompts() == [[7, 8], [9]]
    path.write_text('{"prompt": [7, 8]}\n"a"\n')
    for make, key in (
        (lambda: settings(prompts=["a", [1]]), r"prompts=.1 texts, 1 lists of token ids.: must all be texts"),
        (lambda: settings(prompts_file=str(path)).read_prompts(), "prompts_file=.*: must all be texts"),
        (lambda: settings(prompts=[[1]], chat=True), "chat=true: .*; set chat=false"),
        (lambda: settings(prompts=[1, 2]), "prompts=.*expected a list of str or a list of int or null"),
        (lambda: settings(prompts=[[True]]), "prompts=.*expected a list of"),
    ):
        with pytest.raises(ConfigError, match=key):
            make()
    for wrong in ('{"prompt": [1.5]}', '{"prompt": []}', '{"prompt": [true]}'):
        path.write_text(wrong + "\n")
        with pytest.raises(ConfigError, match="has no text under prompt, text, question"):
            settings(prompts_file=str(path)).read_prompts()


def test_an_exit_on_the_last_layer_is_not_called_the_final_one():
    line = summary([4, 8, 8, 8], [0.5] * 4, 8, False, exits=[4, 8])
    assert line.startswith("4 tokens: layer 4 25 %, all layers (exit 8 or the final exit) 75 %;")
    assert "all layers 75 %" in summary([4, 8, 8, 8], [0.5] * 4, 8, False, exits=[4])


def test_prompts_files_keep_unicode_line_separators_and_drop_a_byte_order_mark(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('\ufeff{"prompt": "a\u2028b\x85c"}\r\n{"prompt": "d"}\n', encoding="utf-8")
    assert settings(prompts_file=str(path)).read_prompts() == ["a\u2028b\x85c", "d"]
    (tmp_path / "p.txt").write_text("\ufeffone\x0ctwo\n", encoding="utf-8")
    assert settings(prompts_file=str(tmp_path / "p.txt")).read_prompts() == ["one\x0ctwo"]


def test_faults_have_the_keys_of_the_yaml():
    from nemo_ee.config import parse_early_exit
    from nemo_ee.decoding.request import parse_request
    from nemo_ee.generation.inference_config import in_own_keys

    inference = dict(temperature=-1, tokens_to_generate=-1, min_tokens_to_generate=-2, top_k=-3)
    config = settings(prompts=["x"], inference=inference, early_exit=dict(exits=[3]))
    with pytest.raises(ConfigError) as caught:
        parse_request(**config.generate_arguments(), config=parse_early_exit(dict(layers=[2]), 8))
    keys = {fault.key for fault in in_own_keys(caught.value, "inference").faults}
    assert keys == {f"inference.{name}" for name in inference} | {"early_exit.exits"}


def test_a_directory_or_a_seed_that_cannot_be_used_is_refused_at_once(tmp_path):
    from nemo_ee.running.generate import check

    with pytest.raises(ConfigError, match="output_file=.*: is a directory"):
        check(settings(prompts=["x"], output_file=str(tmp_path)), 1)
    with pytest.raises(ConfigError, match="seed=1180591620717411303424: must fit in 64 bits"):
        settings(prompts=["x"], seed=2**70)


def test_chats_have_the_bos_of_their_template():
    with pytest.raises(
        ConfigError, match="inference.add_BOS=true: with chat=true .*; set inference.add_BOS=null"
    ):
        settings(prompts=["x"], chat=True, inference=dict(add_BOS=True))
    assert settings(prompts=["x"], chat=True).inference.add_BOS is None
