# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Log-probabilities in the server's answers, over a fake session: their form, scored prompts, and how answers end."""

import codecs
import json

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from transformers import PreTrainedTokenizerFast

from nemo_ee.decoding.logprobs import TokenLogprobs
from nemo_ee.generation.text import TextTokenizer
from nemo_ee.server.answers.logprobs import of_chat, of_completion
from nemo_ee.server.openapi import answers
from tests.support.fake_session import FakeSession, said_of, token_of
from tests.support.server import fake_service, listening, tiny_tokenizer
from tests.support.tiny_tokenizer import save_tiny_tokenizer

PROMPT = "w1 w2 w3"


@pytest.fixture(scope="module")
def server():
    service = fake_service(FakeSession(slots=4))
    with listening(service) as url, httpx.Client(base_url=url, timeout=30) as http:
        yield http
        assert service.engine.state == "ok" and service.engine.running == 0


def post(http, path="/v1/completions", status=200, **fields):
    asked = {"messages": [{"role": "user", "content": "w5 w6"}]} if "chat" in path else {"prompt": PROMPT}
    answer = http.post(path, json={"model": "tiny", "temperature": 0, **asked, **fields})
    assert answer.status_code == status, answer.text
    return answer


def completion(http, **fields):
    """Of a completion, which is of OpenAI's type but for a prompt's first token, of which nothing is known."""
    body = post(http, **fields).json()
    typed = {**body, "choices": [dict(choice) for choice in body["choices"]]}
    for choice in typed["choices"]:
        if choice["logprobs"] and fields.get("echo"):
            said = dict(choice["logprobs"])
            assert said["token_logprobs"][0] is said["top_logprobs"][0] is None
            said["token_logprobs"], said["top_logprobs"] = (
                said["token_logprobs"][1:],
                said["top_logprobs"][1:],
            )
            choice["logprobs"] = said
    Completion.model_validate(typed, strict=True)
    answers.Completion.model_validate(body)
    return body


def events(http, path="/v1/completions", **fields):
    *found, end, nothing = post(http, path, stream=True, **fields).text.split("\n\n")
    assert end == "data: [DONE]" and nothing == ""
    return [json.loads(event.removeprefix("data: ")) for event in found]


def words(ids):
    return tiny_tokenizer().ids_to_tokens(ids)


