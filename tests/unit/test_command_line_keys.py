# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Every script refuses a key that its file in conf/ lacks by one message, with what was meant, before Hydra does."""

import shlex

import pytest
from hydra import compose, initialize_config_dir

from nemo_ee.errors import ConfigError
from nemo_ee.models.checks.command_line import check_command_line
from nemo_ee.runtime.command_line import check_keys, listed_values
from nemo_ee.runtime.commands import COMMANDS, CONF
from tests.support.script import ROOT

HYDRAS = {script for script in COMMANDS.values() if (CONF / f"{script}.yaml").is_file()}
TRAINING = {"megatron_gpt_ee_pretraining", "megatron_gpt_ee_tuning"}
OTHERS = sorted(HYDRAS - TRAINING)


def messages(name: str, *words: str) -> list[str]:
    try:
        check_keys(name, words)
    except ConfigError as error:
        return [str(fault) for fault in error.faults]
    return []


def test_all_scripts_but_the_one_without_a_file_are_meant():
    assert set(COMMANDS.values()) - HYDRAS == {"fetch_package_file"}


@pytest.mark.parametrize("name", OTHERS)
def test_all_listed_keys_are_known_with_and_without_a_plus(name):
    words = [f"{key}=1" for key in listed_values(name)]
    assert messages(name, *words, *(f"++{word}" for word in words)) == []


@pytest.mark.parametrize("plus", ["", "+", "++", "~"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_misspelt_key_is_answered_with_the_right_one(name, plus):
    key = next(iter(key for key in listed_values(name) if key not in ("hydra", "defaults")))
    written = key[:-1]
    word, shown = (
        (f"~{written}", f"~{written}=null") if plus == "~" else (f"{plus}{written}=a", f"{written}=a")
    )
    (found,) = messages(name, word)
    assert found.startswith(f"{shown}: unknown key; did you mean ")


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("export_hf", "formatt=a", "formatt=a: unknown key; leave it out; see conf/export_hf.yaml"),
        (
            "evaluate_early_exit",
            "~trainer.foo",
            "~trainer.foo=null: unknown key; leave it out; see conf/evaluate_early_exit.yaml",
        ),
        (
            "megatron_gpt_ee_generate",
            "greedy=false",
            "greedy=false: unknown key; did you mean inference.greedy?",
        ),
        (
            "megatron_gpt_ee_generate",
            "inferenc.top_q=1",
            "inferenc.top_q=1: unknown key; did you mean inference.top_p?",
        ),
        (
            "merge_early_exits",
            "+overwrit=${overwrite}",
            "overwrit=${overwrite}: unknown key; did you mean overwrite?",
        ),
        ("export_hf", "KINDS=a", "KINDS=a: unknown key; did you mean kind?"),
        ("export_hf", "lyer=3,6", "lyer=3,6: unknown key; did you mean layer?"),
        (
            "megatron_gpt_ee_generate",
            "inference.greedyy=false",
            "inference.greedyy=false: unknown key; did you mean inference.greedy?",
        ),
        (
            "megatron_gpt_ee_generate",
            "early_exit={thresold: 0.5, exits: [2]}",
            "early_exit.thresold=0.5: unknown key; did you mean early_exit.threshold?",
        ),
        (
            "export_hf",
            "trainer.devices=2",
            "trainer.devices=2: unknown key; leave it out; see conf/export_hf.yaml",
        ),
    ],
)
def test_sections_and_mappings_are_looked_into(name, word, message):
    assert messages(name, word) == [message]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("evaluate_early_exit", "trainer.profiler=simple"),
        ("edit_early_exits", "early_exit.head={norm: false}"),
        ("edit_early_exits", "moves.8=9"),
        ("edit_early_exits", "moves={8: 9}"),
    ],
)
def test_what_a_section_takes_besides_is_added_by_the_pasted_remedy(name, word):
    (found,) = messages(name, word)
    pasted = shlex.split(found.rpartition("; set ")[2])
    assert pasted == [f"+{word}"] and messages(name, *pasted) == []
    with initialize_config_dir(f"{ROOT}/conf", version_base=None):
        compose(name, overrides=pasted)


@pytest.mark.parametrize(
    "words",
    [
        ["+moves.8=9", "moves.8=10"],
        ["+base=/x", "gpt_model_file=${base}/m.nemo"],
        ["+base=/x", "hydra.run.dir=${oc.select:base,a}"],
        ["hydra.searchpath=[/dir]", "+experiment=mine"],
        ["+split.a=1", "~split.a"],
    ],
)
def test_what_was_added_is_known(words):
    assert messages("preprocess_text" if "split" in words[0] else "edit_early_exits", *words) == []


def test_completion_in_shells_goes_on():
    assert messages("train_tokenizer", "-sc", "install=bash") == []


@pytest.mark.parametrize(
    "word", ["hydra.run.dir=x", "hydra/job_logging=default", "--cfg=job", "--config-name=mine"]
)
def test_hydras_own_options_and_files_of_the_users_own_are_not_looked_at(word):
    assert messages("export_hf", word) == []
    assert messages("export_hf", "--config-name=mine", "mine=1") == []
    for name in TRAINING:
        check_command_line(name, [word])
