# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a server makes of a request's body, and what it refuses, with the field and the reason."""

import json
import re

import pytest
from nemo.collections.common.tokenizers.chat_template_mixin import tokenize_with_chat_template
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from tokenizers.pre_tokenizers import Whitespace

from nemo_ee.generation.text import TextTokenizer
from nemo_ee.server.answers.errors import ApiError
from nemo_ee.server.requests.plan import make_plan
from nemo_ee.server.requests.protocol import ChatRequest, CompletionRequest, parse
from nemo_ee.server.served_model import SharedTokenizer
from tests.support import tiny_gpt
from tests.support.server import served_model, server_config, tiny_tokenizer

COMPLETION = {"model": "tiny", "prompt": "w1 w2"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "w5 w6"}]}


def completion(**fields):
    return parse(CompletionRequest, json.dumps({**COMPLETION, **fields}).encode())


def chat(**fields):
    return parse(ChatRequest, json.dumps({**CHAT, **fields}).encode())


def plan(call, tokenizer=None, **settings):
    config = server_config(**settings)
    return make_plan(call, served_model(config, tokenizer), config)


def refused(status, param, function, *args, **fields):
    with pytest.raises(ApiError) as caught:
        function(*args, **fields)
    assert (caught.value.status, caught.value.param) == (status, param), caught.value
    return caught.value.message


@pytest.mark.parametrize(
    "prompt, prompts",
    [
        ("w1 w2", ["w1 w2"]),
        (["w1", "w2"], ["w1", "w2"]),
        ([7, 8], [[7, 8]]),
        ([[7, 8], [9]], [[7, 8], [9]]),
    ],
)
def test_every_kind_of_prompt(prompt, prompts):
    assert completion(prompt=prompt).prompt == prompts


def test_defaults_are_openais():
    call = completion()
    assert (call.temperature, call.top_p, call.n, call.stream, call.stop, call.seed) == (
        1.0,
        1.0,
        1,
        False,
        (),
        None,
    )
    assert plan(call).choices[0].limit == 16
    assert plan(chat()).choices[0].limit == 40 + 1 - 5, "what the context leaves"
    assert completion(temperature=None, stop=None, n=None) == call, "null is the default"


@pytest.mark.parametrize(
    "fields, param, reason",
    [
        (dict(prompt=None), "prompt", "Field required"),
        (dict(model=None), "model", "Field required"),
        (dict(prompt=[]), "prompt", "not empty"),
        (dict(prompt=["w1", 7]), "prompt", "all be texts"),
        (dict(prompt=[[]]), "prompt", "non-empty lists"),
        (dict(prompt=[True]), "prompt", "all be texts"),
        (dict(prompt="\ud800"), "prompt", "surrogate"),
        (dict(prompt={"a": 1}), "prompt", "must be a text"),
        (dict(max_tokens=-1), "max_tokens", "max_tokens=-1: .* greater than or equal to 0"),
        (dict(max_tokens="5"), "max_tokens", "valid integer"),
        (dict(max_tokens=1.5), "max_tokens", "valid integer"),
        (dict(max_tokens=True), "max_tokens", "valid integer"),
        (dict(temperature=-1), "temperature", "temperature=-1"),
        (dict(temperature=2.1), "temperature", "less than or equal to 2"),
        (dict(temperature="hot"), "temperature", "valid number"),
        (dict(top_p=0), "top_p", "greater than 0"),
        (dict(top_k=-2), "top_k", "greater than or equal to -1"),
        (dict(n=0), "n", "greater than or equal to 1"),
        (dict(stop=[""]), "stop", "non-empty"),
        (dict(stop=["a"] * 17), "stop", "at most 16"),
        (dict(min_tokens=-1), "min_tokens", "greater than or equal to 0"),
        (dict(repetition_penalty=0), "repetition_penalty", "greater than or equal to 0.01"),
        (dict(stop_token_ids=7), "stop_token_ids", "a list of token ids"),
        (dict(stop_token_ids=[True]), "stop_token_ids", "a list of token ids"),
        (dict(stop_token_ids=[1] * 129), "stop_token_ids", "at most 128"),
        (dict(ignore_eos=1), "ignore_eos", "valid boolean"),
        (dict(stop="a" * 257), "stop", "256 characters"),
        (dict(stop=[1]), "stop", "non-empty text"),
        (dict(seed=2**63), "seed", "less than"),
        (dict(stream="yes"), "stream", "valid boolean"),
        (dict(stream_options={"include_usage": True}), "stream_options", "only with stream=true"),
        (dict(stream=True, stream_options={"usage": True}), "stream_options.usage", "not permitted"),
        (dict(echo=1), "echo", "valid boolean"),
        (dict(early_exit="fast"), "early_exit", "must be an object"),
        (dict(max_token=5), "max_token", "unknown field; did you mean max_tokens"),
        (dict(zzz=5), "zzz", "known fields: .*prompt"),
        (dict(logit_bias={"5": 1}), "logit_bias", "not supported"),
        (dict(logprobs=6), "logprobs", "less than or equal to 5"),
        (dict(logprobs=-1), "logprobs", "greater than or equal to 0"),
        (dict(logprobs=True), "logprobs", "valid integer"),
        (dict(top_logprobs=2), "top_logprobs", "of chats alone"),
        (dict(best_of=3), "best_of", "choose among"),
        (dict(suffix="w9"), "suffix", "not supported"),
        (dict(presence_penalty=0.5), "presence_penalty", "not supported"),
        (dict(tools=[{}]), "tools", "tools are not supported"),
        (dict(messages=[]), "messages", "unknown field"),
    ],
    ids=str,
)
def test_impossible_completions_name_the_field(fields, param, reason):
    message = refused(400, param, completion, **fields)
    assert re.search(reason, message), message


