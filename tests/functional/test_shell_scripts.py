# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The quickstarts and env.sh around the Python that they run, which a stub stands for."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB = """#!/bin/bash
# Leaves the file that the real script would leave; a file `fail` in its folder names one that fails, with the status in
# a file `status`, or 7.
here="$(dirname "$0")"
echo "$*" >>"$here/calls"
[ "$1" = -c ] && exit 1
[ -e "$here/fail" ] && grep -q "$(basename "$1" .py)" "$here/fail" && exit "$(cat "$here/status" 2>/dev/null || echo 7)"
for word in "$@"; do
    case "$word" in
    output_file=* | output_path=* | exp_manager.exp_dir=* | output_prefix=* | output=*) place="${word#*=}" ;;
    name=*) name="${word#*=}" ;;
    esac
done
case "$1" in
*convert* | *calibrate*) touch "$place" ;;
*preprocess*) touch "$place.json" ;;
*generate_tuning_text*) touch "${place}_train.jsonl" "${place}_validation.jsonl" "$place.json" ;;
*train_tokenizer.py) mkdir -p "$place" ;;
*tuning.py | *ee_pretraining.py)
    mkdir -p "$place/$name/checkpoints" && touch "$place/$name/checkpoints/$name.nemo" ;;
*steps*) echo 100 ;;
esac
"""


@pytest.fixture
def venv(tmp_path) -> Path:
    """An environment that env.sh did not make, and so uses as it is."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)
    return tmp_path / "venv"


