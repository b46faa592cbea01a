# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Generated text for a terminal or a file, with the exit of every token."""

from collections import Counter
from collections.abc import Sequence

from nemo_ee.generation.detokenizer import Detokenizer
from nemo_ee.generation.text import TextTokenizer

RESET, DIM = "\x1b[0m", "\x1b[2m"
SHADES = (46, 82, 118, 154, 190, 226, 220, 214, 208, 202)
"""xterm colours from green (the first exit) to orange (the last); the final exit keeps the terminal's own."""


def token_pieces(tokens: Sequence[int], tokenizer: TextTokenizer, before: Sequence[int] = ()) -> list[str]:
    """What each token adds to the text; the parts of one character count for its last token.

    A special token, which adds nothing, shows as its name.

    Args:
        tokens: generated token ids.
        tokenizer: the model's.
        before: tokens that the text begins with, so that a leading space shows.
    """
    detokenizer = Detokenizer(tokenizer.decode, before)
    pieces = [piece for token in tokens for piece in detokenizer.feed(token)] + detokenizer.close()
    return [
        piece if piece or tokenizer.decode([token]) else tokenizer.name(token)
        for token, piece in zip(tokens, pieces, strict=True)
    ]


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
