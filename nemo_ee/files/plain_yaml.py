# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""YAML from elsewhere as plain values: no tags, no resolvers, and limits that hold before anything is built.

Values are what OmegaConf reads (YAML 1.1; `1e-5` is a number, dates are text, a key stands once). `${...}` means
another value of the same file, `${.hidden_size}` or `${model.hidden_size}`, and nothing else. A resolver,
`${oc.env:HOME}`, asks for what belongs to whoever opens the file, and is refused, as is what OmegaConf would make
one of later.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

MOST_BYTES = 2**20
"""NeMo's configurations have some 10 KiB; lists of data files and chat templates may make that 100."""
MOST_NODES, MOST_DEPTH = 20_000, 32
"""Keys, values and sections, aliases written out; and sections within sections. NeMo's have 500, and 6."""
_MOST_DIGITS = 100
_LARGEST = 2**63
_REFERENCES = 16
"""How many values may refer to the next one."""
_REFERENCE = re.compile(r"\$\{(\.*)(\w+(?:\.\w+)*)\}")
_CORE = "tag:yaml.org,2002:"
_MISSING = object()
_FLOAT = re.compile(
    r"""^(?:
     [-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)
    |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.X,
)
"""OmegaConf's."""


class YamlError(ValueError):
    """Text that is no YAML, or none that is read from elsewhere; says what is wrong with the text."""


def load(text: bytes) -> Any:
    """Reads one document.

    Args:
        text: in UTF-8.

    Returns:
        Dictionaries, whose keys are text or whole numbers, lists, text, numbers, booleans and None; none of them
        twice, and no `${` in any value.

    Raises:
        YamlError: says where, if it can.
    """
    if len(text) > MOST_BYTES:
        raise YamlError(f"has {len(text)} bytes, and {MOST_BYTES} are read")
    try:
        decoded = text.decode("utf-8")
        _count(decoded)
        value = _Copy().plain(yaml.load(decoded, _Loader), "", 0)
    except UnicodeDecodeError as error:
        raise YamlError("is no text in UTF-8") from error
    except yaml.YAMLError as error:
        raise YamlError(f"is no readable YAML ({_first_line(error)})") from error
    except RecursionError as error:
        raise YamlError("is nested too deeply") from error
    _resolve(value)
    return value


def walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a document with its dotted key, sections included."""
    yield key, value
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield from walk(part, _joined(key, name))


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """OmegaConf's loader, in C where that is there."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> Any:
        keys = set()
        for key, _ in node.value:
            if key.tag != f"{_CORE}str":
                continue
            if key.value in keys:
                problem = f"found duplicate key {key.value[:80]!r}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: yaml.Node) -> Any:
        is_int = node.tag == f"{_CORE}int"
        construct = super().construct_yaml_int if is_int else super().construct_yaml_float
        try:
            if len(node.value) > _MOST_DIGITS:
                raise ValueError("it is too long")
            return construct(node)
        except (ValueError, OverflowError) as error:
            problem = f"found a number that cannot be read ({error})"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


_Loader.add_implicit_resolver(f"{_CORE}float", _FLOAT, list("-+0123456789."))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_CORE}timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
for _kind in ("int", "float"):
    _Loader.add_constructor(f"{_CORE}{_kind}", _Loader.construct_number)


def _count(text: str) -> None:
    """Refuses what is too large, too deep or tagged, event by event, before any of it is kept."""
    nodes = depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.NodeEvent):
            nodes += 1
            tag = getattr(event, "tag", None)
            if tag is not None:
                raise YamlError(f"holds the tag {tag[:80]!r}{_place(event)}")
            if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]:
                raise YamlError(f"holds a merge key (<<){_place(event)}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        _check_limits(nodes, depth)


def _check_limits(nodes: int, depth: int) -> None:
    if nodes > MOST_NODES:
        raise YamlError(f"holds more than {MOST_NODES} keys and values")
    if depth > MOST_DEPTH:
        raise YamlError(f"is nested more than {MOST_DEPTH} deep")


class _Copy:
    """Writes aliases out, within the limits."""

    def __init__(self) -> None:
        self._nodes = 0

    def plain(self, value: Any, key: str, depth: int) -> Any:
        self._nodes += 1
        _check_limits(self._nodes, depth)
        if isinstance(value, dict):
            for name in value:
                if type(name) not in (str, int):
                    raise YamlError(
                        f"holds the key {name!r}{_of(key)}, which is neither text nor a whole number"
                    )
            return {name: self.plain(part, _joined(key, name), depth + 1) for name, part in value.items()}
        if isinstance(value, list):
            return [self.plain(part, _joined(key, number), depth + 1) for number, part in enumerate(value)]
        if isinstance(value, int) and abs(value) >= _LARGEST:
            raise YamlError(f"holds a number beyond 64 bits{_of(key)}")
        if value is not None and type(value) not in (str, int, float, bool):
            raise YamlError(f"holds a {type(value).__name__}{_of(key)}")
        return value


def _resolve(document: Any) -> None:
    """Puts what `${...}` refers to in its place."""

    def value_of(text: str, key: str, above: list[Any], left: int) -> Any:
        found = _REFERENCE.fullmatch(text)
        if found is None:
            shown = text if len(text) <= 80 else f"{text[:80]}…"
            shown = shown if shown.isprintable() else repr(shown)
            raise YamlError(f"holds {key}={shown}, and resolvers are not for files from elsewhere")
        dots, names = len(found[1]), found[2].split(".")
        chain = above[:1] if not dots else above[: len(above) - dots + 1]
        target = chain[-1] if chain else _MISSING
        for number, name in enumerate(names):
            if isinstance(target, list):
                target = dict(enumerate(target)).get(int(name[:9]) if name.isdecimal() else -1, _MISSING)
            else:
                target = target.get(name, _MISSING) if isinstance(target, dict) else _MISSING
            if number < len(names) - 1:
                chain = [*chain, target]
        if target is _MISSING or isinstance(target, dict | list) or not left:
            raise YamlError(f"holds {key}={text}, which refers to no value of the file")
        if isinstance(target, str) and "${" in target:
            return value_of(target, key, chain, left - 1)
        return target

    def replace(value: Any, key: str, above: list[Any]) -> None:
        parts = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        for name, part in parts:
            if isinstance(part, str) and "${" in part:
                value[name] = value_of(part, _joined(key, name), [*above, value], _REFERENCES)
            elif isinstance(part, dict | list):
                replace(part, _joined(key, name), [*above, value])

    if isinstance(document, dict | list):
        replace(document, "", [])
    elif isinstance(document, str) and "${" in document:
        value_of(document, "", [], 1)


def _joined(key: str, name: Any) -> str:
    shown = str(name) if str(name).isprintable() else repr(name)[1:-1]
    return f"{key}.{shown}" if key else shown


def _of(key: str) -> str:
    return f" in {key[:80]}" if key else ""


def _place(event: Any) -> str:
    return f" in line {event.start_mark.line + 1}"


def _first_line(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    text = str(problem or error).splitlines()[0] if str(problem or error) else type(error).__name__
    return f"{text} in line {mark.line + 1}" if mark is not None else text