def bash(command: str, venv: Path, **environment: str) -> subprocess.CompletedProcess:
    chosen = ("CUDA_VISIBLE_DEVICES", "NEMO_EE_PYTHON")  # by whoever runs the tests
    kept = {key: value for key, value in os.environ.items() if key not in chosen}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env={**kept, "NEMO_EE_VENV": str(venv), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def quickstart(tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    command = f"bash scripts/quickstart.sh --work {tmp_path / 'work'} {' '.join(options)}"
    return bash(command, tmp_path / "venv")


def test_quickstart_goes_on_where_a_stage_failed(tmp_path, venv):
    failing = venv / "bin" / "fail"
    for stage, left in (("generate_tuning_text", "chats.json"), ("quickstart_steps", "steps")):
        failing.write_text(stage)
        assert quickstart(tmp_path).returncode == 7
        assert not (tmp_path / "work" / left).exists(), "what failed counts as not done"
    failing.unlink()
    done = quickstart(tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work" / "steps").read_text() == "100\n"
    calls = (venv / "bin" / "calls").read_text()
    assert (
        calls.count("name=closed_form") == 1
        and "trainer.max_steps=100 trainer.val_check_interval=25" in calls
    )
    assert "overwrite=true" in calls, "a data set that was published in part is no obstacle"


def test_quickstart_tunes_on_answers_and_asks_other_questions_in_its_report(tmp_path, venv):
    assert quickstart(tmp_path, "--minutes 15").returncode == 0
    calls = (venv / "bin" / "calls").read_text().splitlines()
    (written,) = [call for call in calls if "generate_tuning_text.py" in call]
    held_out = "scripts/benchmarks/held_out_prompts.jsonl"
    assert f" prompts.exclude_file={held_out} minutes=4.5 " in written
    sources = re.search(r"prompts.directory=(\S+)", written)[1]
    for file in ("wikipedia-intros.json", "boolq-questions.jsonl", "gsm8k-questions.jsonl"):
        (fetched,) = [call for call in calls if f"--output {sources}/{file}" in call]
        assert f" {file.partition('.')[0]} " in fetched
    assert any("quickstart/quickstart_steps.py" in call and call.endswith(" 8.40") for call in calls), (
        "of 10.5 minutes"
    )
    runs = [call for call in calls if "ee_tuning.py" in call]
    closed, tuned = runs
    assert "wikipedia_train]" in closed and "chat=true" not in closed
    assert "chat=true" in tuned and "chats_train.jsonl]" in tuned and "data_prefix" not in tuned
    (report,) = [call for call in calls if "evaluate_early_exit.py" in call]
    assert f"chat_prompts_file={held_out} " in report and "data.prefix=" in report


def test_quickstart_calibrates_on_answers_that_were_not_tuned_on(tmp_path, venv):
    """Generation and report use what was calibrated; also where no exit pays, which has a status of its own."""
    (venv / "bin" / "fail").write_text("calibrate_early_exit")
    assert quickstart(tmp_path).returncode == 7
    (venv / "bin" / "status").write_text("2")
    done = quickstart(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "it is a point estimate, of which nothing is promised" in done.stdout
    (venv / "bin" / "fail").unlink()
    (venv / "bin" / "calls").unlink()
    assert quickstart(tmp_path).returncode == quickstart(tmp_path).returncode == 0
    calls = (venv / "bin" / "calls").read_text().splitlines()
    (calibration,) = [call for call in calls if "calibrate_early_exit.py" in call]
    for part in ("chats_validation.jsonl", "guarantee=false", "tuned.nemo", "target_agreement=0.95"):
        assert part in calibration
    for script in ("megatron_gpt_ee_generate.py", "evaluate_early_exit.py"):
        assert all("/calibrated.nemo " in call for call in calls if script in call)
    assert any(",calibrated] generation.sample_threshold=calibrated " in call for call in calls)


def test_quickstart_refuses_other_options_in_the_same_directory(tmp_path, venv):
    assert quickstart(tmp_path, "--layers '[5, 10]'").returncode == 0
    assert quickstart(tmp_path, "--layers [5,10]").returncode == 0, "blanks do not matter"
    other = quickstart(tmp_path, "--layers [5,20]")
    assert other.returncode == 2
    assert "was begun with --minutes 8 --layers [5,10]" in other.stderr and "--work" in other.stderr


def pretraining(tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    command = f"bash scripts/quickstart_pretraining.sh --work {tmp_path / 'work'} {' '.join(options)}"
    return bash(command, tmp_path / "venv")


def test_pretraining_quickstart_goes_on_where_a_stage_failed(tmp_path, venv):
    (venv / "bin" / "fail").write_text("quickstart_steps compare_pretraining")
    assert pretraining(tmp_path).returncode == 7
    assert not (tmp_path / "work" / "steps").exists(), "what failed counts as not done"
    (venv / "bin" / "fail").write_text("compare_pretraining")
    assert pretraining(tmp_path).returncode == 7
    (venv / "bin" / "fail").unlink()
    done = pretraining(tmp_path)
    assert done.returncode == 0 and "report.md" in done.stdout, done.stderr
    calls = (venv / "bin" / "calls").read_text().splitlines()
    runs = {name: [call for call in calls if f"name={name} " in call] for name in ("with_exits", "plain")}
    assert [len(of_run) for of_run in runs.values()] == [1, 1]
    steps = "trainer.max_steps=96 trainer.val_check_interval=12 "
    assert all(steps in call for of_run in runs.values() for call in of_run), "8 validations, one at the end"
    zero = " model.early_exit.training.loss_weights=[0,0,0]"
    assert runs["plain"][0] == runs["with_exits"][0].replace("name=with_exits", "name=plain") + zero


def test_pretraining_quickstart_refuses_what_it_does_not_know(tmp_path, venv):
    assert pretraining(tmp_path, "--minutes 3").returncode == 0
    other = pretraining(tmp_path)
    assert other.returncode == 2 and "was begun with --minutes 3" in other.stderr
    for options in ("--minutes 0", "--minutes", "--layers [3]"):
        refused = pretraining(tmp_path, options)
        assert refused.returncode == 2 and refused.stderr.startswith("error: ")


def test_env_leaves_foreign_files_and_the_calling_shell_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("a year's work")
    done = bash("source scripts/env.sh || echo still here", tmp_path / "mine")
    assert "still here" in done.stdout and "error: " in done.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_env_makes_anew_what_was_interrupted(tmp_path):
    """The Python is there, pip is not: neither is mistaken for an environment of the user's."""
    fake = tmp_path / "tools" / "python3.11"
    fake.parent.mkdir()
    # Finds itself fit, makes an environment that lacks everything but a python, and is interrupted.
    fake.write_text(
        '#!/bin/bash\n[ "$2" = venv ] || { echo 3.11 && exit 0; }\nmkdir -p "${@: -1}/bin"\n'
        'printf "#!/bin/bash\\nexit 1\\n" >"${@: -1}/bin/python"\nchmod +x "${@: -1}/bin/python"\nexit 130\n'
    )
    fake.chmod(0o755)
    path = f"{fake.parent}:{os.environ['PATH']}"
    venv = tmp_path / "venv"
    for _ in range(2):
        done = bash("source scripts/env.sh && echo ready", venv, PATH=path)
        assert "ready" not in done.stdout and (venv / "nemo_ee_made_this").exists()


@pytest.mark.parametrize("given", [None, "0"])
def test_env_leaves_a_gpu_that_is_there_in_sight(venv, given):
    """Whatever Python finds out about packages."""
    python = venv / "bin" / "python"
    python.write_text("#!/bin/bash\nexit 0\n")
    chosen = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    done = bash('source scripts/env.sh; echo "devices=${CUDA_VISIBLE_DEVICES-unset}."', venv, **chosen)
    assert done.stdout == f"devices={given or 'unset'}.\n"
