# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What refusing hostile files takes: processor seconds and memory of each, in a process without torch and NeMo.

    python -m tests.support.refusals FOLDER

writes every file of `hostile_nemo.FILES` there, one after the other, and prints a line of JSON for each.
"""

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemo_ee.checkpoint import archive
from nemo_ee.errors import CheckpointError
from tests.support import hostile_nemo


def measured(call: Callable[[], Any], refusal: type[Exception]) -> dict[str, Any]:
    """Calls a function in a forked process.

    Returns:
        `message` of the exception that it raised, `refused` if that was one of `refusal`, `seconds` of the processor's
        time, and `mib`, the most memory that it and its children had in use.
    """
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        start, found = time.process_time(), {"refused": False}
        try:
            found["message"] = repr(call())
        except refusal as error:
            found |= {"refused": True, "message": str(error)}
        except BaseException:
            found["message"] = traceback.format_exc()
        found["seconds"] = time.process_time() - start
        os.write(write, json.dumps(found)[:60_000].encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        text = pipe.read()
    _, status, used = os.wait4(child, 0)
    found = (
        json.loads(text) if text else {"refused": False, "message": f"it ended with {status}", "seconds": 0}
    )
    return {**found, "mib": used.ru_maxrss / 1024}


def refusals(folder: Path) -> Iterator[dict[str, Any]]:
    """What reading each file's configuration takes; memory beyond that of a file that is refused at once."""
    path = folder / "m.nemo"
    honest = hostile_nemo.FILES["no configuration"]
    honest.write(path)
    rest = measured(lambda: archive.read_config(path), CheckpointError)["mib"]
    for name, file in hostile_nemo.FILES.items():
        file.write(path)
        before = sorted(os.listdir(folder))
        found = measured(lambda: archive.read_config(path), CheckpointError)
        left = sorted(set(os.listdir(folder)) - set(before))
        yield {**found, "mib": found["mib"] - rest, "name": name, "left": left}
        path.unlink()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (300, 300))
    os.chdir(sys.argv[1])
    for line in refusals(Path(sys.argv[1])):
        print(json.dumps(line), flush=True)
