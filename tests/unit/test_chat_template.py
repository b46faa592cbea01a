# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Chats as token ids: Hugging Face's own ids, and of these the ones that the assistant says."""

from functools import partial

import pytest

from nemo_ee.data.chats.chat_template import ChatTemplate, TurnTemplate, messages_of
from tests.support import chat_templates as shapes

TURNS = [
    ("system", "be kind"),
    ("user", "what is it?"),
    ("assistant", "the cat"),
    ("user", " sat?\n"),
    ("assistant", "on the mat\n"),
]
SAID = "\N{SYMBOL FOR RECORD SEPARATOR}"
"""Between the answers of what is expected."""

CASES = {
    # template, EOS, BOS, further ends, whether there is a system's turn, the answers' text
    "Llama 3": (shapes.LLAMA_3, "<|eot_id|>", "<|begin|>", True, "the cat<|eot_id|>{}on the mat<|eot_id|>"),
    "Llama 3, its base's end of text": (
        shapes.LLAMA_3, "<|endoftext|>", "<|begin|>", True, "the cat<|eot_id|>{}on the mat<|eot_id|>",
    ),
    "ChatML": (shapes.CHATML, "<|im_end|>", None, True, "the cat<|im_end|>{}on the mat\n<|im_end|>"),
    "ChatML with a system's turn of its own": (
        shapes.CHATML, "<|im_end|>", "<|begin|>", False, "the cat<|im_end|>{}on the mat\n<|im_end|>",
    ),
    "Mistral": (shapes.MISTRAL, "</s>", "<s>", False, " the cat</s>{} on the mat\n</s>"),
    "Mistral, the system's text in the last question": (
        shapes.MISTRAL_V3, "</s>", "<s>", True, " the cat</s>{} on the mat\n</s>",
    ),
    "Qwen 3": (
        shapes.QWEN_3, "<|im_end|>", None, True,
        "the cat<|im_end|>{}<think>\n\n</think>\n\non the mat\n<|im_end|>",
    ),
    "a prompt that begins thoughts": (
        shapes.THINKING_PROMPT, "<|im_end|>", "<|begin|>", True, "the cat<|im_end|>{}on the mat\n<|im_end|>",
    ),
    "Phi 3": (shapes.PHI_3, "<|endoftext|>", None, True, "the cat<|end|>{}on the mat\n<|end|>"),
    "marks": (shapes.MARKED, "<|im_end|>", None, True, "the cat<|im_end|>{}on the mat\n<|im_end|>"),
    "no ends": (shapes.NO_ENDS, "<|endoftext|>", None, True, " the cat{} on the mat\n\n"),
}  # fmt: skip


def conversation(system: bool) -> list[dict]:
    return [dict(role=role, content=content) for role, content in TURNS if system or role != "system"]


def said(tokenizer, ids, mask) -> str:
    """The text of the tokens that are learnt, answers apart."""
    parts, before = [], False
    for token, learnt in zip(ids, mask, strict=True):
        if learnt and not before:
            parts.append([])
        if learnt:
            parts[-1].append(token)
        before = learnt
    return SAID.join(tokenizer.decode(part) for part in parts)


@pytest.mark.parametrize("case", CASES)
def test_ids_are_hugging_faces_and_answers_what_the_assistant_says(case):
    template, eos, bos, system, expected = CASES[case]
    tokenizer = shapes.tokenizer(template, eos, bos)
    messages, learnt = messages_of({"messages": conversation(system)})
    ids, mask = ChatTemplate(tokenizer, [tokenizer.eos_token_id]).tokens(messages, learnt)
    assert ids == tokenizer.apply_chat_template(conversation(system))
    assert said(tokenizer, ids, mask) == expected.format(SAID)
    if "bos_token" in template:
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_answers_begin_behind_the_prompts_that_are_served():
    tokenizer = shapes.tokenizer(shapes.LLAMA_3, "<|eot_id|>", "<|begin|>")
    messages, learnt = messages_of({"messages": conversation(True)})
    ids, mask = ChatTemplate(tokenizer, [tokenizer.eos_token_id]).tokens(messages, learnt)
    starts = [i for i in range(1, len(mask)) if mask[i] and not mask[i - 1]]
    prompts = [tokenizer.apply_chat_template(messages[:k], add_generation_prompt=True) for k in (2, 4)]
    assert [ids[:start] for start in starts] == prompts


def test_thoughts_are_learnt_where_the_template_shows_them():
    tokenizer = shapes.tokenizer(shapes.QWEN_3, "<|im_end|>")
    messages = conversation(False)
    messages[1]["content"] = "<think>\nhm\n</think>\n\nthe cat"
    messages[3]["content"] = "<think>\nwell\n</think>\n\non the mat"
    ids, mask = ChatTemplate(tokenizer, [tokenizer.eos_token_id]).tokens(messages, [False, True] * 2)
    assert ids == tokenizer.apply_chat_template(messages)
    expected = f"the cat<|im_end|>{SAID}<think>\nwell\n</think>\n\non the mat<|im_end|>"
    assert said(tokenizer, ids, mask) == expected


def test_all_ends_of_a_text_end_an_answer():
    tokenizer = shapes.tokenizer(shapes.PHI_3, "<|endoftext|>")
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    messages, learnt = messages_of({"messages": conversation(True)})
    ids, mask = ChatTemplate(tokenizer, ends).tokens(messages, learnt)
    assert said(tokenizer, ids, mask) == f"the cat<|end|>{SAID}on the mat\n<|end|>"


