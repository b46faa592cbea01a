# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Generated text for a terminal or a file, with the exit of every token."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from rich.color import ColorSystem
from rich.style import Style

from nemo_ee.generation.detokenizer import Detokenizer
from nemo_ee.generation.text import TextTokenizer
from nemo_ee.report.style import layer_colours, text_colour

RESET, DIM = "\x1b[0m", "\x1b[2m"
Paint = Callable[[str, int], str]
"""Text in the colour of an exit layer."""


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


def marked(
    pieces: Sequence[str],
    exit_layers: Sequence[int],
    final_layer: int,
    colour: bool,
    exits: Sequence[int] = (),
) -> str:
    """The text with the exit of every token: by colour, or with the layer in brackets behind each token.

    Args:
        pieces: text of each token.
        exit_layers: the exit of each.
        final_layer: the one that stands for the final exit.
        colour: colours instead of brackets.
        exits: the model's, so that colours do not depend on which of them this text left at.
    """
    if not colour:
        return "".join(f"{piece}[{layer}]" for piece, layer in zip(pieces, exit_layers, strict=True))
    paint = painter({*exits, *exit_layers}, final_layer)
    return "".join(paint(piece, layer) for piece, layer in zip(pieces, exit_layers, strict=True))


def painter(layers: Iterable[int], final_layer: int, colours: ColorSystem = ColorSystem.EIGHT_BIT) -> Paint:
    """Colours of exit layers, as plots have them; the final exit keeps the terminal's own."""
    styles = {
        layer: Style(color=text_colour(colour), bgcolor=colour)
        for layer, colour in layer_colours(layers, final_layer).items()
    }
    styles[final_layer] = Style()
    return lambda text, layer: "\n".join(  # a coloured line break would colour the rest of its line
        styles[layer].render(line, color_system=colours) for line in text.split("\n")
    )


def summary(
    exit_layers: Sequence[int],
    confidences: Sequence[float],
    final_layer: int,
    colour: bool,
    exits: Sequence[int] = (),
) -> str:
    """One line: how many tokens, the share of each exit, and the mean confidence. See `marked` for the arguments."""
    if not exit_layers:
        return "no tokens"
    paint, count, shares = painter({*exits, *exit_layers}, final_layer), len(exit_layers), []
    for layer, tokens in sorted(Counter(exit_layers).items()):
        name = f"layer {layer}" if layer != final_layer else "all layers"
        if layer == final_layer and layer in exits:  # which saves none; both are at the same layer
            name = f"all layers (exit {layer} or the final exit)"
        shares.append(f"{paint(name, layer) if colour else name} {100 * tokens / count:.0f} %")
    mean = sum(confidences) / count
    return f"{count} tokens: {', '.join(shares)}; mean confidence {mean:.2f}"
