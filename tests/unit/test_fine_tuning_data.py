# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning data: NeMo's samples, the order they come in, what is said of lines and keys that cannot be used."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from nemo_ee.data.chats.json_lines import JsonLines
from nemo_ee.errors import ConfigError, DataError
from nemo_ee.models.checks.fine_tuning_checks import check_lines
from nemo_ee.models.checks.model_checks import check_tuning
from tests.support import chats
from tests.support.tiny_gpt import tiny_model_config, tokenizer, tokenizer_folder


@pytest.fixture(scope="module")
def tokens():
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    return AutoTokenizer(tokenizer_folder())


def write(path: Path, *lines: object) -> str:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def prompts(path: str, tokens, **changes):
    from nemo_ee.data.chats.fine_tuning import PromptDataset

    settings = dict(max_seq_length=chats.LONGEST, label_key="output", truncation_field="input")
    settings |= dict(prompt_template="{input} {output}", get_attention_mask_from_fusion=True)
    return PromptDataset(file_path=path, tokenizer=tokens, **{**settings, **changes})


def template_chats(path: str, tokens, **changes):
    from nemo_ee.data.chats.chat_template import ChatTemplate
    from nemo_ee.data.chats.fine_tuning import TemplateChatDataset

    settings = dict(max_seq_length=chats.LONGEST, get_attention_mask_from_fusion=True)
    template = ChatTemplate(tokens.tokenizer, [tokens.eos_id])
    return TemplateChatDataset(
        file_path=path, tokenizer=tokens, special_tokens=template, **{**settings, **changes}
    )


