# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The rules behind ``tokenizer.ggml.pre``: where byte-level BPE cuts a text into words before it merges.

Names and groups are those of llama.cpp's ``src/llama-vocab.cpp``. The expressions are the ones that the models
publish in their own ``tokenizer.json``; llama.cpp has to rewrite some of them for the engine of C++.
"""

from dataclasses import dataclass
from typing import Any

from nemo_ee.checkpoint.gguf.keys import REMEDY, shown
from nemo_ee.errors import CheckpointError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WHITESPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    """Llama 3's expression; Qwen2's differs in how many digits stay together."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_WHITESPACE}"


def _cased_words(ending: str, digits: str) -> str:
    """The expression of GPT-4o and Mistral's Tekken: a word changes from capitals to small letters once."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_WHITESPACE}"
    )


@dataclass(frozen=True)
class Rule:
    """How words are found and looked up.

    Attributes:
        expressions: applied one after the other, each to the pieces that the former left; what matches is a
            piece, and so is what lies between.
        ignore_merges: a word that is a token is that token, whatever its merges lead to.
        add_bos: whether a text begins with BOS where the file does not say.
        nfc: whether the text is first composed (Unicode NFC). llama.cpp leaves that out; Qwen2's own tokenizer
            does it.
    """

    expressions: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_RULES = {
    Rule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")): ("default",),
    Rule((_GPT2,)): (
        "gpt-2",
        "phi-2",
        "mpt",
        "olmo",
        "jais",
        "trillion",
        "gigachat",
        "a.x-4.0",
        "mellum",
        "exaone4",
        "granite-docling",
    ),
    Rule((r"\p{N}", _GPT2)): (
        "smollm",
        "starcoder",
        "refact",
        "command-r",
        "codeshell",
        "exaone",
        "minerva-7b",
        "mellum2",
    ),
    Rule((_words(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True): (
        "llama-bpe",
        "llama3",
        "llama-v3",
        "falcon3",
        "pixtral",
        "midm-2.0",
    ),
    Rule((_words(r"\p{N}{1,3}"),)): ("dbrx", "smaug-bpe"),
    Rule((_words(r"\p{N}"),), nfc=True): ("qwen2",),
    Rule((_words(r"\p{N}"),)): ("deepseek-r1-qwen", "megrez", "kormo", "f2llmv2", "hunyuan", "solar-open"),
    Rule((_cased_words("", r"\p{N}"),), ignore_merges=True, add_bos=True): ("tekken",),
    Rule((_cased_words(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),)): ("gpt-4o", "llama4", "kanana2"),
    Rule(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")): ("deepseek-coder",),
}

RULES: dict[str, Rule] = {name: rule for rule, names in _RULES.items() for name in names}
"""The rule of each value of ``tokenizer.ggml.pre``."""


def rule_of(name: Any) -> Rule:
    """The rule of one value of ``tokenizer.ggml.pre``.

    Raises:
        CheckpointError: an unknown name.
    """
    if not isinstance(name, str) or name not in RULES:
        raise CheckpointError(
            f"tokenizer.ggml.pre={shown(name)}: must be one of {', '.join(RULES)}; {REMEDY}"
        )
    return RULES[name]


def pre_tokenizer(rule: Rule) -> Any:
    """The rule as a ``tokenizers`` pre-tokenizer, whose pieces are in GPT-2's alphabet of bytes."""
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(each), "isolated") for each in rule.expressions]
    return pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
