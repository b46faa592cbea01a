# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Log-probabilities of generated tokens and of prompts: Hugging Face's, and plain forwards' through exits."""

import math

import pytest
import torch

from nemo_ee.errors import ConfigError
from tests.support import tiny_llama
from tests.support.drafting import drafting_eagerly
from tests.support.logprobs import check_logprobs, same_logprobs
from tests.support.published import Published, batches_of_one, client, convert, restored
from tests.support.tiny_gpt import TEXTS, tiny_model, tiny_model_config

STEPS = 8
EARLY = dict(threshold=[0.3, 0.4, 0.5], always=True)


@pytest.fixture(scope="module", autouse=True)
def batches_of_their_own():
    with batches_of_one():
        yield


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A Hugging Face Llama, and the same in NeMo."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama.write(folder)
    return Published(folder), restored(convert(folder, folder / "model.nemo"))


@pytest.fixture(scope="module")
def exits():
    """A model whose tokens leave at all its exits."""
    return tiny_model(tiny_model_config(micro_batch_size=1, global_batch_size=1), dtype=torch.float64)


def prompts(count=4):
    return [row[: 5 + 4 * i].tolist() for i, row in enumerate(tiny_llama.prompts(count, 24))]


@torch.no_grad()
def log_probs_of(network, ids):
    """[n, V] behind each token, by Hugging Face."""
    return network(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_they_are_hugging_faces(converted):
    theirs, model = converted
    sampling = dict(logprobs=5, prompt_logprobs=3)
    output = model.generate(prompts(), dict(max_length=STEPS), sampling, early_exit=False)
    for i, prompt in enumerate(prompts()):
        ids = output["token_ids"][i]
        rows = log_probs_of(theirs.network, ids)
        check_logprobs(output["logprobs"][i], rows[len(prompt) - 1 : -1], ids[len(prompt) :], 5)
        assert output["prompt_logprobs"][i][0] is None
        check_logprobs(output["prompt_logprobs"][i][1:], rows[: len(prompt) - 1], prompt[1:], 3)


def test_a_prompt_can_be_scored_alone(converted):
    theirs, model = converted
    long = tiny_llama.prompts(1, 64)[0].tolist()  # as many tokens as the model has positions
    output = model.generate([*prompts(), long], dict(max_length=0), dict(prompt_logprobs=0), early_exit=False)
    assert output["token_ids"] == [*prompts(), long] and output["finish_reason"] == ["length"] * 5
    assert output["logprobs"] is None
    for prompt, entries in zip([*prompts(), long], output["prompt_logprobs"], strict=True):
        check_logprobs(entries[1:], log_probs_of(theirs.network, prompt)[:-1], prompt[1:], 0)


def test_temperature_penalty_and_tokens_that_may_not_come_change_nothing(converted):
    theirs, model = converted
    sampling = dict(use_greedy=False, temperature=2.0, top_p=0.7, repetition_penalty=1.5, logprobs=4)
    generator = torch.Generator().manual_seed(3)
    lengths = dict(max_length=STEPS, min_length=STEPS)
    output = model.generate(prompts(), lengths, sampling, early_exit=False, generator=generator)
    for i, prompt in enumerate(prompts()):
        ids = output["token_ids"][i]
        check_logprobs(
            output["logprobs"][i],
            log_probs_of(theirs.network, ids)[len(prompt) - 1 : -1],
            ids[len(prompt) :],
            4,
        )


@torch.no_grad()
def rows_of(gpt, ids, layer):
    """[n, V] behind each token at that exit, or the final one; of a plain forward."""
    states = gpt.forward_states(torch.tensor([ids]), torch.arange(len(ids))[None], None)
    if layer == gpt.config.num_layers:
        return (states.output[:, 0] @ gpt.output_weight().T)[:, : gpt.true_vocab_size].log_softmax(-1)
    head = gpt.exits[str(layer)]
    state = head(states.exits[layer], None, states.rotary_pos_emb)[:, 0]
    found = head.projection.local_logits(state, gpt.output_weight()).log_softmax(
        -1
    )  # the bucket's mass included
    rows = found.new_full((len(ids), gpt.true_vocab_size), float("-inf"))
    rows[:, head.projection.token_ids] = found[:, : head.projection.num_kept]
    return rows


@pytest.mark.parametrize("way", ["exits", "lossless"])
def test_they_are_of_the_exit_that_a_token_left_at(exits, way):
    early = EARLY if way == "exits" else dict(threshold=[0.3, 0.4, 0.5], lossless=True)
    sampling = dict(add_BOS=False, logprobs=150)
    with drafting_eagerly():
        output = exits.generate(TEXTS, dict(max_length=20), sampling, early_exit=early)
    seen = set()
    for i, text in enumerate(TEXTS):
        ids, layers = output["token_ids"][i], output["early_exit"][i]["exit_layers"]
        first = len(exits.tokenizer.text_to_ids(text))
        for j, (layer, entry) in enumerate(zip(layers, output["logprobs"][i], strict=True)):
            seen.add(layer)
            place = first + j
            by = layer if way == "exits" else exits.gpt.config.num_layers
            row = rows_of(exits.gpt, ids, by)[place - 1]
            finite = row[row > float("-inf")].sort(descending=True).values[:150].tolist()
            assert (entry["token_id"], entry["logprob"]) == (
                ids[place],
                pytest.approx(row[ids[place]].item()),
            )
            assert entry["top_logprobs"] == pytest.approx(finite), "what an exit cannot emit is left out"
            if way == "exits":
                sure = output["early_exit"][i]["confidences"][j]
                assert entry["logprob"] == pytest.approx(math.log(sure)) == entry["top_logprobs"][0]
    if way == "exits":
        assert len(seen) > 2, "exits of several layers"
    else:
        assert sum(each["drafts"] for each in output["early_exit"]) > 0


def test_the_exact_output_layer_gives_the_layers_own(converted):
    theirs, model = converted
    asked = dict(max_length=STEPS), dict(logprobs=2)
    plain = model.generate(prompts(), dict(max_length=STEPS), early_exit=False)["token_ids"]
    model.prepare_decoding(rows=4, max_length=64, output_layer="exact8")
    try:
        output = model.generate(prompts(), *asked, early_exit=False)
        assert model.generate(prompts(), dict(max_length=STEPS), early_exit=False)["token_ids"] == plain
    finally:
        model.release_decoding()
    assert output["token_ids"] == plain
    for ids, entries in zip(plain, output["logprobs"], strict=True):
        rows = log_probs_of(theirs.network, ids)[len(ids) - STEPS - 1 : -1]
        check_logprobs(entries, rows, ids[-STEPS:], 2)


def test_a_stream_has_the_same(converted):
    _, model = converted
    arguments = prompts(), dict(max_length=STEPS), dict(logprobs=2)
    whole = model.generate(*arguments, early_exit=False)["logprobs"]
    found = [[], [], [], []]
    for piece in model.stream(*arguments, early_exit=False):
        assert [each.token for each in piece.logprobs] == piece.token_ids
        found[piece.index] += [each.plain() for each in piece.logprobs]
    same_logprobs({"logprobs": found}, {"logprobs": whole})
    assert all(
        piece.logprobs == [] for piece in model.stream(prompts(), dict(max_length=2), early_exit=False)
    )


@pytest.mark.parametrize(
    "sampling, message",
    [
        (dict(logprobs=-1), "sampling_params.logprobs=-1: must be a whole number, 0 or more"),
        (dict(prompt_logprobs=1, compute_logprob=True), "not beside compute_logprob"),
        (dict(logprobs=True), "sampling_params.logprobs=true"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(converted, sampling, message):
    with pytest.raises(ConfigError, match=message):
        converted[1].generate(prompts(), dict(max_length=2), sampling)


def test_nemos_loop_and_streams_of_prompts_are_refused(exits):
    from nemo_ee.generation.strategy import EarlyExitTextGenerationStrategy

    strategy = EarlyExitTextGenerationStrategy(exits)
    with pytest.raises(ConfigError, match=r'sampling_params\["logprobs"\]=2: has no effect with a strategy'):
        exits.generate(TEXTS, dict(max_length=2), dict(logprobs=2), strategy=strategy)
    with pytest.raises(ConfigError, match="sampling_params.prompt_logprobs=0: a stream has"):
        exits.stream(TEXTS, dict(max_length=2), dict(prompt_logprobs=0))


def scored(choice, before):
    """What lm-evaluation-harness's `local-completions` makes of an answer with one token more than the prompt."""
    said = choice["logprobs"]
    values, best = said["token_logprobs"][before:-1], said["top_logprobs"][before:-1]
    greedy = all(value == max(top.values()) for value, top in zip(values, best, strict=True))
    return sum(values), greedy


def test_the_servers_are_hugging_faces(converted):
    """Texts and token ids, generated and scored, as the harness asks for them."""
    theirs, model = converted
    body = {"model": "tiny", "temperature": 0, "early_exit": False}
    with client(model) as http:
        ask = {**body, "prompt": prompts(), "logprobs": 5, "echo": True, "max_tokens": 4}
        choices = http.post("/v1/completions", json=ask).json()["choices"]
        for prompt, choice in zip(prompts(), choices, strict=True):
            said = choice["logprobs"]
            ids = theirs.tokenizer.convert_tokens_to_ids(said["tokens"])
            rows = log_probs_of(theirs.network, ids)[:-1]
            assert ids[: len(prompt)] == prompt and len(ids) == len(prompt) + 4
            entries = [
                {"token_id": token, "logprob": value, "top_logprobs": sorted(top.values(), reverse=True)[:5]}
                for token, value, top in list(
                    zip(ids, said["token_logprobs"], said["top_logprobs"], strict=True)
                )[1:]
            ]
            for entry, top in zip(entries, said["top_logprobs"][1:], strict=True):
                found = sorted(top, key=top.get, reverse=True)[:5]
                entry["top_token_ids"] = theirs.tokenizer.convert_tokens_to_ids(found)
            check_logprobs(entries, rows, ids[1:], 5)
        greedy = [list(rows) for rows in prompts()]
        for ids in greedy:
            ids += log_probs_of(theirs.network, ids)[-1:].argmax(-1).tolist()
        texts = [*prompts(), *greedy]
        for i in (0, 4):  # a server of these limits has four choices for a request
            ask = {
                **body,
                "prompt": texts[i : i + 4],
                "logprobs": 1,
                "echo": True,
                "max_tokens": 1,
                "seed": 1234,
            }
            for ids, choice in zip(
                ask["prompt"], http.post("/v1/completions", json=ask).json()["choices"], strict=True
            ):
                rows = log_probs_of(theirs.network, ids)[:-1]
                before = len(ids) - 1
                value, is_greedy = scored(choice, before)
                assert value == pytest.approx(
                    rows[before - 1 :].gather(1, torch.tensor(ids[before:])[:, None]).sum().item(), abs=1e-4
                )
                assert is_greedy == (rows[-1].argmax().item() == ids[-1]) and (i == 0 or is_greedy)
        ask = {
            **body,
            "messages": [{"role": "user", "content": "the cat"}],
            "logprobs": True,
            "max_tokens": 4,
        }
        content = http.post("/v1/chat/completions", json={**ask, "top_logprobs": 3}).json()["choices"][0][
            "logprobs"
        ]["content"]
    prompt = theirs.tokenizer.apply_chat_template(ask["messages"], add_generation_prompt=True)
    made = theirs.tokenizer.convert_tokens_to_ids([each["token"] for each in content])
    rows = log_probs_of(theirs.network, prompt + made)[len(prompt) - 1 : -1]
    entries = [
        {
            "token_id": token,
            "logprob": each["logprob"],
            "top_logprobs": [one["logprob"] for one in each["top_logprobs"]],
            "top_token_ids": theirs.tokenizer.convert_tokens_to_ids(
                [one["token"] for one in each["top_logprobs"]]
            ),
        }
        for token, each in zip(made, content, strict=True)
    ]
    check_logprobs(entries, rows, made, 3)


def test_ends_of_texts_on_the_server(converted):
    """What `stop_token_ids`, `ignore_eos`, `min_tokens` and `repetition_penalty` change."""
    theirs, model = converted
    body = {
        "model": "tiny",
        "temperature": 0,
        "early_exit": False,
        "prompt": prompts()[0],
        "logprobs": 0,
        "max_tokens": 12,
    }
    with client(model) as http:

        def tokens(**fields):
            choice = http.post("/v1/completions", json={**body, **fields}).json()["choices"][0]
            return theirs.tokenizer.convert_tokens_to_ids(choice["logprobs"]["tokens"]), choice[
                "finish_reason"
            ]

        usual, reason = tokens(ignore_eos=True)
        assert len(usual) == 12 and reason == "length"
        end = usual[5]
        first = usual.index(end)
        assert tokens(stop_token_ids=[end], ignore_eos=True) == (usual[: first + 1], "stop")
        late, _ = tokens(stop_token_ids=[end], ignore_eos=True, min_tokens=8)
        assert end not in late[:8] and late[:first] == usual[:first] and len(late) >= 8
        penalised, _ = tokens(repetition_penalty=50.0, ignore_eos=True)
        assert len({*penalised, *body["prompt"]}) == 12 + len({*body["prompt"]}), "nothing comes twice"
