# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""`.nemo` files of people who mean harm, and damaged ones: each must be refused by name, quickly, and do nothing.

`FILES` has them all: name -> a function that writes the file, and words of the error. None needs torch or NeMo.
"""

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

GOOD: dict[str, Any] = dict(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    encoder_seq_length=64,
    max_position_embeddings=64,
    precision="bf16",
    target="nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
    tokenizer=dict(
        library="sentencepiece", model="nemo:0123456789abcdef0123456789abcdef_sp.model", type=None
    ),
    optim=dict(name="adamw", lr=1e-4, betas=[0.9, 0.98], sched=dict(name="CosineAnnealing", min_lr=1e-5)),
)
"""A configuration that is read."""


@dataclass(frozen=True)
class Hostile:
    """One file.

    Attributes:
        write: writes it to the path given.
        words: of the error, beside the path.
    """

    write: Callable[[Path], Any]
    words: tuple[str, ...] = field(default=())


class Touch:
    """Unpickled, it creates a file of this name in the working directory."""

    NAME = "CODE_RAN"

    def __reduce__(self):
        return open, (self.NAME, "w")


def with_config(text: bytes | str | dict, *members: tuple[str, bytes]) -> Callable[[Path], None]:
    """Writes an archive with this configuration, and further members."""

    def write(path: Path) -> None:
        content = yaml.safe_dump(text).encode() if isinstance(text, dict) else text
        content = content.encode() if isinstance(content, str) else content
        with tarfile.open(path, "w") as tar:
            for name, data in (("model_config.yaml", content), *members):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    return write


def changed(**changes: Any) -> Callable[[Path], None]:
    """Writes an archive whose configuration is `GOOD` but for these keys."""
    return with_config({**GOOD, **changes})


def header(name: bytes, size: int | bytes = 0, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    """A block of a tar archive with the right checksum; `size` in bytes stands there as it is."""
    digits = b"%011o\0" % size if isinstance(size, int) else size
    block = bytearray(512)
    block[:100] = name[:100].ljust(100, b"\0")
    block[100:108] = b"0000644\0"
    block[108:116] = block[116:124] = b"0000000\0"
    block[124:136] = digits.ljust(12, b"\0")
    block[136:148] = b"00000000000\0"
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = magic
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    """Data as it follows its header."""
    return data + bytes(-len(data) % 512)


def raw(*parts: bytes) -> Callable[[Path], None]:
    """Writes an archive of the configuration and these blocks."""

    def write(path: Path) -> None:
        text = yaml.safe_dump(GOOD).encode()
        path.write_bytes(
            header(b"model_config.yaml", len(text)) + padded(text) + b"".join(parts) + bytes(1024)
        )

    return write


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    """A PAX header."""
    return header(b"PaxHeader", len(records), kind) + padded(records)


def record(key: bytes, value: bytes) -> bytes:
    """A record of a PAX header."""
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %s=%s\n" % (length, key, value)


def _bomb(path: Path) -> None:
    """A gzipped archive of a quarter of a megabyte, whose one file has 256 MiB."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        text = yaml.safe_dump(GOOD).encode()
        file.write(header(b"model_config.yaml", len(text)) + padded(text) + header(b"data", 2**28))
        for _ in range(256):
            file.write(bytes(2**20))
        file.write(bytes(1024))


def _many_empty_members(path: Path) -> None:
    """300,000 headers, of which 45,000 have a name of their own."""
    text = yaml.safe_dump(GOOD).encode()
    with open(path, "wb") as file:
        file.write(header(b"model_config.yaml", len(text)) + padded(text))
        for number in range(45_000):
            file.write(header(b"m%d" % number))
        file.write(header(b"last") * 255_000)
        file.write(bytes(1024))


