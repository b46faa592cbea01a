# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Who owns captured passes: a model does, and lends them to one decoder at a time."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nemo_ee.decoding.cpu.cpu_kernels import SWITCH
from tests.support.captured import PROMPTS, decode, expect_same, make_decoder, model_of, random_session
from tests.support.tape import TapeCapture
from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config


@pytest.fixture(scope="module")
def one():
    head = HEADS["block, MLP, linear, untied"]
    config = tiny_model_config(head=head, share_embeddings_and_output_weights=False)
    return tiny_model(config, dtype=torch.float64).gpt


@pytest.fixture(scope="module", params=["block, MLP, linear, untied"])
def small(request):
    changes = dict(
        num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2
    )
    config = tiny_model_config(exits=[1, 2, 3], head=HEADS[request.param], **changes)
    return tiny_model(config, dtype=torch.float64).gpt


@pytest.fixture(autouse=True)
def torchs_operations(monkeypatch):
    """A tape records what torch does; our CPU kernels it would not see."""
    monkeypatch.setenv(SWITCH, "0")


def test_all_that_decoding_replays_can_be_captured_before_it_starts(small):
    tape = TapeCapture()
    model = model_of(small, tape, rows=4, max_length=20)
    with torch.inference_mode():
        model.captured.capture_all()
        before = len(tape.passes)
        model.captured.capture_all()
    for seed in range(12):
        random_session(model, seed)
    new = {name for name, *_ in list(model.captured.passes._captured)[before:]}
    assert before > 50 and all(name.startswith("keys of layers") for name in new), "but for state_copy"


def test_captured_passes_serve_one_decoder_at_a_time(one, warnings_about_graphs):
    """The second decodes eagerly on caches of its own; the third gets the first one's caches, emptied."""
    expected, _ = decode(model_of(one), PROMPTS[:2], 12)
    other, _ = decode(model_of(one), PROMPTS[2:4], 12)
    tape = TapeCapture()
    model = model_of(one, tape)
    with torch.inference_mode():
        first = make_decoder(model, 2, 24)
        first.prefill(PROMPTS[:2])
    found, second = decode(model, PROMPTS[2:4], 12)
    expect_same(found, other)
    assert tape.replays == 0 and second.passes is not first.passes
    assert ["another decoder uses them" in message for message in warnings_about_graphs()] == [True]
    for layer in first.segments[0]:
        layer.cache.fill_(float("nan"))
    first.close()
    found, third = decode(model, PROMPTS[:2], 12)
    expect_same(found, expected)
    assert tape.replays == third.passes.replayed > 0
    captures = len(tape.passes)
    del third  # neither closed nor kept
    expect_same(decode(model, PROMPTS[:2], 12)[0], expected)
    assert len(tape.passes) == captures, "captured once"
    with pytest.raises(AttributeError):
        first.step(torch.tensor([5, 6]), [[1.0] * 3] * 2)


def test_two_threads_decode_at_once(one):
    tape, lines = TapeCapture(), PROMPTS[:4]
    expected = [decode(model_of(one), [prompt], 16)[0] for prompt in lines]
    model = model_of(one, tape)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda prompt: decode(model, [prompt], 16)[0], lines))
    for mine, other in zip(found, expected, strict=True):
        expect_same(mine, other)
    assert tape.replays


@pytest.mark.parametrize(
    "rows, steps, remedy", [(4, 5, "rows=4, max_length=64"), (1, 60, "rows=3, max_length=72")]
)
def test_a_call_that_needs_more_than_is_prepared_decodes_eagerly(
    one, warnings_about_graphs, rows, steps, remedy
):
    tape, prompts = TapeCapture(), PROMPTS[2:3] * rows
    expected, _ = decode(model_of(one), prompts, steps)
    expect_same(decode(model_of(one, tape), prompts, steps)[0], expected)
    assert tape.passes == []
    (message,) = warnings_about_graphs()
    assert f"prepare_decoding({remedy})" in message


@pytest.mark.parametrize("tape", [TapeCapture, lambda: None], ids=["captured", "eager"])
def test_what_is_no_number_stays_with_the_sequence_that_made_it(tape):
    """Rows are taken over, by new sequences and by those that move: 0 times NaN is NaN."""
    from nemo_ee.decoding.generated_sequence import GeneratedSequence
    from nemo_ee.decoding.request import GenerationRequest
    from nemo_ee.decoding.session import DecodingSession

    config = tiny_model_config(
        exits=[1, 2, 3],
        head=HEADS["block, MLP, linear, untied"],
        share_embeddings_and_output_weights=False,
        num_layers=4,
    )
    gpt, bad, exits = tiny_model(config, dtype=torch.float64).gpt, 150, {1: 0.9, 2: 0.9, 3: 0.9}
    with torch.no_grad():
        gpt.embedding.word_embeddings.weight[bad] = float("nan")

    def sequences():
        texts = [
            ([7, 8, bad] * 10, 3),
            (list(range(20, 50)), 30),
            ([9, 5, 6], 8),
            ([5, 6, 7], 20),
            ([11], 20),
        ]
        for prompt, limit in texts:
            request = GenerationRequest(max_length=limit, exits=exits, always=True)
            yield GeneratedSequence(prompt, request, frozenset(), None, limit, 0)

    def run(model, waiting):
        everyone = list(waiting)
        with torch.inference_mode(), DecodingSession(model, [1, 2, 3], 3, 64) as session:
            while waiting or session.running:
                batch, waiting = waiting[: session.free], waiting[session.free :]
                if batch:
                    session.add(batch)
                session.step()
        return [(each.tokens, each.exit_layers) for each in everyone]

    expected = [run(model_of(gpt), [each])[0] for each in sequences()]
    assert run(model_of(gpt, tape()), list(sequences()))[1:] == expected[1:]


