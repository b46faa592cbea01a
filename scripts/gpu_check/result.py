# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a part of check_gpu.sh found. No imports beyond the standard library: the driver does without packages."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nemo_ee.files.output import write_text


@dataclass
class Result:
    """Filled while a part runs, so that what was found before a fault is kept.

    Attributes:
        lines: what was looked at, and what it came to; rows of the table.
        faults: what is wrong; none if all is well.
        speeds: of decoding, for the page: see `speed.Speed`.
        facts: further values by name, for the page.
    """

    lines: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    speeds: list[dict] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    def expect(self, fine: bool, what: str, found: str, fault: str) -> None:
        """A row of the table; and a fault, unless it is fine."""
        self.lines.append((what, found if fine else f"FAILED: {found}"))
        if not fine:
            self.faults.append(f"{what}: {fault}")

    def write(self, path: Path) -> None:
        """As JSON, in one step."""
        write_text(path, json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Result":
        """What `write` wrote."""
        values = json.loads(path.read_text())
        values["lines"] = [tuple(line) for line in values["lines"]]
        return cls(**values)