@pytest.mark.parametrize(
    "fields, param, reason",
    [
        (dict(messages=[]), "messages", "at least 1"),
        (
            dict(messages=[{"role": "king", "content": "w1"}]),
            "messages.0.role",
            "'system', 'user' or 'assistant'",
        ),
        (dict(messages=[{"role": "user"}]), "messages.0.content", "Field required"),
        (dict(messages=[{"role": "user", "content": 5}]), "messages.0.content", "must be a text"),
        (
            dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
            "messages.0.content",
            "images and audio are not supported",
        ),
        (
            dict(messages=[{"role": "user", "content": "w1", "tool_calls": []}]),
            "messages.0.tool_calls",
            "permitted",
        ),
        (dict(max_tokens=0), "max_tokens", "greater than or equal to 1"),
        (dict(logprobs=3), "logprobs", "valid boolean"),
        (dict(top_logprobs=2), "top_logprobs", "only with logprobs=true"),
        (dict(logprobs=True, top_logprobs=21), "top_logprobs", "less than or equal to 20"),
        (dict(max_tokens=3, max_completion_tokens=4), "max_tokens", "give one of them"),
        (dict(tools=[{"type": "function"}]), "tools", "tools are not supported"),
        (dict(functions=[{}], logit_bias={"1": 2}), "functions", "logit_bias: not supported"),
        (dict(response_format={"type": "json_object"}), "response_format", "free text"),
        (dict(prompt="w1"), "prompt", "unknown field"),
    ],
    ids=str,
)
def test_impossible_chats_name_the_field(fields, param, reason):
    assert reason in refused(400, param, chat, **fields)


def test_no_log_probabilities_by_chats_word():
    """`false` is no number of a completion's, but clients that ask both endpoints send it."""
    assert completion(logprobs=False) == completion()


def test_null_in_a_message_is_as_if_it_were_left_out():
    """OpenAI's client sends answers back with all their fields."""
    message = {"role": "user", "content": "w5 w6", "refusal": None, "tool_calls": None}
    assert chat(messages=[message]) == chat()


def test_answers_stay_short_whatever_was_sent():
    many = {f"f{n}": n for n in range(50_000)}
    message = refused(400, "f0", completion, **many)
    assert message.count("unknown field") == 5
    assert len(refused(404, "model", plan, completion(model="x" * 100_000))) < 1100
    messages = [{"role": "king", "content": "w1"}] * 1000
    assert refused(400, "messages.0.role", chat, messages=messages).count("role") == 5
    assert "more than 16 fields" in refused(400, "early_exit", completion, early_exit=many)