@pytest.mark.parametrize("all_tokens", [False, True])
@pytest.mark.parametrize("kind", ["chats", "prompts"])
def test_samples_are_the_lines_padded_with_nothing(kind, all_tokens, tokens, tmp_path):
    path = getattr(chats, f"write_{kind}")(tmp_path / "lines.jsonl")
    make = prompts if kind == "prompts" else template_chats
    data = make(path, tokens, answer_only_loss=not all_tokens)
    expected = chats.samples_of(path, all_tokens)
    batch = data.collate_fn([data[i] for i in range(len(data))])
    length = max(len(ids) for ids, *_ in expected)
    assert batch["tokens"].shape == (len(expected), -(-length // 16) * 16)
    assert batch["position_ids"].equal(torch.arange(batch["tokens"].shape[1]).expand_as(batch["tokens"]))
    for row, (ids, labels, learnt) in enumerate(expected):
        assert batch["tokens"][row, : len(ids)].equal(ids) and batch["labels"][row, : len(ids)].equal(labels)
        assert batch["loss_mask"][row, : len(ids)].bool().equal(learnt)
        assert not batch["loss_mask"][row, len(ids) :].any()


def test_what_nemos_own_dataset_makes_of_prompts(tokens, tmp_path):
    """Against GPTSFTDataset itself, with its own reader of files."""
    from nemo_ee.data.chats.fine_tuning import GPTSFTDataset

    path = chats.write_prompts(tmp_path / "lines.jsonl")
    settings = dict(label_key="output", truncation_field="input", prompt_template="{input} {output}")
    theirs = GPTSFTDataset(
        path, tokens, 8, add_bos=True, get_attention_mask_from_fusion=True, memmap_workers=1, **settings
    )
    mine = prompts(path, tokens, max_seq_length=8, add_bos=True)
    for index in range(len(theirs)):
        one, other = theirs.collate_fn([theirs[index]]), mine.collate_fn([mine[index]])
        assert all(other[key].equal(one[key]) for key in other), index


@pytest.mark.parametrize("template", ["", "<s>"])
@pytest.mark.parametrize("given", [None, True, False])
def test_prompts_begin_as_texts_do(template, given, tmp_path):
    """By the tokenizer's own rule, which a fast one has in its post-processor alone, unless the section says else."""
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from tokenizers.processors import TemplateProcessing

    from nemo_ee.generation.text import TextTokenizer
    from nemo_ee.models.fine_tuning_files import open_files

    theirs = tokenizer()
    theirs.add_special_tokens({"bos_token": "<s>"})
    theirs.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{template} $A".strip(), special_tokens=[("<s>", theirs.bos_token_id)]
    )
    theirs.save_pretrained(tmp_path / "tokenizer")
    path = write(tmp_path / "lines.jsonl", dict(input="w1", output="w2"))
    section = dict(file_names=[path], max_seq_length=8, prompt_template="{input} {output}", add_bos=given)
    cfg = OmegaConf.create(dict(data=dict(train_ds=section)))
    text = TextTokenizer(AutoTokenizer(str(tmp_path / "tokenizer")))
    ids = open_files(cfg, "train_ds", text)[0][0]["input_ids"]
    bare = theirs("w1 w2", add_special_tokens=False).input_ids
    own = theirs("w1 w2").input_ids if given is None else [theirs.bos_token_id] * given + bare
    assert ids == [*own, theirs.eos_token_id]


def test_nemos_marks_of_turns(tokens, tmp_path):
    """NeMo's chats: from the name on an answer is learnt, to the mark of the next turn."""
    from nemo_ee.data.chats.fine_tuning import MarkedChatDataset

    marks = dict(system_turn_start=" w0 ", turn_start=" w1 ", label_start=" w2 ")
    marks |= dict(end_of_turn=" w3 ", end_of_name=" w4 ")
    turns = [
        dict(zip(("from", "value"), turn, strict=True))
        for turn in [("user", "w10"), ("assistant", "w11 w12")]
    ]
    path = write(tmp_path / "marked.jsonl", dict(system="w9", mask="user", conversations=turns))
    data = MarkedChatDataset(
        file_path=path, tokenizer=tokens, special_tokens=marks, get_attention_mask_from_fusion=True
    )
    item = data[0]
    words = tokens.tokenizer.convert_ids_to_tokens(item["input_ids"])
    learnt = [word for word, one in zip(words, item["mask"], strict=True) if one]
    assert words[-6:] == ["assistant", "w4", "w11", "w12", "w3", "w1"] and learnt == words[-4:]


def test_order_of_lines(tokens, tmp_path):
    from nemo_ee.data.chats.fine_tuning import FineTuningData

    files = [prompts(chats.write_prompts(tmp_path / f"{n}", n), tokens) for n in (5, 9)]
    short, long = (FineTuningData(files[:1], size, shuffle=True) for size in (7, 23))
    assert len(short) == 7 and np.array_equal(long.sample_of[:7], short.sample_of), "longer runs begin alike"
    epochs = [long.sample_of[start : start + 5].tolist() for start in (0, 5, 10, 15)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs), "every line once in every epoch"
    assert len({tuple(epoch) for epoch in epochs}) > 1
    other = FineTuningData(files[:1], 23, shuffle=True, seed=1)
    assert not np.array_equal(long.sample_of, other.sample_of)
    assert FineTuningData(files[:1], 7).sample_of.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert len(FineTuningData(files, 3)) == 14, "closed forms may read lines that a short run does not"
    both = FineTuningData(files)
    pairs = sorted(zip(both.file_of.tolist(), both.sample_of.tolist(), strict=True))
    assert pairs == [(n, line) for n, length in enumerate((5, 9)) for line in range(length)]
    weighted = FineTuningData(files, 1000, weights=[3, 1])
    assert 748 <= (weighted.file_of == 0).sum() <= 752


def test_survey_and_shortlist(tokens, tmp_path):
    from nemo_ee.data.chats.fine_tuning import FineTuningData, survey

    path = chats.write_chats(tmp_path / "chats.jsonl")
    found = survey(FineTuningData([template_chats(path, tokens)]), chats.VOCABULARY)
    samples = chats.samples_of(path)
    learnt = torch.cat([labels[mask] for _, labels, mask in samples])
    read = torch.cat([labels for _, labels, _ in samples])
    assert found.learnt.equal(torch.bincount(learnt, minlength=chats.VOCABULARY))
    assert found.read.equal(torch.bincount(read, minlength=chats.VOCABULARY))
    assert found.tokens_per_line == pytest.approx(len(learnt) / len(samples))
    whole = [len(tokenizer().apply_chat_template(json.loads(line)["messages"])) for line in Path(path).open()]
    assert found.cut == sum(length - 1 > chats.LONGEST for length in whole) > 0
    order = sorted(range(chats.VOCABULARY), key=lambda t: (-int(found.learnt[t]), -int(found.read[t]), t))
    assert found.most_frequent(chats.VOCABULARY).tolist() == order


def test_nothing_to_learn(tokens, tmp_path):
    for data in (
        prompts(chats.write_prompts(tmp_path / "a"), tokens),
        prompts(chats.write_prompts(tmp_path / "b"), tokens, answer_only_loss=False),
        template_chats(chats.write_chats(tmp_path / "c"), tokens, answer_only_loss=False),
    ):
        assert (
            not data.collate_fn([data[None]])["loss_mask"].any()
            and data.collate_fn([data[0]])["loss_mask"].any()
        )


def test_files_that_change_are_read_anew(tmp_path):
    path = write(tmp_path / "lines.jsonl", {"a": 1}, "\n", {"a": 2})
    assert [JsonLines(path)[i]["a"] for i in range(2)] == [1, 2]
    assert JsonLines(path).where(1).endswith("line 3")
    write(tmp_path / "lines.jsonl", {"a": 3})
    assert len(JsonLines(path)) == 1 and JsonLines(path)[0] == {"a": 3}
    assert [each.name for each in tmp_path.iterdir()] == ["lines.jsonl"], "no index lies beside it"


CHAT = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
PROMPT = {"input": "w1", "output": "w2"}
BAD_LINES = {
    "no file": (None, True, "train_ds.file_names=.*: there is no such file"),
    "empty": ([""], True, "the file is empty"),
    "blank": (["\n\n"], True, "the file has no text"),
    "no JSON": ([CHAT, CHAT, "{no\n"], True, "line 3 is no JSON"),
    "a list": ([CHAT, "\n", [1]], True, "line 3 is a JSON list"),
    "no Unicode": ([CHAT, b"\xff\n"], True, "line 2 must be UTF-8 text"),
    "no answer": ([CHAT, {"messages": CHAT["messages"][:1]}], True, "line 2 has no answer"),
    "a prompt among chats": ([CHAT, PROMPT], True, "line 2 has neither .*set model.data.chat=false"),
    "a chat among prompts": ([PROMPT, CHAT], False, "line 2 has no text 'input'.*set model.data.chat=true"),
    "no output": ([PROMPT, {"input": "w1"}], False, "line 2 has no text 'output'"),
    "a number": ([{"input": 1, "output": "w1"}], False, "line 1 has no text 'input'"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines(case, tmp_path):
    lines, chat, message = BAD_LINES[case]
    path = tmp_path / "bad.jsonl"
    if lines is not None:
        parts = (
            line
            if isinstance(line, bytes)
            else line.encode()
            if isinstance(line, str)
            else json.dumps(line).encode() + b"\n"
            for line in lines
        )
        path.write_bytes(b"".join(parts))
    data = OmegaConf.create(chats.data_section([str(path)], [], chat))
    with pytest.raises(DataError, match=message):
        check_lines(data)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [CHAT, {"messages": [{"role": "user", "content": "w1 " * 60}, CHAT["messages"][1]]}],
            "line 2 has no token of an",
        ),
    ],
)
def test_answers_that_are_cut_away(lines, message, tokens, tmp_path):
    from nemo_ee.data.chats.fine_tuning import FineTuningData, survey

    data = template_chats(write(tmp_path / "long.jsonl", *lines), tokens)
    with pytest.raises(DataError, match=message):
        survey(FineTuningData([data]), chats.VOCABULARY)
    prompt = {"input": "w1", "output": "w2 " * 90}
    cut = prompts(write(tmp_path / "cut.jsonl", prompt, {"input": "w1 " * 90, "output": "w3"}), tokens)
    assert survey(FineTuningData([cut]), chats.VOCABULARY).cut == 2, "NeMo shortens them"


