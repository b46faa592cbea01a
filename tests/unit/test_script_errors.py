# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What scripts turn into one line of text, and what they leave alone."""

import errno
import logging
import platform
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_ee.errors import DataError
from nemo_ee.runtime import script
from nemo_ee.runtime.script import user_errors

ROOT = Path(__file__).parents[2]
CONFIG = OmegaConf.create({"model": {"path": "???", "size": 1}, "output": "???", "same": "${output}"})


def message_of(work, cfg=None) -> str:
    with pytest.raises(SystemExit) as left, user_errors(cfg, nemo=False):
        work()
    return left.value.code


def test_every_missing_key_is_named_before_any_work():
    def work():
        raise AssertionError("not reached")

    message = message_of(work, CONFIG)
    assert message.startswith("error: model.path=???: is required; set model.path=…\n")
    assert "output=???: is required" in message


def test_a_missing_key_found_at_work():
    assert message_of(lambda: CONFIG.model.path) == "error: model.path=???: is required; set model.path=…"


def test_a_package_that_is_not_nvidias_apex(tmp_path, monkeypatch):
    """NeMo's optimizers go on without Apex where it is not found, but not where its import fails."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("from string import no_such_name")
    monkeypatch.syspath_prepend(tmp_path)

    def work():
        import apex  # noqa: F401

    message = message_of(work)
    assert "Apex is installed" in message and "no_such_name" in message and "pip uninstall apex" in message


@pytest.mark.parametrize("switch, shown", [("1", True), ("0", False), (None, False)])
def test_hydras_switch_shows_the_traceback_too(switch, shown, monkeypatch, capsys):
    def a_function_of_this_test():
        raise DataError("text.json: is empty; give another")

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    if switch is not None:
        monkeypatch.setenv("HYDRA_FULL_ERROR", switch)
    message = message_of(a_function_of_this_test)
    assert message == "error: text.json: is empty; give another"
    said = capsys.readouterr().err
    assert ("Traceback (most recent call last)" in said and "in a_function_of_this_test" in said) == shown
    assert shown or not said


@pytest.mark.parametrize("switch", ["1", "0"])
def test_a_log_file_on_a_full_disk_prints_no_traceback_per_line(switch, monkeypatch, capsys):
    from nemo.utils import logging as nemo_logging

    monkeypatch.setenv("HYDRA_FULL_ERROR", switch)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    handler = logging.FileHandler("/dev/full")
    with user_errors():
        nemo_logging._logger.addHandler(handler)
        try:
            nemo_logging.warning("a line")
        finally:
            nemo_logging._logger.removeHandler(handler)
    assert ("No space left on device" in capsys.readouterr().err) == (switch == "1")


@pytest.mark.parametrize("error, shown", [(OSError(errno.ENOSPC, "full"), False), (KeyError(1), True)])
def test_a_thread_that_finds_the_disk_full_prints_no_traceback(error, shown, monkeypatch, capsys):
    """As TensorBoard's does."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(threading, "excepthook", script._thread_ended)

    def write():
        raise error

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert ("Traceback" in capsys.readouterr().err) == shown


@pytest.mark.parametrize("system, name", [("Darwin", "macOS"), ("Windows", "Windows")])
def test_other_systems_are_refused_by_name_before_anything_else(system, name, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: system)
    message = message_of(lambda: pytest.fail("not reached"), CONFIG)
    assert message == f"error: system={name}: is not supported; use Linux or a container (docs/containers.md)"


def test_windows_is_refused_though_it_lacks_signals():
    """A script imports what refuses it, and Windows has neither this signal nor masks."""
    code = """
        import platform, signal
        del signal.SIGUSR1, signal.pthread_sigmask
        platform.system = lambda: "Windows"
        from nemo_ee.runtime.script import user_errors
        with user_errors(nemo=False):
            pass
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.startswith("error: system=Windows: is not supported")


def test_errors_for_users_and_others():
    def refuse():
        raise DataError("no text")

    assert message_of(refuse) == "error: no text"
    with pytest.raises(ImportError, match="something"), user_errors(nemo=False):
        raise ImportError("something else")