def _members() -> Iterator[tuple[str, Hostile]]:
    yield "a size of -512", Hostile(raw(header(b"x", b"\xff" * 10 + b"\xfe\x00")), ("no number",))
    yield "a size of -1 in digits", Hostile(raw(header(b"x", b"-0000000001\0")), ("no number",))
    yield "a size beyond the file", Hostile(raw(header(b"x", 8**11 - 1)), ("truncated",))
    huge = b"\x80" + bytes(2) + b"\xff" * 9
    yield "a size in base 256 beyond the file", Hostile(raw(header(b"x", huge)), ("truncated",))
    digits = b"9" * 400_000 + b" path=x\n"
    yield "a PAX header of 400,000 digits", Hostile(raw(pax(digits), header(b"x")), ("a header of",))
    few = b"9" * 60_000
    yield "a PAX header of 60,000 digits", Hostile(raw(pax(few), header(b"x")), ("PAX header",))
    many = b"".join(record(b"k%d" % n, b"v") for n in range(5000))
    yield "a PAX header of 5,000 records", Hostile(raw(pax(many), header(b"x")), ("PAX header",))
    for name, text in (
        ("0", b"0 x=y\n"),
        ("beyond", b"99 x=y\n"),
        ("without =", b"6 xyz\n"),
        ("-5", b"-5 x=y\n"),
    ):
        yield f"a PAX record of length {name}", Hostile(raw(pax(text), header(b"x")), ("PAX header",))
    size = record(b"size", b"9" * 5000)
    yield "a PAX size of 5,000 digits", Hostile(raw(pax(size), header(b"x")), ("size",))
    yield "a PAX size below 0", Hostile(raw(pax(record(b"size", b"-512")), header(b"x")), ("size",))
    beyond = record(b"size", b"%d" % 2**40)
    yield "a PAX size beyond the file", Hostile(raw(pax(beyond), header(b"x")), ("truncated",))
    everyone = pax(record(b"path", b"../x"), b"g")
    yield "a PAX header for all members", Hostile(raw(everyone, header(b"x")), ("for all members",))
    sparse = record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.realsize", b"%d" % (30 * 2**30))
    yield "a sparse member of 30 GB, PAX", Hostile(raw(pax(sparse), header(b"x")), ("sparse",))
    yield "a sparse member of 30 GB, GNU", Hostile(raw(header(b"x", 0, b"S", b"ustar  \0")), ("sparse",))
    longest = b"n" * 2**20
    long_name = header(b"././@LongLink", len(longest), b"L", b"ustar  \0") + longest
    yield "a GNU name of a megabyte", Hostile(raw(long_name, header(b"x")), ("a header of",))
    name = b"n" * 300
    too_long = header(b"././@LongLink", len(name), b"L", b"ustar  \0") + padded(name)
    yield "a name of 300 bytes", Hostile(raw(too_long, header(b"x")), ("a name of 300 bytes",))
    deep = record(b"path", b"a/" * 5000 + b"b")
    yield "a name of 5,000 folders", Hostile(raw(pax(deep), header(b"x")), ("a name of",))
    outside = pax(record(b"path", b"../../x"))
    yield "a PAX name outside", Hostile(raw(outside, header(b"x")), ("outside",))
    yield "a name outside, by its prefix", Hostile(raw(_with_prefix(b"x", b"../..")), ("outside",))
    yield "the top as a file", Hostile(raw(header(b".")), ("outside",))
    long_name = header(b"././@LongLink", 2, b"L", b"ustar  \0") + padded(b"y\0")
    pax_name = pax(record(b"path", b"z"))
    yield "a long name twice", Hostile(raw(long_name, long_name, header(b"x")), ("names one member twice",))
    yield "a PAX name twice", Hostile(raw(pax_name, pax_name, header(b"x")), ("names one member twice",))
    yield "a name in both forms", Hostile(raw(long_name, pax_name, header(b"x")), ("names one member twice",))
    yield "a long name of no member", Hostile(raw(long_name), ("belongs to no member",))
    yield "a PAX header of no member", Hostile(raw(pax_name), ("belongs to no member",))
    yield "a file named like a folder", Hostile(raw(header(b"x/")), ("the name of a folder",))
    no_name = header(b"././@LongLink", 1, b"L", b"ustar  \0") + padded(b"\0")
    timeless = bytearray(header(b"x"))
    timeless[136:148] = b".0000000000\0"
    timeless[148:156] = b" " * 8
    timeless[148:156] = b"%06o\0 " % sum(timeless)
    charset = pax(record(b"hdrcharset", b"\x80"))
    yield "a PAX header of another character set", Hostile(raw(charset, header(b"x")), ("no UTF-8",))
    prefixed = bytearray(header(b"x", magic=b"ustar  \0"))
    prefixed[345:346] = b"y"
    prefixed[148:156] = b" " * 8
    prefixed[148:156] = b"%06o\0 " % sum(prefixed)
    yield "a prefix in GNU's form", Hostile(raw(bytes(prefixed)), ("readers differ",))
    yield "a time that is no number", Hostile(raw(bytes(timeless)), ("no number",))
    yield "a long name of nothing", Hostile(raw(no_name, header(b"x")), ("outside",))
    yield "a folder with content", Hostile(raw(header(b"x/", 512, b"5"), bytes(512)), ("a folder of 512",))
    kinds = dict.fromkeys((b"1", b"2"), "link") | dict.fromkeys((b"3", b"4", b"6", b"7", b"Z"), "device")
    for kind, what in kinds.items():
        yield f"a member of type {kind.decode()}", Hostile(raw(header(b"x", 0, kind)), (what,))
    yield "300,000 empty members", Hostile(_many_empty_members, ("headers",))
    yield "a gzip bomb", Hostile(_bomb, ("for each byte",))
    yield "cut within a header", Hostile(lambda path: path.write_bytes(header(b"x")[:300]), ("truncated",))
    yield "no archive", Hostile(lambda path: path.write_text("hello " * 1000), ("no tar archive",))
    yield "no configuration", Hostile(lambda path: path.write_bytes(bytes(1024)), ("model_config.yaml",))