FAULTS = {
    "neither": (dict(data__train_ds__file_names=None), "model.data.data_prefix", "file_names=[chats.jsonl]"),
    "both": (dict(data__data_prefix=["text"]), "model.data.train_ds.file_names", "leave one of the two out"),
    "packed": (
        dict(data__train_ds__packed_sequence=True),
        "packed_sequence",
        "++model.data.train_ds.packed_sequence",
    ),
    "an index": (dict(data__train_ds__memmap_workers=2), "memmap_workers", "=null"),
    "unknown": (dict(data__train_ds__max_seq_lenght=8), "max_seq_lenght", "leave it out"),
    "other batches": (
        dict(data__train_ds__global_batch_size=16),
        "global_batch_size",
        "model.global_batch_size=16",
    ),
    "too long": (dict(data__validation_ds__max_seq_length=65), "validation_ds.max_seq_length", "at most 64"),
    "weights": (dict(data__train_ds__concat_sampling_probabilities=[1, 1]), "concat_sampling", "null"),
    "no answer in the template": (
        dict(data__chat=False, data__train_ds__prompt_template="{output} {input}"),
        "prompt_template",
        "{input} {output}",
    ),
    "a field that is not there": (
        dict(data__chat=False, data__train_ds__truncation_field="text"),
        "truncation_field",
        "input",
    ),
    "a string": (dict(data__train_ds__file_names="a"), "file_names", "[a]"),
    "BOS of a chat": (dict(data__train_ds__add_bos=True), "add_bos", "false"),
    "no end of a chat": (dict(data__train_ds__add_eos=False), "add_eos", "=true"),
    "the side of a chat": (dict(data__train_ds__truncation_method="left"), "truncation_method", "right"),
    "a prompt's template": (
        dict(data__train_ds__prompt_template="{a}{output}"),
        "prompt_template",
        "{input} {output}",
    ),
    "marks without chats": (
        dict(data__chat=False, data__chat_prompt_tokens=dict(turn_start="a")),
        "chat_prompt",
        "chat=true",
    ),
    "answers written": (dict(data__validation_ds__tokens_to_generate=32), "tokens_to_generate", "=0"),
    "a metric": (dict(data__validation_ds__metric=dict(name="rouge")), "metric", "=null"),
    "tests": (dict(data__test_ds=dict(file_names=["a"])), "test_ds", "=null"),
    "validation alone": (
        dict(data__train_ds=None, data__data_prefix=["text"]),
        "validation_ds.file_names",
        "train_ds",
    ),
    "parts of a sequence": (
        dict(tensor_model_parallel_size=7, sequence_parallel=True),
        "max_seq_length",
        "multiple of 7",
    ),
}


