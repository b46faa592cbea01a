# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Debian's Chromium, driven by its own driver over the W3C WebDriver protocol (plain HTTP and JSON)."""

import base64
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from nemo_ee.runtime.port import free_port

BROWSER, DRIVER = "chromium", "chromedriver"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The protocol's key of an element's reference."""


def missing() -> str | None:
    """Why there is no browser; tries to install Debian's where this process may."""
    if shutil.which(BROWSER) and shutil.which(DRIVER):
        return None
    if not shutil.which("apt-get") or os.geteuid() != 0:
        return f"{BROWSER} and {DRIVER} are not installed: apt-get install chromium chromium-driver"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium", "chromium-driver"]
    for command in (["apt-get", "update", "-qq"], install):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            return f"{' '.join(command)} failed: {done.stderr[-300:]}"
    return None


class Browser:
    """One window.

    Args:
        url: of the driver's session.
        http: a client.
    """

    def __init__(self, url: str, http: httpx.Client):
        self._url, self._http = url, http

    def command(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """A command of the protocol; a GET where there is no body."""
        url = f"{self._url}/{path}"
        answer = self._http.get(url) if body is None else self._http.post(url, json=body)
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def open(self, url: str) -> None:
        """Loads a page."""
        self.command("url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a piece of JavaScript returns."""
        return self.command("execute/sync", {"script": script, "args": list(arguments)})

    def _find(self, selector: str) -> str:
        return self.command("element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        """Clicks an element as a pointer would."""
        self.command(f"element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Empties a field and types into it."""
        element = self._find(selector)
        self.command(f"element/{element}/clear", {})
        self.command(f"element/{element}/value", {"text": text})

    def accessible_name(self, selector: str) -> str:
        """What a screen reader calls the element."""
        return self.command(f"element/{self._find(selector)}/computedlabel")

    def wait(self, script: str, seconds: float = 20.0) -> Any:
        """Runs JavaScript until it returns something true, and returns that.

        Raises:
            TimeoutError: it did not.
        """
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > end:
                raise TimeoutError(script)
            time.sleep(0.02)
        return value

    def screenshot(self, path: Path) -> None:
        """Writes what the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.command("screenshot")))


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A headless window until the end of the block."""
    port = free_port()
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1000,900",
    ]
    wanted = {
        "browserName": "chrome",
        "goog:chromeOptions": {"binary": shutil.which(BROWSER), "args": options},
    }
    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with tempfile.TemporaryDirectory() as profile, httpx.Client(timeout=120) as http:
        options.append(f"--user-data-dir={profile}")
        try:
            _until_ready(http, port)
            body = {"capabilities": {"alwaysMatch": wanted}}
            answer = http.post(f"http://127.0.0.1:{port}/session", json=body).json()["value"]
            assert "sessionId" in answer, answer
            url = f"http://127.0.0.1:{port}/session/{answer['sessionId']}"
            yield Browser(url, http)
            http.delete(url)
        finally:
            driver.terminate()
            driver.wait(20)


def _until_ready(http: httpx.Client, port: int) -> None:
    for _ in range(200):
        try:
            if http.get(f"http://127.0.0.1:{port}/status").json()["value"]["ready"]:
                return
        except httpx.ConnectError:
            pass
        time.sleep(0.1)
    raise TimeoutError("the driver does not start")