def _with_prefix(name: bytes, prefix: bytes) -> bytes:
    block = bytearray(header(name))
    block[345 : 345 + len(prefix)] = prefix
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _texts() -> Iterator[tuple[str, Hostile]]:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    yield "aliases of 9^10 nodes", Hostile(with_config("\n".join(lines)), ("more than",))
    lines = ["a0: &a0 {x0: 1, x1: 1, x2: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 10)]
    yield "merge keys of 9^9 nodes", Hostile(with_config("\n".join(lines)), ("merge key",))
    yield "an alias in itself", Hostile(with_config("a: &a [*a]"), ("deep",))
    yield "an alias of a section in itself", Hostile(with_config("a: &a {b: *a}"), ("deep",))
    text = "data:\n" + "".join(f"  k{n}: [1, 2, 3, 4]\n" for n in range(400_000))
    yield "8 MB of YAML", Hostile(with_config(text), ("bytes",))
    yield (
        "a megabyte of keys",
        Hostile(with_config("".join(f"k{n}: 1\n" for n in range(90_000))), ("more than",)),
    )
    yield "brackets", Hostile(with_config("a: " + "[" * 400_000), ("deep",))
    yield "indentation", Hostile(with_config("".join(" " * n + f"k{n}:\n" for n in range(1000))), ("deep",))
    yield "question marks", Hostile(with_config("? " * 400_000), ("deep",))
    for tag in (
        "!!python/object/apply:os.system ['touch CODE_RAN']",
        "!!python/name:os.system",
        "!x 1",
        "!!str 1",
    ):
        yield f"the tag {tag.split()[0]}", Hostile(with_config(f"a: {tag}"), ("the tag",))
    yield (
        "the tag of a path",
        Hostile(with_config("a: !!python/object/apply:pathlib.PosixPath ['/']"), ("the tag",)),
    )
    yield "a number of 5,000 digits", Hostile(with_config("num_layers: " + "9" * 5000), ("number",))
    yield "a number of 30 digits", Hostile(with_config("num_layers: " + "9" * 30), ("64 bits",))
    yield "a number of sixties", Hostile(with_config("num_layers: 1" + ":59" * 100_000), ("number",))
    yield "no UTF-8", Hostile(with_config(b"\xff\xfe\x00"), ("UTF-8",))
    yield "a control character", Hostile(with_config(b"a: \x07"), ("YAML",))
    yield "no YAML", Hostile(with_config("a: [1, 2"), ("YAML",))
    yield (
        "a flipped bit",
        Hostile(with_config(yaml.safe_dump(GOOD).encode().replace(b": ", b"\x1a ", 1)), ("YAML",)),
    )
    yield "a list", Hostile(with_config("- 1\n- 2\n"), ("no mapping",))
    yield "nothing", Hostile(with_config(""), ("no mapping",))
    yield "two documents", Hostile(with_config("a: 1\n---\nb: 2\n"), ("YAML",))
    yield "a key twice", Hostile(with_config("num_layers: 1\nnum_layers: 2\n"), ("duplicate key",))
    yield "a key that is a list", Hostile(with_config("? [a, b]\n: 1\n"), ("YAML",))
    yield (
        "a line's end in a key",
        Hostile(with_config('"a\\nb": {null: 1}\n'), (r"in a\nb, which is neither",)),
    )
    yield "a key that is null", Hostile(with_config("null: 1\n"), ("key None",))
    for text in (
        "${oc.env:HOME}", "${oc.decode:'1'}", "${now:%Y}", "${hydra:job.name}", "${oc.create:{a: 1}}",
        "x ${num_layers}", "${${num_layers}}", r"\${oc.env:HOME}", "${x}",
        "${optim}", "${.itself}", "${", "${[}", "${....num_layers}",
    ):  # fmt: skip
        yield f"the value {text}", Hostile(changed(itself=text), ("itself",))
    yield (
        "a resolver in a list",
        Hostile(changed(data=dict(data_prefix=["${oc.env:HOME}"])), ("data.data_prefix.0",)),
    )
    yield "references in a circle", Hostile(changed(itself="${other}", other="${itself}"), ("itself",))


def _configurations() -> Iterator[tuple[str, Hostile]]:
    def refused(name: str, *words: str, **changes: Any) -> tuple[str, Hostile]:
        return name, Hostile(changed(**changes), words)

    call = {"_target_": "nemo.utils.exp_manager.os.system", "_args_": [f"touch {Touch.NAME}"]}
    keys = {"_target_": "nemo.utils.exp_manager.os.getcwd", "x": call}
    yield refused("a _target_", "_target_", **keys)
    yield "a _target_ below model", Hostile(with_config({"model": {**GOOD, **keys}}), ("_target_",))
    yield "a _target_ beside model", Hostile(with_config({"model": GOOD, "x": call}), ("x._target_",))
    yield refused("a _target_ of the optimizer", "optim._target_", optim=call)
    yield refused("a _target_ in a list", "data.0", data=dict(a=[call]), x=[{"data": [call]}])
    yield refused("a cls", "cls", cls="os.system")
    args = {"sched": {"name": "CosineAnnealing", "args": {"cls": "os.system", "command": "true"}}}
    yield refused("a cls of the scheduler", "optim.sched.args.cls", optim=args)
    yield refused("params that hold a target", "params", params={"target": "this.x"})
    for key in ("_partial_", "_recursive_", "_convert_", "_args_"):
        yield refused(f"a {key}", f"optim.{key}", optim={"name": "adamw", key: True})
    for key in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "encoder_seq_length"):
        for value in (0, -4, None, "four", 1.5, True, [4], {"a": 4}, "???"):
            yield refused(f"{key} {value}", f"{key}=", **{key: value})
    for key in ("num_layers", "hidden_size", "max_position_embeddings", "make_vocab_size_divisible_by"):
        yield refused(f"{key} 1e9", f"{key}=1000000000", **{key: 10**9})
    for key in ("early_exit", "tokenizer", "optim", "data", "base"):
        for value in (3, "x", [1]):
            yield refused(f"{key} {value}", f"{key}=", **{key: value})
    yield refused("tokenizer null", "tokenizer=None", tokenizer=None)
    yield refused("base null", "base=None", base=None)
    yield refused("base without a hash", "base=", base={"name": "x", "vocab_size": 3})
    yield refused("layers that are none", "early_exit=", early_exit={"layers": "all"})
    yield refused("a head that is none", "early_exit=", early_exit={"layers": [1], "head": 3})
    yield refused("a dropout of 2", "hidden_dropout=2", hidden_dropout=2)
    yield refused("an epsilon of 0", "layernorm_epsilon=0", layernorm_epsilon=0)
    yield refused("a base of nan", "rotary_base=nan", rotary_base=float("nan"))
    yield refused("an activation that is a number", "activation=3", activation=3)
    yield refused("a switch that is a text", "bias='no'", bias="no")
    yield "a model that is a number", Hostile(with_config({"model": 3}), ("model=3",))