def test_memory_is_free_when_the_model_is_released(one):
    model = model_of(one, TapeCapture())
    passes = model.captured.passes
    kept = [weakref.ref(each) for each in (passes, passes.memory, *passes.memory.segment(0, 8))]
    del passes
    gc.disable()  # the caches must not wait for it
    try:
        decode(model, PROMPTS[:2], 4)
        del model
        assert not any(each() is not None for each in kept)
    finally:
        gc.enable()


def test_prepared_models_generate_with_captured_passes(monkeypatch):
    from nemo_ee.decoding.cuda import captured_decoding
    from nemo_ee.errors import ConfigError

    model = tiny_model(tiny_model_config(num_layers=4, exits=[1, 2, 3]), dtype=torch.float64)
    ids = torch.tensor([[7, 8, 9, 20], [41, 5, 0, 0]]), torch.tensor([4, 2])

    def generated(**early_exit):
        out = model.generate(ids, dict(max_length=12), dict(add_BOS=False), early_exit=early_exit or False)
        return out["token_ids"], out["early_exit"]

    asked = dict(threshold=0.8, always=True)
    ways = [dict(), asked, dict(asked, exits=[2]), dict(threshold=0.5, lossless=True)]
    expected = [generated(**way) for way in ways]
    tape = TapeCapture()
    monkeypatch.setattr(captured_decoding, "capture_for", lambda model: tape)
    assert [generated(**way) for way in ways] == expected and not tape.passes, "not prepared"
    model.prepare_decoding(rows=2, max_length=15)
    try:
        timed = tape.replays  # prices are those of replays
        found = [generated(**way) for way in ways]
        captures, replays = len(tape.passes), tape.replays - timed
        assert [generated(**way) for way in ways] == found
        assert timed > 0 and len(tape.passes) == captures, "captured once"
        assert tape.replays == timed + 2 * replays > timed
    finally:
        model.release_decoding()
    for (tokens, exits), (other, others) in zip(found, expected, strict=True):
        assert tokens == other and [e["exit_layers"] for e in exits] == [e["exit_layers"] for e in others]
    tape.passes.clear()
    model.prepare_decoding(cuda_graphs=False)
    assert generated(**ways[1]) == expected[1] and not tape.passes
    model.release_decoding()
    with pytest.raises(ConfigError, match="rows=0.*set rows=16\n.*max_length=65.*model's 64.*max_length=64"):
        model.prepare_decoding(rows=0, max_length=65)


def test_what_was_lent_comes_back_after_a_failure(monkeypatch):
    """However long the error is kept, with all that its frames hold."""
    from nemo_ee.decoding.cuda import captured_decoding
    from nemo_ee.decoding.decoder import EarlyExitDecoder
    from nemo_ee.generation.strategy import EarlyExitTextGenerationStrategy

    def interrupted(*_, **__):
        raise RuntimeError("no memory is left")

    model = tiny_model(tiny_model_config(num_layers=4, exits=[1, 3]), dtype=torch.float64)
    monkeypatch.setattr(captured_decoding, "capture_for", lambda model: TapeCapture())
    model.prepare_decoding(rows=2, max_length=20)
    lengths, sampling = dict(max_length=6), dict(add_BOS=False)
    strategy, errors = EarlyExitTextGenerationStrategy(model), []
    ways = [dict(), dict(strategy=strategy), dict(sampling_params=dict(compute_logprob=True))]
    try:
        for name, some in ("feed_prompts", ways), ("step", ways[:2]):
            with monkeypatch.context() as patch:
                patch.setattr(EarlyExitDecoder, name, interrupted)
                for way in some:
                    with pytest.raises(RuntimeError, match="no memory is left") as error:
                        model.generate(["a b"], lengths, **{"sampling_params": sampling, **way})
                    errors.append(error)
                    passes = model.decoding_model().captured.passes
                    assert passes.lend(), (name, way)
                    passes.give_back()
    finally:
        model.release_decoding()


def test_a_server_captures_before_the_first_request(monkeypatch):
    from nemo_ee.decoding.cuda import captured_decoding
    from nemo_ee.decoding.request import parse_request
    from nemo_ee.server.serve import decoding_session

    model, tape = (
        tiny_model(tiny_model_config(num_layers=4, exits=[1, 3]), dtype=torch.float64),
        TapeCapture(),
    )
    monkeypatch.setattr(captured_decoding, "capture_for", lambda model: tape)
    model.prepare_decoding(rows=2, max_length=20)
    usual = parse_request(None, None, None, model.early_exit)
    try:
        for _ in range(2):  # a failed session is followed by another
            with decoding_session(model, 2, 20, usual) as session:
                captures = len(tape.passes)
                assert captures > 50 and session._decoder.passes is model.decoding_model().captured.passes
                with decoding_session(model, 2, 20, usual) as other:
                    assert other._decoder.passes is not session._decoder.passes
        assert len(tape.passes) == captures
    finally:
        model.release_decoding()


def test_caches_that_do_not_fit_are_named_and_decoding_is_eager(one, monkeypatch, warnings_about_graphs):
    from nemo_ee.decoding.cuda import captured_decoding

    def too_much(*_):
        raise torch.OutOfMemoryError("tried to allocate 3 TiB")

    monkeypatch.setattr(captured_decoding, "capture_for", lambda model: TapeCapture())
    monkeypatch.setattr(captured_decoding, "DecodingMemory", too_much)
    assert captured_decoding.captured_decoding(model_of(one), 9, 64) is None
    (message,) = warnings_about_graphs()
    assert "9 sequences of 64 positions do not fit (tried to allocate 3 TiB)" in message