def test_nemos_conversations():
    line = dict(
        system="be kind",
        mask="User",
        conversations=[dict(zip(("from", "value"), turn, strict=True)) for turn in TURNS[1:]],
    )
    assert messages_of(line) == (conversation(True), [False, False, True, False, True])
    assert messages_of({**line, "system": ""})[0] == conversation(False)


@pytest.mark.parametrize(
    ("turns", "mask", "learnt"),
    [
        ("human gpt", None, [False, True]),
        ("Asker Helper", "Asker", [False, True]),
        ("A User B User B", "A,User", [False, False, True, False, True]),
        ("user assistant gpt", "user,gpt", [False, True, False]),
    ],
)
def test_speakers(turns, mask, learnt):
    line = {"conversations": [{"from": name, "value": "the"} for name in turns.split()]}
    found, which = messages_of({**line, "mask": mask} if mask else line)
    assert which == learnt
    assert all(message["role"] == "assistant" for message, one in zip(found, which, strict=True) if one)


TURN = {"role": "user", "content": "the"}
ANSWER = {"role": "assistant", "content": "cat"}
UNSOUND = {
    "has neither": {"text": "the"},
    "set model.data.chat=false": {"input": "the", "output": "cat"},
    "no list of turns": {"messages": "the"},
    "without the texts 'role' and 'content'": {"messages": [TURN, {"role": "assistant", "content": None}]},
    "without the texts 'from' and 'value'": {"conversations": [TURN]},
    "no turn of an assistant": {"messages": [TURN]},
    "say in 'mask'": {"conversations": [{"from": "Bob", "value": "the"}]},
    "name them in 'mask'": {"mask": "Bob", "conversations": [{"from": "User", "value": "the"}]},
    "'tools'": {"messages": [TURN, ANSWER], "tools": [{"name": "search"}]},
    "has 'mask'": {"messages": [TURN, ANSWER], "mask": "user"},
    "'weight' other than 0": {"messages": [TURN, {**ANSWER, "weight": 0.5}]},
    "a system's message twice": {"messages": [{**TURN, "role": "system"}, ANSWER], "system": "the"},
}


def test_messages_with_weights_and_a_system_beside_them():
    """OpenAI's `weight` says which answers are learnt."""
    line = {"messages": [TURN, {**ANSWER, "weight": 0}, TURN, {**ANSWER, "weight": 1}], "system": "be kind"}
    messages, learnt = messages_of(line)
    assert messages[0] == {"role": "system", "content": "be kind"} and messages[1:] == line["messages"]
    assert learnt == [False, False, False, False, True]


@pytest.mark.parametrize("message", UNSOUND)
def test_lines_that_are_no_chats(message):
    with pytest.raises(ValueError, match=message):
        messages_of(UNSOUND[message])


def test_what_a_template_refuses():
    tokenizer = shapes.tokenizer(shapes.MISTRAL, "</s>", "<s>")
    with pytest.raises(ValueError, match="refused by the tokenizer's chat template: no system turns"):
        ChatTemplate(tokenizer, [2]).tokens(*messages_of({"messages": conversation(True)}))


def test_an_answer_that_is_not_shown():
    tokenizer = shapes.tokenizer("{% for m in messages %}{{ m['role'] }}{% endfor %}", "</s>")
    with pytest.raises(ValueError, match="turn 2, which the tokenizer's chat template does not show"):
        ChatTemplate(tokenizer, [2]).tokens([TURN, ANSWER], [False, True])


class TestNemosTemplates:
    """Of tokenizers of other libraries; token by token here, letters of words."""

    TEMPLATE = {
        "prefix": "{_bos_id_}",
        "roles": {"User": "u {_content_}|", "Assistant": "a {_content_}{_eos_id_}"},
    }

    class Letters:
        bos_id, eos_id = 1, 2

        def __init__(self, template):
            self.chat_template = template

        def text_to_ids(self, text):
            return [ord(letter) for letter in text]

    def tokens(self, messages, learnt, template=TEMPLATE):
        from nemo_ee.generation.prompts import chat_tokens  # and NeMo

        return TurnTemplate(partial(chat_tokens, self.Letters(template))).tokens(messages, learnt)

    def test_an_answer_is_what_its_turn_adds_to_the_prompt(self):
        turns = [("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "no")]
        messages = [dict(role=role, content=content) for role, content in turns]
        ids, mask = self.tokens(messages, [False, True, False, True])
        pieces = [([1], 0), ("u hi|", 0), ("a yo", 1), ([2], 1), ("u so|", 0), ("a no", 1), ([2], 1)]
        expected = [
            (ord(i) if isinstance(i, str) else i, bool(mark)) for piece, mark in pieces for i in piece
        ]
        assert list(zip(ids, mask, strict=True)) == expected

    def test_what_cannot_be_learnt_is_refused(self):
        hi, yo = dict(role="user", content="hi"), dict(role="assistant", content="yo")
        with pytest.raises(ValueError, match="begins with an answer"):
            self.tokens([yo, hi], [True, False])
        with pytest.raises(ValueError, match="role tool"):
            self.tokens([hi, dict(role="tool", content="x"), yo], [False, False, True])