@pytest.mark.parametrize(
    "body, reason",
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"model": "tiny", "prompt": "w1", "temperature": NaN}', "NaN is no JSON number"),
        (b'{"model": "\xff"}', "no JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "99999…: too large a number"),
        (b'{"n": -' + b"9" * 400 + b"}", "too large a number"),
        (b'{"temperature": 1e400}', "1e400: too large a number"),
        (b'{"early_exit": {"threshold": ' + b"9" * 400 + b"}}", "too large a number"),
    ],
    ids=["empty", "cut", "list", "nan", "bytes", "long", "negative", "infinite", "long threshold"],
)
def test_bodies_that_are_no_request(body, reason):
    assert reason in refused(400, None, parse, CompletionRequest, body)


def test_fields_that_change_nothing_are_accepted():
    harmless = dict(user="me", store=False, metadata={"a": "b"}, service_tier="auto", prompt_cache_key="k")
    neutral = dict(
        best_of=1, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, suffix="", logprobs=None
    )
    assert completion(**harmless, **neutral) == completion()
    neutral = dict(tools=[], tool_choice="none", response_format={"type": "text"}, logprobs=False)
    assert chat(**neutral) == chat()


def test_parts_of_a_message_are_joined():
    parts = [{"type": "text", "text": "w5 "}, {"type": "text", "text": "w6"}]
    assert chat(messages=[{"role": "user", "content": parts}]) == chat()


def test_a_plan_has_n_choices_per_prompt_each_with_random_numbers_of_its_own():
    made = plan(completion(prompt=["w1", "w2 w3"], n=2, seed=-1, temperature=0, echo=True))
    ids = tiny_tokenizer().text_to_ids
    assert made.prompts == [ids("w1"), ids("w2 w3")] and made.echo == ["w1", "w2 w3"]
    sequences = made.choices
    assert [s.prompt for s in sequences] == [ids("w1")] * 2 + [ids("w2 w3")] * 2
    assert len({s.seed for s in sequences}) == 4
    assert all(s.request.sampling.use_greedy for s in sequences)
    seeds = {plan(completion()).choices[0].seed for _ in range(5)}
    assert len(seeds) == 5, "without a seed every request has another"


