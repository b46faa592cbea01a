# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Prices of passes: between the numbers that are known, in a file, by bytes, and measured."""

import json
from dataclasses import replace

import pytest
import torch

from nemo_ee.decoding.pass_prices import PassPrices
from nemo_ee.errors import ConfigError
from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config

PRICES = PassPrices(
    num_layers=8,
    tokens=(1, 3, 4),
    start=(0.5, 0.5, 0.5),
    layer=(1.0, 2.0, 4.0),
    output_layer=(3.0, 3.0, 6.0),
    greedy_output=(1.0, 2.0, 6.0),
    exits=(2, 4),
    heads=((0.2, 0.3, 0.4), (0.5, 0.5, 0.5)),
    source="made up",
)


def test_prices_are_linear_between_numbers_of_tokens_and_beyond_the_last():
    layers = [PRICES.segment(3, 4, n) - 0.5 for n in (0.5, 1, 2, 3, 3.5, 4, 6)]
    assert layers == [1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0]
    assert PRICES.segment(0, 8, 3) == 16.5 and PRICES.full_depth(3) == 19.5
    assert PRICES.head(2, 3) == 0.3 and PRICES.output(3.5) == 4.5
    assert PRICES.greedy.output(3.5) == 4.0 and PRICES.greedy.full_depth(1) == PRICES.full_depth(1) - 2.0
    assert PRICES.later_layer == 1.0
    assert PRICES.shown()["full depth"] == {"1": 11500.0, "3": 19500.0, "4": 38500.0}


def test_a_file_holds_them(tmp_path):
    PRICES.write(tmp_path / "prices.json")
    assert PassPrices.read(tmp_path / "prices.json", "prices_file") == PRICES


@pytest.mark.parametrize(
    "change, rule",
    [
        ({"tokens": [1]}, "tokens must be two ascending"),
        ({"tokens": [1, 4, 3]}, "tokens must be two ascending"),
        ({"tokens": [0, 1, 2]}, "tokens must be two ascending"),
        ({"layer": [1.0, 2.0]}, "not one number for each"),
        ({"greedy_output": [1.0, 2.0]}, "not one number for each"),
        ({"heads": [[1.0, 1.0, 1.0]]}, "not as many as exits"),
        ({"start": [-1.0, 0.0, 0.0]}, "must be 0 or more"),
        ({"layer": [0.0, 1.0, 1.0]}, "a layer's above 0"),
        ({"layer": "fast"}, "layer=fast: expected a list of float"),
        ({"price": 3}, "price=3: unknown key"),
        (None, "holds no JSON object"),
    ],
    ids=str,
)
def test_a_file_that_is_none_of_prices_is_refused(change, rule, tmp_path):
    path = tmp_path / "prices.json"
    PRICES.write(path)
    content = [] if change is None else {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"^prices_file={path}: .*{rule}.*remove the file"):
        PassPrices.read(path, "prices_file")


def test_assumed_prices_are_bytes_of_weights():
    from nemo_ee.decoding.assumed_prices import BANDWIDTH, EIGHT_BIT, START, assumed_prices
    from nemo_ee.decoding.decoding_model import DecodingModel

    config = tiny_model_config(
        head=HEADS["MLP, untied"], exits=[1, 3], share_embeddings_and_output_weights=False
    )
    gpt = tiny_model(config).gpt
    with torch.inference_mode():
        prices = assumed_prices(DecodingModel(gpt))
        prepared = assumed_prices(DecodingModel(gpt, eight_bit_heads=True, output_layer="exact8"))

    def matrices(module):
        return sum(p.nbytes for p in module.parameters() if p.dim() == 2)

    layers = [matrices(layer) for layer in gpt.decoder.layers]
    start, second = START["cpu"], BANDWIDTH["cpu"]
    assert prices.segment(0, 3, 1) * second == pytest.approx(start + sum(layers[:3]))
    assert prices.full_depth(1) * second == pytest.approx(start + sum(layers) + gpt.output_weight().nbytes)
    for n in (1, 3):
        assert prices.head(n, 1) * second == pytest.approx(start + matrices(gpt.exits[str(n)]))
        eight_bits = EIGHT_BIT * matrices(gpt.exits[str(n)]) / 4
        assert prepared.head(n, 1) * second == pytest.approx(start + eight_bits)
    assert prices.greedy.output(1) == prices.output(1) == prepared.output(1)
    assert prices.greedy.output(16) == prepared.greedy.output(16) == prepared.output(16)
    searched = EIGHT_BIT * gpt.output_weight().nbytes / 4
    assert prepared.greedy.output(1) * second == pytest.approx(searched)
    assert prepared.greedy.output(9) == prepared.output(9) > prepared.greedy.output(8)


@pytest.mark.parametrize("head", ["block, MLP, linear, untied", "linear, shortlist"])
def test_prices_are_measured_when_decoding_is_prepared(head, tmp_path):
    """And read where a file has them; that of another model is refused before anything decodes by it."""
    from nemo_ee.decoding import measured_prices

    head, tied = HEADS[head], "shortlist" in head
    model = tiny_model(tiny_model_config(head=head, share_embeddings_and_output_weights=tied, num_layers=6))
    file = tmp_path / "prices.json"
    model.prepare_decoding(prices_file=str(file))
    prices = model.decoding_model().prices
    assert prices == PassPrices.read(file, "prices_file") and prices.source.startswith("measured")
    assert (prices.num_layers, prices.exits, prices.tokens) == (6, (2, 4, 6), measured_prices.TOKENS)
    for row in (prices.layer, prices.output_layer, prices.greedy_output, *prices.heads):
        assert 1e-7 < row[0] <= row[-1] < 1 and list(row) == sorted(row)
    assert prices.segment(0, 6, 16) > prices.segment(0, 3, 16)
    file.write_text(json.dumps({**json.loads(file.read_text()), "source": "another run"}))
    model.prepare_decoding(prices_file=str(file))
    text = model.generate(["w1 w2"], dict(max_length=2), dict(add_BOS=False), early_exit=dict(threshold=0.5))
    assert model.decoding_model().prices.source == text["pass_prices"]["source"] == "another run"
    replace(prices, exits=(2, 4, 5)).write(file)
    with pytest.raises(ConfigError, match=rf"^prices_file={file}: its 6 layers, exits \(2, 4, 5\)"):
        model.prepare_decoding(prices_file=str(file))
    model.release_decoding()
    assert model.generate(["w1"], dict(max_length=1))["pass_prices"]["source"].startswith("assumed")
