# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The harness's generation keywords, for `model.generate`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from nemo_ee.errors import ConfigError, Fault
from nemo_ee.schema import is_number, nearest

SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")
"""Keywords that `model.generate` calls the same."""
KNOWN = ("until", "max_gen_toks", "do_sample", *SAMPLING, "min_new_tokens")


@dataclass(frozen=True)
class Generation:
    """What one request wants.

    Attributes:
        until: texts that end it, in front of which it is cut.
        lengths: `length_params`.
        sampling: `sampling_params`, but for end strings.
    """

    until: tuple[str, ...]
    lengths: dict[str, int]
    sampling: dict[str, Any]

    @property
    def max_length(self) -> int:
        """Tokens at most."""
        return self.lengths["max_length"]


def read_gen_kwargs(given: Mapping[str, Any], max_gen_toks: int) -> Generation:
    """Checks a request's keywords. Samples are drawn where `do_sample` is true and the temperature is not 0, or where
    there is a temperature above 0 and no `do_sample`; among all tokens, unless `top_k` or `top_p` say otherwise.

    Args:
        given: of a task or a command. Empty texts in `until` end nothing, as in the harness.
        max_gen_toks: where they give no length.

    Raises:
        ConfigError: a keyword that decoding does not know, or of a wrong kind.
    """
    faults: list[Fault] = []
    if not isinstance(given, Mapping):
        raise ConfigError(Fault("gen_kwargs", given, "must be a mapping", "give e.g. {until: ['\\n']}"))
    try:
        values = dict(normalize_gen_kwargs(dict(given), max_gen_toks))
    except (TypeError, ValueError) as error:
        rule = f"lengths and the temperature must be numbers ({error})"
        raise ConfigError(Fault("gen_kwargs", dict(given), rule, "give e.g. {max_gen_toks: 64}")) from error
    for name in sorted(values.keys() - set(KNOWN)):
        remedy = nearest(name, KNOWN) or f"leave it out; known are {', '.join(KNOWN)}"
        rule = "nemo_ee's decoding does not know it"
        faults.append(Fault(f"gen_kwargs.{name}", values[name], rule, remedy))
    until, drawn = values["until"], values["do_sample"]
    if not all(isinstance(text, str) for text in until):
        faults.append(Fault("gen_kwargs.until", until, "must be texts", "give e.g. ['\\n']"))
    if not isinstance(drawn, bool):
        faults.append(Fault("gen_kwargs.do_sample", drawn, "must be true or false", "use false"))
    shortest = values.get("min_new_tokens", 0)
    for name, length in {"max_gen_toks": values["max_gen_toks"], "min_new_tokens": shortest}.items():
        if isinstance(length, bool) or not isinstance(length, int) or length < (name == "max_gen_toks"):
            faults.append(Fault(f"gen_kwargs.{name}", length, "must be a number of tokens", "use e.g. 64"))
    numbers = {name: values[name] for name in SAMPLING if values.get(name) is not None}
    for name, value in numbers.items():
        if not is_number(value):
            faults.append(Fault(f"gen_kwargs.{name}", value, "must be a number", "leave it out"))
    if faults:
        raise ConfigError(*faults)
    drawn = drawn and numbers.get("temperature", 1.0) > 0
    sampling = numbers if drawn else {k: v for k, v in numbers.items() if k == "repetition_penalty"}
    lengths = {"max_length": values["max_gen_toks"], "min_length": shortest}
    return Generation(tuple(filter(None, until)), lengths, {"use_greedy": not drawn, **sampling})