@pytest.mark.parametrize(
    "fields", [{}, dict(seed=5), dict(n=2), dict(n=2, seed=-1), dict(seed=2**63 - 1)], ids=str
)
def test_equal_prompts_of_a_request_get_different_samples(fields):
    prompts = ["w1"] * (4 // fields.get("n", 1))
    made = plan(completion(prompt=prompts, temperature=1.0, **fields))
    uniforms = [s.random("draw").random() for s in made.choices]
    assert len(set(uniforms)) == 4
    again = [s.random("draw").random() for s in plan(completion(prompt=prompts, **fields)).choices]
    assert (again == uniforms) == ("seed" in fields), "only a seed repeats them"


def test_choices_of_requests_with_neighbouring_seeds_share_no_random_numbers():
    calls = [plan(completion(prompt=["w1"], n=4, seed=seed)) for seed in range(4)]
    assert len({s.seed for made in calls for s in made.choices}) == 16


def test_full_depth_by_name_needs_no_exits_of_the_servers_settings():
    for asked in (False, dict(exits=[])):
        settings = dict(early_exit=dict(threshold=0.5, max_pending=3))
        request = plan(completion(early_exit=asked), **settings).choices[0].request
        assert (request.exits, request.max_pending) == ({}, None)
    assert refused(400, "early_exit.threshold", plan, completion(early_exit=dict(exits=[], threshold=0.5)))


def test_all_tokens_are_a_top_k_of_0_or_minus_1():
    assert [plan(completion(top_k=k)).choices[0].request.sampling.top_k for k in (0, -1)] == [0, -1]
    assert "top_k" in refused(400, "top_k", completion, top_k=-2)


def test_sampling_and_exits_reach_the_request():
    exits = dict(threshold=[0.5, 0.9], exits=[2, 4], max_pending=3)
    request = plan(completion(temperature=0.5, top_p=0.9, top_k=7, early_exit=exits)).choices[0].request
    sampling = request.sampling
    assert (sampling.use_greedy, sampling.temperature, sampling.top_p, sampling.top_k) == (False, 0.5, 0.9, 7)
    assert (request.exits, request.max_pending, request.lossless) == ({2: 0.5, 4: 0.9}, 3, False)


def test_the_servers_exits_are_for_requests_that_do_not_say():
    settings = dict(early_exit=dict(threshold=0.6, exits=[4], lossless=True))

    def request(**fields):
        return plan(completion(**fields), **settings).choices[0].request

    assert request().exits == {4: 0.6} and request().lossless
    assert request(early_exit=dict(exits=[2, 4])).exits == {2: 0.6, 4: 0.6}
    assert request(early_exit=dict(threshold=0.9, lossless=False)).exits == {4: 0.9}
    assert request(early_exit=True).exits == {4: 0.6}
    assert request(early_exit=dict(threshold=None)).exits == {4: 0.4}, "null is lossless decoding's own"
    checkpoint = request(early_exit=dict(threshold=None, lossless=False))
    assert checkpoint.exits == {4: 0.8}, "null is the checkpoint's"
    assert request(early_exit=False).exits == {} and not request(early_exit=False).lossless
    settings = dict(early_exit=dict(max_pending=3))
    assert request().max_pending == 3 and request(early_exit=dict(lossless=True)).max_pending is None


def test_the_servers_thresholds_go_with_their_exits():
    settings = dict(early_exit=dict(exits=[2, 4], threshold=[0.6, 0.7]))

    def request(**fields):
        return plan(completion(**fields), **settings).choices[0].request

    assert request().exits == {2: 0.6, 4: 0.7}
    assert request(early_exit=dict(exits=[4])).exits == {4: 0.7}
    assert request(early_exit=dict(exits=[])).exits == {}
    assert request(early_exit=dict(exits=[4], threshold=0.9)).exits == {4: 0.9}
    settings = dict(early_exit=dict(exits=[4], threshold=[0.7]))
    fields = dict(exits=[2, 4])
    message = refused(400, "early_exit.threshold", plan, completion(early_exit=fields), **settings)
    assert "thresholds for exits [4], none for [2]" in message
    refused(400, "early_exit.exits", plan, completion(early_exit=dict(exits="4")), **settings)


def test_all_requests_have_the_servers_rule_and_cache():
    settings = dict(early_exit=dict(threshold=0.6, confidence="entropy", kv_policy="state_copy"))
    request = plan(completion(early_exit=dict(confidence="entropy")), **settings).choices[0].request
    assert (request.confidence, request.kv_policy) == ("entropy", "state_copy")
    assert plan(completion(early_exit=False), **settings).choices[0].request.confidence == "entropy"
    for fields in (dict(confidence="margin"), dict(kv_policy="recompute"), dict(lossless=True)):
        param = "early_exit.confidence" if "confidence" in fields else "early_exit.kv_policy"
        refused(400, param, plan, completion(early_exit=fields), **settings)


@pytest.mark.parametrize(
    "fields, status, param, reason",
    [
        (dict(model="other"), 404, "model", "this server has tiny"),
        (dict(prompt=""), 400, "prompt", "no tokens"),
        (dict(prompt=" ".join(["w1"] * 41)), 400, "prompt", "41 tokens exceed the server's 40"),
        (dict(prompt=["w1", "x " * 3000]), 400, "prompt", "6000 characters, and at most 40 tokens"),
        (dict(prompt=[201]), 400, "prompt", "0 to 200"),
        (dict(prompt=[-1]), 400, "prompt", "token id -1"),
        (dict(temperature=1e-38), 400, "temperature", "temperature=1e-38: must be at least 1e-06"),
        (dict(min_tokens=17), 400, "min_tokens", "min_tokens=17: more than the 16 that may come"),
        (dict(min_tokens=4, max_tokens=3), 400, "min_tokens", "more than the 3 that"),
        (dict(stop_token_ids=[5, 201]), 400, "stop_token_ids", "token id 201 lies outside"),
        (dict(n=5), 400, "n", "5 choices"),
        (dict(prompt=["w1", "w2", "w3"], n=2), 400, "n", "6 choices"),
        (dict(early_exit=dict(threshold=1.5)), 400, "early_exit.threshold", "early_exit.threshold=1.5"),
        (dict(early_exit=dict(exits=[3])), 400, "early_exit.exits", "not all of the model's exits"),
        (dict(early_exit=dict(treshold=0.5)), 400, "early_exit.treshold", "did you mean threshold"),
        (dict(early_exit=dict(lossless="yes")), 400, "early_exit.lossless", "expected bool"),
    ],
    ids=str,
)
def test_what_the_model_cannot_do_is_refused(fields, status, param, reason):
    assert reason in refused(status, param, plan, completion(**fields))


def test_chats_need_a_template():
    assert plan(chat()).prompts == [tiny_tokenizer().text_to_ids("user w5 w6 <eos> assistant")]
    assert "no chat template" in refused(400, "messages", plan, chat(), tiny_tokenizer(chat=False))


def test_special_tokens_as_stop_strings_end_by_their_id():
    made = plan(completion(stop=["<bos>", "w9 w10"])).choices[0]
    tokenizer = tiny_tokenizer()
    assert made.end_tokens == {tokenizer.bos_id, tokenizer.eos_id}
    assert [made.text.feed(token) for token in tokenizer.text_to_ids("w8 w9 w10")] == [False, False, True]
    assert "".join(made.text.pieces) == " w8 "


def test_an_unknown_word_as_stop_string_is_looked_for_in_the_text(tmp_path):
    """To the tokenizer it is the unknown token, which is special and must not end the sequence in its place."""
    words = tiny_gpt.tokenizer()
    words.backend_tokenizer.pre_tokenizer = Whitespace()  # which parts a word from the ">" before it
    words.save_pretrained(tmp_path)
    known = AutoTokenizer(str(tmp_path))
    assert plan(completion(stop="zzz"), known).choices[0].end_tokens == {known.eos_id}


def test_conversations_are_not_tokenized_if_they_cannot_fit():
    turns = [{"role": "user", "content": "x " * 1500}, {"role": "assistant", "content": "x " * 1500}]
    assert "6000 characters" in refused(400, "messages", plan, chat(messages=turns))


class RolesTokenizer:
    """With a chat template of NeMo's own form, which knows users alone."""

    chat_template = {"roles": {"user": "{_content_}"}}
    eos_id, bos_id = 0, 1

    def text_to_ids(self, text):
        return (
            tokenize_with_chat_template(self, text, self.chat_template) if isinstance(text, list) else [7, 8]
        )

    def ids_to_text(self, ids):
        return " w" * len(ids)

    def ids_to_tokens(self, ids):
        return ["w"] * len(ids)


def test_a_role_that_the_template_does_not_know():
    tokenizer = RolesTokenizer()
    assert plan(chat(), tokenizer).prompts == [[7, 8]]
    messages = [{"role": "system", "content": "w1"}]
    assert "template refuses these turns" in refused(
        400, "messages", plan, chat(messages=messages), tokenizer
    )


def test_bos_stands_before_texts_only():
    tokenizer = tiny_tokenizer()
    assert plan(completion(), add_BOS=True).prompts == [[tokenizer.bos_id, *tokenizer.text_to_ids("w1 w2")]]
    assert plan(completion(prompt=[7, 8]), add_BOS=True).prompts == [[7, 8]]


def test_decoding_is_the_tokenizers_own():
    tokenizer = tiny_tokenizer()
    shared = SharedTokenizer(TextTokenizer(tokenizer))
    for ids in ([], [tokenizer.eos_id], [7, tokenizer.eos_id, 8, tokenizer.bos_id], [2, 150]):
        assert shared.decode(ids) == tokenizer.ids_to_text(ids)