def expected(prompt, count, top, echo=False):
    """What the fake session says, in OpenAI's form."""
    ids = [token_of(prompt, i) for i in range(count)]
    said = [said_of(token, len(prompt) + i, top) for i, token in enumerate(ids)]
    pieces, before = [f" {word}" for word in words(ids)], []
    if echo:
        before, pieces = prompt, [words(prompt)[0], *[f" {word}" for word in words(prompt)[1:]], *pieces]
        said = [None, *[said_of(token, i, top) for i, token in enumerate(prompt)][1:], *said]
    best = [
        each and {words([token])[0]: value for token, value in [*each.top, (each.token, each.logprob)]}
        for each in said
    ]
    return {
        "tokens": words([*before, *ids]),
        "token_logprobs": [each and each.logprob for each in said],
        "top_logprobs": best,
        "text_offset": [sum(map(len, pieces[:i])) for i in range(len(pieces))],
    }


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("top", [0, 2])
def test_completions_have_lists_side_by_side(server, top, echo):
    prompts = [[7, 8, 9], [11, 12]]
    body = completion(server, prompt=prompts, n=2, max_tokens=5, logprobs=top, echo=echo)
    for i, choice in enumerate(body["choices"]):
        said = choice["logprobs"]
        assert said == expected(prompts[i // 2], 5, top, echo)
        for token, offset in zip(said["tokens"], said["text_offset"], strict=True):
            assert choice["text"][offset:].lstrip().startswith(token)
        assert len(choice["early_exit"]["tokens"]) == 5, "exits are of what was generated"
    assert body["usage"]["completion_tokens"] == 20


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_of_completions_gives_the_same_in_pieces(server, echo):
    fields = dict(prompt=[[7, 8, 9], [11, 12]], max_tokens=6, logprobs=1, echo=echo)
    whole = completion(server, **fields)
    parts = [part for event in events(server, **fields) for part in event["choices"]]
    for choice in whole["choices"]:
        mine = [part for part in parts if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        told = [part["logprobs"] for part in mine if part["logprobs"]]
        assert {name: sum((each[name] for each in told), []) for name in told[0]} == choice["logprobs"]


def test_chats_have_an_object_per_token(server):
    path, prompt = "/v1/chat/completions", tiny_tokenizer().text_to_ids("user w5 w6 <eos> assistant")
    fields = dict(max_tokens=4, logprobs=True, top_logprobs=3)
    body = post(server, path, **fields).json()
    ChatCompletion.model_validate(body, strict=True)
    answers.ChatCompletion.model_validate(body)
    ids = [token_of(prompt, i) for i in range(4)]
    said = [said_of(token, len(prompt) + i, 3) for i, token in enumerate(ids)]

    def plain(token, value):
        (word,) = words([token])
        return {"token": word, "bytes": list(word.encode()), "logprob": value}

    content = [
        {**plain(each.token, each.logprob), "top_logprobs": [plain(*one) for one in each.top]}
        for each in said
    ]
    assert body["choices"][0]["logprobs"] == {"content": content, "refusal": None}
    first, *chunks = events(server, path, **fields)
    assert first["choices"][0]["logprobs"] is None
    parts = [part["logprobs"] for chunk in chunks for part in chunk["choices"]]
    assert sum((part["content"] for part in parts if part), []) == content
    for chunk in [first, *chunks]:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    alone = post(server, path, max_tokens=4, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert alone == [{**each, "top_logprobs": []} for each in content]
    assert post(server, path, max_tokens=4).json()["choices"][0]["logprobs"] is None


def test_a_prompt_is_scored_alone(server):
    body = completion(server, prompt=[[7, 8, 9]], max_tokens=0, echo=True, logprobs=1)
    (choice,) = body["choices"]
    assert choice["logprobs"] == expected([7, 8, 9], 0, 1, echo=True)
    assert (choice["text"], choice["finish_reason"]) == (" ".join(words([7, 8, 9])), "length")
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 0,
        "total_tokens": 3,
        "early_exit": {"layers_run": 24, "full_depth_layers": 24, "drafts": 0, "accepted": 0},
    }
    assert completion(server, max_tokens=0)["choices"][0]["text"] == ""
    (event,) = events(server, prompt=[[7, 8, 9]], max_tokens=0, echo=True, logprobs=1)
    assert event["choices"][0] == choice


def test_answers_are_cut_to_what_the_context_leaves(server):
    for tokens, left in ((38, 3), (40, 1)):
        body = completion(server, prompt=[[7] * tokens], max_tokens=10**20 - 1)
        assert body["usage"]["completion_tokens"] == left and body["choices"][0]["finish_reason"] == "length"


def test_every_chunk_has_a_usage_if_it_is_asked_for(server):
    for path in ("/v1/completions", "/v1/chat/completions"):
        *chunks, last = events(server, path, max_tokens=3, stream_options={"include_usage": True})
        assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
        assert last["usage"]["completion_tokens"] == 3 and last["choices"] == []
        assert all("usage" not in chunk for chunk in events(server, path, max_tokens=3))


def test_ends_of_vllms(server):
    """The session notes what a request says; that it is obeyed, tests of the session hold."""
    ids = [token_of([7, 8, 9], i) for i in range(6)]
    fields = dict(prompt=[[7, 8, 9]], max_tokens=6)
    cut = completion(server, **fields, stop_token_ids=[ids[3]])["choices"][0]
    first = ids.index(ids[3])
    assert (cut["finish_reason"], len(cut["early_exit"]["tokens"])) == ("stop", first + 1)
    assert cut["early_exit"]["tokens"][-1] == ""


class Spoilt(FakeSession):
    """Whose prompts are not scored by numbers."""

    def add(self, sequences):
        ended = super().add(sequences)
        for sequence in sequences:
            if sequence.prompt_logprobs:
                sequence.prompt_logprobs[-1] = TokenLogprobs(7, float("nan"), ())
        return ended


@pytest.mark.parametrize("limit", [0, 3])
def test_scores_that_are_no_numbers_are_an_error(limit):
    with listening(fake_service(Spoilt())) as url, httpx.Client(base_url=url, timeout=30) as http:
        answer = post(http, status=500, max_tokens=limit, echo=True, logprobs=1)
        assert answer.json()["error"]["code"] == "not_finite"
        assert completion(http, max_tokens=2)["choices"][0]["logprobs"] is None


def test_parts_of_characters_are_told_as_bytes(tmp_path):
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    folder = save_tiny_tokenizer(tmp_path)
    tokenizer = TextTokenizer(AutoTokenizer(str(folder)))
    text = " the cat 😀 — naïve"
    ids = PreTrainedTokenizerFast.from_pretrained(folder)(text)["input_ids"]
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    said = [TokenLogprobs(token, -1.0, ()) for token in ids]
    tokens = of_completion(said, ids, [0] * len(ids), tokenizer.token_bytes)["tokens"]
    spelt = "".join(
        codecs.escape_decode(token.removeprefix("bytes:"))[0].decode("latin-1")
        if token.startswith("bytes:")
        else token.encode().decode("latin-1")
        for token in tokens
    )
    assert spelt.encode("latin-1") == text.encode() and any(token.startswith("bytes:") for token in tokens)
    content = of_chat(said, tokenizer.token_bytes)["content"]
    assert bytes(sum((each["bytes"] for each in content), [])) == text.encode()


def test_spaces_are_spaces_however_a_vocabulary_writes_them():
    class Words:
        vocab_size, special = 4, frozenset()

        def ids_to_tokens(self, ids):
            return [["▁the", "<0xE2>", "", "s"][token] for token in ids]

    tokenizer = TextTokenizer(Words())
    assert [tokenizer.token_bytes(token) for token in range(4)] == [b" the", b"\xe2", b"", b"s"]


def test_the_most_probable_counts_where_two_tokens_have_one_text():
    said = [TokenLogprobs(1, -3.0, ((0, -0.5), (2, -1.0)))]
    told = of_completion(said, [1], [0], lambda token: b"a")
    assert told["top_logprobs"] == [{"a": -0.5}] and told["token_logprobs"] == [-3.0]