def _tokenizers() -> Iterator[tuple[str, Hostile]]:
    def refused(name: str, *words: str, **section: Any) -> tuple[str, Hostile]:
        return name, Hostile(changed(tokenizer=section), words)

    unpickled = ("coder.pickle", pickle.dumps(Touch()))
    tabular = dict(library="tabular", type="x", vocab_file="nemo:coder.pickle", delimiter=",")
    yield (
        "a tabular tokenizer",
        Hostile(with_config({**GOOD, "tokenizer": tabular}, unpickled), ("tokenizer.library='tabular'",)),
    )
    for library in ("regex", "null", "word", "char", "os.system", 3, ["huggingface"]):
        yield refused(f"the library {library}", "tokenizer.library=", library=library, type="x")
    yield refused("a pickle as vocabulary", "must end in", library="tiktoken", vocab_file="nemo:coder.pickle")
    yield refused("Megatron's name for a hub's", "tokenizer.type=", library="megatron", type="evil_tok")
    yield refused("Megatron's regex", "tokenizer.type=", library="megatron", type="regex", model="x.model")
    allowed = dict(library="megatron", type="GPT2BPETokenizer", special_tokens=dict(trust_remote_code=True))
    yield refused("code by a special token", "tokenizer.special_tokens=", **allowed)
    names = dict(library="sentencepiece", model="nemo:x.model", special_tokens=dict(tokenizer="x"))
    yield refused("an attribute by a special token", "tokenizer.special_tokens=", **names)
    yield refused(
        "another folder inside", "tokenizer.type=", library="huggingface", type="nemo:model_weights"
    )
    yield refused("a type that is a list", "tokenizer.type=", library="huggingface", type=["x"])
    yield refused("a name that moves the cursor", "tokenizer.type=", library="huggingface", type="x\x1b[2J")
    yield refused("a model that is a number", "tokenizer.model=", library="sentencepiece", model=3)
    template = dict(prefix="", roles=dict(User="{___class____}"))
    yield refused(
        "NeMo's template with an attribute", "chat_template", library="sentencepiece", chat_template=template
    )
    yield refused(
        "a template that is a number", "chat_template", library="huggingface", type="x", chat_template=3
    )


