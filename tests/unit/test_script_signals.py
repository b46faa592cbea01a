# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A script that is told to end leaves nothing half-written, and shows no traceback."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from nemo_ee.runtime.commands import CONF
from tests.support.script import ROOT

SCRIPT = """
import signal
import time

from nemo_ee.files.output import replaced_folder
from nemo_ee.runtime.script import script, user_errors


@script("export_hf", alone=True)
def main(cfg):
    with user_errors(cfg, nemo=False), replaced_folder("out") as part:
        (part / "half").write_text("half")
        print("began", flush=True)
        time.sleep(60)


signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in a shell's background are begun without
main()
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_nothing_half_written_stays(tmp_path, number, status):
    place, home = tmp_path / "place", tmp_path / "home"
    for folder in (place, home / "conf", home / "scripts"):
        folder.mkdir(parents=True)
    shutil.copy(CONF / "export_hf.yaml", home / "conf")
    (home / "scripts" / "wait.py").write_text(SCRIPT)
    command = [
        sys.executable,
        home / "scripts" / "wait.py",
        "kind=base",
        "gpt_model_file=a",
        "output_path=out",
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes) as process:
        assert process.stdout.readline() == "began\n", process.stderr.read()
        assert len([*place.iterdir()]) == 2, "a lock and what becomes the folder"
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == status and "Traceback" not in said, said
    assert [*place.iterdir()] == []
