# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What steps and rounds are expected to cost, and what they lose at worst, by prices of passes."""

from collections.abc import Sequence

from nemo_ee.decoding.pass_prices import PassPrices


def step_price(
    prices: PassPrices, asked: Sequence[int], left: Sequence[float], count: int, others: int
) -> float:
    """Of a step. Each token goes through every layer once, sooner or later: steps differ in how many passes that takes.

    Args:
        prices: of passes.
        asked: exit layers that are asked, ascending.
        left: share of the tokens that have left by each.
        count: sequences that are asked there.
        others: sequences that go through all layers.
    """
    low, going, chance, price = 0, 1.0, 1.0, 0.0
    for layer, gone in zip(asked, left, strict=True):
        price += chance * prices.segment(low, layer, (count + others) / chance)
        price += chance * prices.head(layer, count * going / chance)
        going, low = min(going, max(1 - gone, 0.01)), layer
        chance = 1.0 if others else 1 - (1 - going) ** count  # that some token goes on
    price += chance * prices.segment(low, prices.num_layers, (count + others) / chance)
    return price + chance * prices.output((count * going + others) / chance)


def worst_asking(prices: PassPrices, asked: Sequence[int], count: int, others: int) -> float:
    """What a step loses whose tokens stay, and those that leave are run in a pass that runs all the same."""
    once, twice = count + others, 2 * count + others
    heads = sum(prices.head(layer, count) + prices.segment(0, 0, once) for layer in asked)
    later = [prices.segment(asked[0], prices.num_layers, tokens) for tokens in (once, twice)]
    return heads + later[1] - later[0]


def round_rate(prices: PassPrices, layer: int, length: int, count: int, sure: float, right: float) -> float:
    """Tokens per price of a round of drafts: 1 + sa + … + (sa)^n of each of its sequences, from an exit that is sure of
    a token with frequency s and then right with frequency a.

    Args:
        prices: of passes.
        layer: of the exit that drafts.
        length: n, drafts per sequence at most.
        count: sequences.
        sure: s.
        right: a.
    """
    price = tokens = fed = 0.0
    for i in range(length + 1):
        drafting = count * sure**i  # sequences that are not waiting yet
        any_is = 1 - (1 - sure**i) ** count
        if any_is > 0:
            together = drafting / any_is
            once = prices.segment(0, layer, together)
            price += any_is * (once + (prices.head(layer, together) if i < length else 0.0))
        fed += drafting
        tokens += count * (sure * right) ** i
    return tokens / (price + prices.segment(layer, prices.num_layers, fed) + prices.output(fed))


def worst_round(prices: PassPrices, layer: int, length: int, count: int) -> float:
    """What a round loses whose drafts are all rejected; see `round_rate`."""
    once, fed = prices.segment(0, layer, count), count * (length + 1)
    deep = prices.segment(layer, prices.num_layers, fed) + prices.output(fed)
    return length * (once + prices.head(layer, count)) + once + deep - prices.full_depth(count)