FILES: dict[str, Hostile] = dict([*_members(), *_texts(), *_configurations(), *_tokenizers()])
"""Name -> file."""

TEMPLATES = {
    "range in range": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n < 90 %}"
    "{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}"
    "{{ f(0) }}",
    "a macro that calls itself for ever": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a product of text": "{{ 'x' * 10000000000 }}",
    "a product of text, written often": "{% for a in range(9999) %}{{ 'x' * 100000 }}{% endfor %}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a width": "{{ '%1000000000d' | format(1) }}",
    "a width of format": "{{ '{:1000000000}'.format(1) }}",
    "a centre": "{{ 'x' | center(1000000000) }}",
    "bytes of a number": "{{ (1).to_bytes(1000000000, 'big') }}",
    "text that doubles": "{% set ns = namespace(x='xx') %}"
    "{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "a rounding": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "tabs": "{{ ('\t' * 1000).expandtabs(10000000) }}",
    "10^8 characters": "x" * 10**8,
    "a megabyte of expressions": "{{ 1 }}" * 140_000,
    "parentheses": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "its subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "its globals": "{{ cycler.__init__.__globals__.os.popen('touch CODE_RAN').read() }}",
    "an import": "{% import 'os' as os %}{{ os.system('touch CODE_RAN') }}",
    "an include": "{% include '/etc/passwd' %}",
    "a change of the conversation": "{{ messages.append(1) }}",
}
"""Chat templates that take what they can get."""


def evil_tokenizer(folder: Path) -> Path:
    """A Hugging Face folder whose tokenizer is a class of its own, which creates `CODE_RAN` when imported."""
    folder.mkdir(parents=True)
    automatic = {"AutoTokenizer": ["evil.Evil", None]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(dict(tokenizer_class="Evil", auto_map=automatic))
    )
    (folder / "config.json").write_text(
        json.dumps(
            dict(model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
        )
    )
    (folder / "evil.py").write_text(f"open({Touch.NAME!r}, 'w').close()\nclass Evil:\n    pass\n")
    return folder