def config(**changes):
    return tiny_model_config(data=chats.data_section(["a"], ["b"]), global_batch_size=8, **changes)


@pytest.mark.parametrize("case", FAULTS)
def test_faults(case):
    changes, key, remedy = FAULTS[case]
    with pytest.raises(ConfigError) as raised:
        check_tuning(config(**changes))
    found = [fault for fault in raised.value.faults if key in fault.key]
    assert found and all(remedy in fault.remedy for fault in found), raised.value


def test_sound():
    check_tuning(config())
    check_tuning(config(data__train_ds__global_batch_size=None, data__train_ds__truncation_field=None))
    check_tuning(config(data__train_ds__packed_sequence=False, data__validation_ds__metric=dict(name="loss")))


def test_templates_of_prompts_in_any_script(tokens, tmp_path):
    """NeMo itself makes two characters of one that is not ASCII."""
    path = write(tmp_path / "lines.jsonl", PROMPT)
    template = "für “{input}”\\n→ {output}"
    data = prompts(path, tokens, prompt_template=template, truncation_field=None)
    assert data.prompt_template == template.replace("\\n", "\n")
    assert data._separate_template(["w1", "w2"])[0] == ["für “", "w1", "”\n→", "w2"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_files_of_other_systems(end, mark, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(mark + end.join(['{"a": 1}', "", '{"a": 2}', "", ""]).encode())
    lines = JsonLines(str(path))
    assert [lines[i] for i in range(len(lines))] == [{"a": 1}, {"a": 2}]
    assert lines.where(1).endswith("line 3")


def test_files_that_are_none(tmp_path):
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n'))
    with pytest.raises(DataError, match="is compressed; unpack it"):
        JsonLines(str(tmp_path / "lines.jsonl.gz"))
    with pytest.raises(DataError, match="is a directory; name the files"):
        JsonLines(str(tmp_path))


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_marked_answers_that_were_cut(reason, tokens, tmp_path):
    """Where generation was stopped, the model is not taught to end."""
    from nemo_ee.data.chats.fine_tuning import MarkedChatDataset

    marks = dict(system_turn_start=" w0 ", turn_start=" w1 ", label_start=" w2 ")
    marks |= dict(end_of_turn=" w3 ", end_of_name=" w4 ")
    turns = [
        dict(zip(("from", "value"), turn, strict=True))
        for turn in [("user", "w10"), ("assistant", "w11 w12")]
    ]
    line = dict(system=None, mask="user", conversations=turns, finish_reason=reason)
    settings = dict(special_tokens=marks, max_seq_length=40, get_attention_mask_from_fusion=True)
    data = MarkedChatDataset(file_path=write(tmp_path / "marked.jsonl", line), tokenizer=tokens, **settings)
    batch = data.collate_fn([data[0]])
    learnt = tokens.tokenizer.convert_ids_to_tokens(batch["labels"][0][batch["loss_mask"][0].bool()])
    assert learnt == ["w11", "w12"] + ["w3", "w1"] * (reason == "stop")
