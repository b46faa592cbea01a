# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What passes cost on this machine: seconds of layers, heads and the output layer by number of tokens."""

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from math import inf
from pathlib import Path
from typing import Any

from nemo_ee.errors import CheckpointError, ConfigError, Fault
from nemo_ee.files.output import write_text
from nemo_ee.files.plain_json import load_section
from nemo_ee.schema import build_config


@dataclass(frozen=True)
class PassPrices:
    """Seconds of passes. Between the numbers of tokens that are known they are linear; so they are beyond the last.

    Attributes:
        num_layers: of the backbone, which cost the same.
        tokens: numbers of tokens of a pass, ascending, at least two.
        start: seconds of a pass of so many tokens beside its layers.
        layer: of one layer.
        output_layer: of the final norm and the output layer.
        greedy_output: likewise where nobody asks for more than the most probable tokens.
        exits: exit layers, ascending.
        heads: per exit, of asking it: its block and head, until the answer is on the host.
        weights: how decoding holds them, see `nemo_ee.decoding.cpu.lean_weights.WEIGHT_KINDS`.
        output_kind: how decoding finds greedy tokens, see `nemo_ee.decoding.cpu.output_search.OUTPUT_LAYERS`.
        source: where they come from.
    """

    num_layers: int
    tokens: tuple[int, ...]
    start: tuple[float, ...]
    layer: tuple[float, ...]
    output_layer: tuple[float, ...]
    greedy_output: tuple[float, ...]
    exits: tuple[int, ...]
    heads: tuple[tuple[float, ...], ...]
    weights: str = "native"
    output_kind: str = "full"
    source: str = ""

    def segment(self, low: int, high: int, tokens: float) -> float:
        """Tokens in one pass through layers low + 1 to high."""
        return self._at(self.start, tokens) + (high - low) * self._at(self.layer, tokens)

    def head(self, exit_layer: int, tokens: float) -> float:
        """Tokens at one exit that is asked."""
        return self._at(self._heads[exit_layer], tokens)

    def output(self, tokens: float) -> float:
        """Tokens at the final exit, behind the last layer."""
        return self._at(self.output_layer, tokens)

    def full_depth(self, tokens: float) -> float:
        """Tokens in one pass through all layers and the final exit."""
        return self.segment(0, self.num_layers, tokens) + self.output(tokens)

    def shown(self) -> dict[str, Any]:
        """Milliseconds of passes by number of tokens, and where they come from."""

        def row(price: Callable[[int], float]) -> dict[str, float]:
            return {str(n): float(f"{1e3 * price(n):.3g}") for n in self.tokens}

        heads = {f"exit {n}": row(partial(self.head, n)) for n in self.exits}
        return {
            "source": self.source,
            "full depth": row(self.full_depth),
            "output": row(self.output),
            "greedy output": row(self.greedy.output),
            **heads,
        }

    @cached_property
    def greedy(self) -> "PassPrices":
        """Where nobody asks for more than the most probable tokens."""
        return replace(self, output_layer=self.greedy_output)

    @cached_property
    def later_layer(self) -> float:
        """A token through one layer along with others, on average."""
        return (self.layer[-1] - self.layer[0]) / (self.tokens[-1] - self.tokens[0])

    @cached_property
    def _heads(self) -> dict[int, tuple[float, ...]]:
        return dict(zip(self.exits, self.heads, strict=True))

    def _at(self, seconds: Sequence[float], tokens: float) -> float:
        """At least what the fewest tokens cost."""
        counts = self.tokens
        at = min(max(bisect_right(counts, tokens), 1), len(counts) - 1)
        low, high, below = counts[at - 1], counts[at], seconds[at - 1]
        return max(below + (seconds[at] - below) * (tokens - low) / (high - low), seconds[0])

    def write(self, path: Path) -> None:
        """Writes them as JSON.

        Raises:
            OutputError: they cannot be written.
        """
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path, key: str) -> "PassPrices":
        """Reads what `write` has written.

        Args:
            path: of the file.
            key: of the setting that names it, for messages.

        Raises:
            ConfigError: it is no such file.
        """
        remedy = "remove the file, and prices are measured anew"
        try:
            content = load_section(path)
        except CheckpointError as error:
            rule = str(error).removeprefix(f"{path}: ").removesuffix("; download it again")
            raise ConfigError(Fault(key, path, rule, remedy)) from error
        faults: list[Fault] = []
        prices = build_config(cls, content, "", faults)
        if prices is not None and (broken := prices._broken_rule()):
            faults.append(Fault("prices", path.name, broken, remedy))
        if faults:
            raise ConfigError(Fault(key, path, f"is no file of prices ({faults[0]})", remedy))
        return prices

    def _broken_rule(self) -> str:
        """What is wrong with numbers that a file has; empty where nothing is."""
        rows = [self.start, self.layer, self.output_layer, self.greedy_output, *self.heads]
        if len(self.tokens) < 2 or any(
            low >= high for low, high in zip((0, *self.tokens), self.tokens, strict=False)
        ):
            return "tokens must be two ascending numbers or more"
        if any(len(row) != len(self.tokens) for row in rows):
            return "a row of seconds has not one number for each of tokens"
        if len(self.exits) != len(self.heads):
            return "heads are not as many as exits"
        if any(not 0 <= seconds < inf for row in rows for seconds in row) or not all(self.layer):
            return "seconds must be 0 or more, and a layer's above 0"
        return ""


def read_prices(
    file: str | None, num_layers: int, exits: Sequence[int], weights: str, output_kind: str
) -> PassPrices | None:
    """What a file says of a model's passes; None where there is none yet.

    Args:
        file: the setting `prices_file`.
        num_layers: of the model.
        exits: all of its exit layers, ascending.
        weights: how decoding holds them.
        output_kind: how it finds greedy tokens.

    Raises:
        ConfigError: a file that is none of prices, or of another model or other weights; no folder to write it to.
    """
    if file is None:
        return None
    if not Path(file).exists():
        if not Path(file).absolute().parent.is_dir():
            raise ConfigError(
                Fault("prices_file", file, "its directory does not exist", "create it, or write elsewhere")
            )
        return None
    prices = PassPrices.read(Path(file), "prices_file")
    ours = num_layers, tuple(exits), weights, output_kind
    theirs = prices.num_layers, prices.exits, prices.weights, prices.output_kind
    if ours != theirs:
        rule = "its {} layers, exits {}, weights={} and output_layer={} are not the model's {}, {}, {} and {}".format(
            *theirs, *ours
        )
        raise ConfigError(Fault("prices_file", file, rule, "name another file, which is then written"))
    return prices
