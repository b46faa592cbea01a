# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Names of files may be pasted on every script's command line, whatever is in them; else an error shows the quoting."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_ee.errors import ConfigError
from nemo_ee.runtime.command_line import quote_paths

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if "@script(" in path.read_text())
CHECKPOINT = "/runs/megatron_gpt--val_loss=1.24-step=4-consumed_samples=8.0.nemo"
LITERAL = [
    CHECKPOINT,
    "a,b.nemo",
    "model(1).nemo",
    "range(1,3)",
    "a{b}.nemo",
    "[2024] model.nemo",
    "my model.nemo",
    " spaced ",
    "$a b$",
    "it's.nemo",
    'say "hi".nemo',
    "both'\".nemo",
    "modèle#1;é.nemo",
    "123",
    "1e5",
    "true",
    "x~",
    "a@b:c",
]
READ_BY_HYDRA = {
    "null": None,
    '"q=1"': "q=1",
    "'q=1'": "q=1",
    r"a\=b": "a=b",
    "[a=b,1.5,c]": ["a=b", 1.5, "c"],
    "{train:[a=b],test:null}": {"train": ["a=b"], "test": None},
}


def composed(script: Path, *arguments: str):
    name = re.search(r'@script\("(\w+)"\)', script.read_text())[1]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose(name, overrides=quote_paths(arguments))


def merged(value: str):
    return composed(ROOT / "scripts/merge_early_exits.py", f"adapter_file={value}").adapter_file


def test_all_scripts_read_their_command_line_alike():
    assert len(SCRIPTS) >= 11
    for path in (ROOT / "scripts").glob("*.py"):
        assert "hydra.main" not in path.read_text(), f"{path.name}: use nemo_ee.runtime.script.script"


@pytest.mark.parametrize("path", LITERAL)
def test_a_path_means_itself(path):
    assert merged(path) == path
    assert quote_paths(quote_paths([f"adapter_file={path}"])) == quote_paths([f"adapter_file={path}"])


@pytest.mark.parametrize("value", READ_BY_HYDRA)
def test_what_is_quoted_or_a_list_is_read_as_hydra_reads_it(value):
    read = merged(value)
    assert (OmegaConf.to_container(read) if OmegaConf.is_config(read) else read) == READ_BY_HYDRA[value]


def test_home_is_the_users():
    assert merged("~/x=1.nemo") == f"{os.environ['HOME']}/x=1.nemo"


PATH = re.compile(
    r"(_file|_path|_dir|_ckpt|_prefix|(^|\.)(prefix|data_prefix|input|nemo)|tokenizer\.(type|model))$"
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_path_of_every_script_takes_a_checkpoints_name(script):
    def keys(config, section=""):
        for key, value in OmegaConf.to_container(config).items():
            if isinstance(value, dict):
                yield from keys(config[key], f"{section}{key}.")
            elif PATH.search(section + key):
                yield section + key

    paths = list(keys(composed(script)))
    assert paths
    config = composed(script, *(f"{key}={CHECKPOINT}" for key in paths))
    for key in paths:
        assert OmegaConf.select(config, key) == CHECKPOINT, key


def test_other_keys_are_refused_with_what_works():
    wrong = ["prompts=[a=b,Hello (you)]", "name=it's=1", "layers=[1,2", "trainer.devices=2"]
    with pytest.raises(ConfigError) as error:
        quote_paths(wrong)
    first, second, third = error.value.faults
    assert (third.key, third.remedy) == ("layers", "close what it opens")
    (pasted,) = shlex.split(first.remedy.removeprefix("write "))
    generate = ROOT / "scripts/megatron_gpt_ee_generate.py"
    assert list(composed(generate, pasted).prompts) == ["a=b", "Hello (you)"]
    (pasted,) = shlex.split(second.remedy.removeprefix("write "))
    assert composed(ROOT / "scripts/megatron_gpt_ee_tuning.py", pasted).name == "it's=1"


def test_options_of_hydra_and_sweeps_that_are_asked_for_stay():
    same = ["--cfg", "job", "-m", "adapter_file=a,b", "~adapter_file", "hydra.run.dir=."]
    assert quote_paths(same) == same


def test_a_script_takes_a_pasted_name_and_refuses_in_one_line():
    command = [sys.executable, str(ROOT / "scripts/merge_early_exits.py"), "--cfg", "job"]

    def run(*more):
        return subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT, timeout=120)

    fine = run(f"gpt_model_file={CHECKPOINT}")
    assert fine.returncode == 0 and OmegaConf.create(fine.stdout).gpt_model_file == CHECKPOINT
    wrong = run("overwrite=a=b")
    assert wrong.returncode == 1 and wrong.stdout == ""
    rule = "has characters that mean something else to Hydra"
    assert wrong.stderr == f"error: overwrite=a=b: {rule}; write 'overwrite=\"a=b\"'\n"
