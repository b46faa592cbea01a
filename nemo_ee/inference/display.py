# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Generated text for a terminal or a file, with the exit of every token."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from nemo_ee.inference.text import text_decoder

RESET, DIM = "\x1b[0m", "\x1b[2m"
SHADES = (46, 82, 118, 154, 190, 226, 220, 214, 208, 202)
"""xterm colours from green (the first exit) to orange (the last); the final exit keeps the terminal's own."""
UNFINISHED = "\ufffd"
"""What a tokenizer decodes a part of a multi-byte character to."""
LONGEST_CHARACTER = 4
"""Tokens of one character at most, UTF-8's bytes."""


def token_pieces(tokens: Sequence[int], tokenizer: Any, before: Sequence[int] = ()) -> list[str]:
    """What each token adds to the text; the parts of one character count for its last token.

    A token is decoded with what was written last, as a decoder may drop a leading space.

    Args:
        tokens: generated token ids.
        tokenizer: NeMo's.
        before: tokens that the text begins with, so that a leading space shows.
    """
    decode, pieces = text_decoder(tokenizer), []
    written, held = _last_characters(before, decode), []
    for end, token in enumerate(tokens, start=1):
        held.append(token)
        piece = decode(written + held)[len(decode(written)) :]
        if piece.endswith(UNFINISHED) and end < len(tokens) and len(held) < LONGEST_CHARACTER:
            pieces.append("")
        elif not piece:
            pieces.append(tokenizer.ids_to_tokens([token])[0])  # a special token, which decodes to nothing
            held.pop()
        else:
            pieces.append(piece)
            written, held = held, []
    return pieces


def _last_characters(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[int]:
    """The fewest last tokens that are whole characters; none if there are no such."""
    for count in range(1, len(tokens) + 1):
        text = decode(tokens[-count:])
        if text and UNFINISHED not in text:
            return list(tokens[-count:])
    return []


def marked(pieces: Sequence[str], exit_layers: Sequence[int], final_layer: int, colour: bool) -> str:
    """The text with the exit of every token: by colour, or with the layer in brackets behind each token.

    Args:
        pieces: text of each token.
        exit_layers: the exit of each.
        final_layer: the one that stands for the final exit.
        colour: colours instead of brackets.
    """
    if not colour:
        return "".join(f"{piece}[{layer}]" for piece, layer in zip(pieces, exit_layers, strict=True))
    shades = shade_of(exit_layers, final_layer)
    return "".join(
        f"{shades[layer]}{piece}{RESET if shades[layer] else ''}"
        for piece, layer in zip(pieces, exit_layers, strict=True)
    )


def shade_of(exit_layers: Sequence[int], final_layer: int) -> dict[int, str]:
    """The escape sequence of each exit layer, by depth; empty for the final exit."""
    depth = {n: min(len(SHADES) - 1, len(SHADES) * n // final_layer) for n in set(exit_layers)}
    return {n: "" if n == final_layer else f"\x1b[38;5;{SHADES[depth[n]]}m" for n in depth}


def summary(exit_layers: Sequence[int], confidences: Sequence[float], final_layer: int, colour: bool) -> str:
    """One line: how many tokens, the share of each exit, and the mean confidence."""
    if not exit_layers:
        return "no tokens"
    shades, count = shade_of(exit_layers, final_layer), len(exit_layers)
    shares = []
    for layer, tokens in sorted(Counter(exit_layers).items()):
        name = "all layers" if layer == final_layer else f"layer {layer}"
        name = f"{shades[layer]}{name}{RESET}" if colour and shades[layer] else name
        shares.append(f"{name} {100 * tokens / count:.0f} %")
    mean = sum(confidences) / count
    return f"{count} tokens: {', '.join(shares)}; mean confidence {mean:.2f}"
