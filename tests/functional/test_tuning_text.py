# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A tiny model writes its own tuning text: its answers, interruptions, other settings, and NeMo as the reader."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.support.distributed import WorkerError
from tests.support.script import ROOT, run_script

CANDIDATES = [f"w{n} w{n + 1} w{2 * n}" for n in range(60)]
LENGTH = 12
USUAL = [
    "gpt_model_file=base.nemo",
    "prompts.file=prompts.txt",
    f"inference.tokens_to_generate={LENGTH}",
    "batch_size=1",
]
"""With the prompts below these are two blocks of four, and one that is not full."""


def write_base(directory):
    """A base without exits that ends texts more often than by chance, and eleven prompts: five whose answers end, five
    whose answers are cut, and between them one whose answer has no text."""
    from tests.support import tiny_gpt

    config = tiny_gpt.tiny_model_config(share_embeddings_and_output_weights=False)
    del config.early_exit
    model = tiny_gpt.tiny_model(config)
    model.gpt.output_weight().data[model.tokenizer.eos_id] *= 1.6
    said = spoken(model, CANDIDATES)
    ended = [prompt for prompt, (text, end) in said.items() if text and end][:5]
    cut = [prompt for prompt, (text, end) in said.items() if text and not end][:5]
    empty = [prompt for prompt, (text, _) in said.items() if not text][:1]
    prompts = [*ended[:2], *cut[:3], *empty, *ended[2:], *cut[3:]]
    assert len(prompts) == 11
    model.save_to(f"{directory}/base.nemo")
    Path(directory, "prompts.txt").write_text("\n".join(prompts) + "\n")


def spoken(model, prompts):
    """Prompt -> what the model's own `generate` says to it: text, and whether it ended there."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    strings = {"end_strings": ["<|endoftext|>"]}
    output = model.generate(chats, {"max_length": LENGTH}, strings, early_exit=False)
    found = {}
    for prompt, ids, exits in zip(prompts, output["token_ids"], output["early_exit"], strict=True):
        new = ids[-len(exits["exit_layers"]) :]
        ended = new[-1] == model.tokenizer.eos_id
        words = model.tokenizer.ids_to_tokens(new[:-1] if ended else new)
        found[prompt] = (" ".join(word for word in words if not word.startswith("<")), ended)
    return found


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, workers):
    directory = tmp_path_factory.mktemp("tuning_text")
    workers(1).run(write_base, str(directory))
    return directory


def generate(directory, prefix, *overrides, dies_in_block=None):
    """The script's own steps in this rank; `dies_in_block` is killed while it writes that block."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder
    from nemo_ee.tuning_text.answer_files import AnswerFiles
    from nemo_ee.tuning_text.generate import generate_tuning_text
    from nemo_ee.tuning_text.settings import TuningTextConfig

    os.chdir(directory)
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        overrides = [*USUAL, f"output_prefix={prefix}", *overrides]
        values = OmegaConf.to_container(compose("generate_tuning_text", overrides), resolve=True)
    trainer = values.pop("trainer")
    config = TuningTextConfig.from_dict({**values, "precision": trainer["precision"]})
    append, blocks = AnswerFiles.append, []

    def dying_append(files, records, progress):
        if len(blocks) == dies_in_block:
            with open(f"{prefix}.partial.jsonl", "a") as stream:
                stream.write(json.dumps(records[0])[:30])
            os.kill(os.getpid(), signal.SIGKILL)
        blocks.append(len(records))
        append(files, records, progress)

    AnswerFiles.append = dying_append
    settings = OmegaConf.create({"trainer": trainer, "model": {"precision": config.precision}})
    generate_tuning_text(config, EarlyExitTrainerBuilder(settings).create_trainer())
    return blocks


def read(directory, prefix, part="train"):
    return (directory / f"{prefix}_{part}.jsonl").read_bytes()


def chats(directory, prefix):
    """Both files' lines."""
    parts = (read(directory, prefix, part).decode() for part in ("train", "validation"))
    return [json.loads(line) for part in parts for line in part.splitlines()]


def answers(directory, prefix):
    """Question -> answer."""
    found = {}
    for chat in chats(directory, prefix):
        question, answer = chat["conversations"]
        assert (question["from"], answer["from"]) == ("User", "Assistant")
        found[question["value"]] = answer["value"]
    return found


def expected(directory):
    """What the base says."""
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel
    from tests.support.tiny_gpt import tiny_trainer

    model = MegatronGPTEarlyExitModel.restore_from(f"{directory}/base.nemo", trainer=tiny_trainer())
    return spoken(model.eval(), Path(directory, "prompts.txt").read_text().split("\n")[:-1])


def test_answers_are_what_the_model_says(workspace, workers):
    result = run_script(
        workspace, "generate_tuning_text.py", *USUAL, "output_prefix=script", "validation_share=0.2"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "wrote script_train.jsonl" in result.stdout and "tokens/s" in result.stdout
    (wanted,) = workers(1).run(expected, str(workspace))
    assert answers(workspace, "script") == {prompt: text for prompt, (text, _) in wanted.items() if text}
    for chat in chats(workspace, "script"):
        ended = wanted[chat["conversations"][0]["value"]][1]
        assert chat["finish_reason"] == ("stop" if ended else "length")
    assert len(read(workspace, "script", "validation").splitlines()) == 2
    before = read(workspace, "script")
    assert workers(1).run(generate, workspace, "script", "validation_share=0.2") == [[]], "all is there"
    assert read(workspace, "script") == before


SAMPLING = ["inference.greedy=false", "inference.temperature=1.5"]


@pytest.mark.parametrize("sampling", [[], pytest.param(SAMPLING, marks=pytest.mark.slow)])
def test_killed_runs_go_on_to_the_same_bytes(workspace, workers, sampling):
    whole, killed = (f"{name}{len(sampling)}" for name in ("whole", "killed"))
    assert workers(1).run(generate, workspace, whole, *sampling) == [[4, 3, 3]]
    for block in (0, 1):
        with pytest.raises(WorkerError):
            workers(1).run(generate, workspace, killed, *sampling, dies_in_block=block)
        assert not (workspace / f"{killed}_train.jsonl").exists(), "nothing is there under its name too early"
    assert workers(1).run(generate, workspace, killed, *sampling) == [[3, 3]], "the first block was kept"
    for part in ("train", "validation"):
        assert read(workspace, killed, part) == read(workspace, whole, part)
    assert not list(workspace.glob(f"{killed}.partial*"))
    if sampling:
        if not (workspace / "whole0_train.jsonl").exists():
            workers(1).run(generate, workspace, "whole0")
        assert answers(workspace, killed) != answers(workspace, "whole0")


@pytest.mark.parametrize(
    "layout",
    [
        ["batch_size=3"],
        ["tensor_model_parallel_size=2"],
        pytest.param(["pipeline_model_parallel_size=2"], marks=pytest.mark.slow),
    ],
)
def test_answers_do_not_depend_on_batches_and_layouts(workspace, workers, layout):
    processes = 1 if "batch" in layout[0] else 2
    workers(processes).run(generate, workspace, layout[0][:4], *layout, f"trainer.devices={processes}")
    workers(1).run(generate, workspace, "alone") if not (workspace / "alone.json").exists() else None
    assert answers(workspace, layout[0][:4]) == answers(workspace, "alone")


def test_minutes_end_a_run_between_blocks(workspace, workers):
    assert workers(1).run(generate, workspace, "short", "minutes=1e-9", "validation_share=0") == [[4]]
    assert (
        len(read(workspace, "short").splitlines()) == 4
        and not (workspace / "short_validation.jsonl").exists()
    )


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["inference.tokens_to_generate=13"],
            "inference.tokens_to_generate=13: begun.partial.json was begun with 12",
        ),
        (["inference.greedy=false"], "inference.greedy=false: .* was begun with true"),
        (["prompts.count=5"], "prompts=5 of sha256 .* was begun with 11 of sha256"),
        (["gpt_model_file=full.nemo"], "gpt_model_file=content .* was begun with content"),
        (["output_prefix=none/text"], "output_prefix=none/text: its directory does not exist"),
        (["inference.temperature=0"], "inference.temperature=0"),
        (["trainer.precision=bf16"], "trainer.precision=bf16: .* was begun with 32"),
    ],
)
def test_another_run_than_the_files_were_begun_with_is_refused(workspace, workers, overrides, message):
    if not (workspace / "begun.partial.json").exists():
        workers(1).run(write_other, workspace)
        with pytest.raises(WorkerError):
            workers(1).run(generate, workspace, "begun", dies_in_block=1)
    with pytest.raises(WorkerError, match=message):
        workers(1).run(generate, workspace, "begun", *overrides)


def write_other(directory):
    """A base of the same shape with other weights."""
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel
    from tests.support.tiny_gpt import tiny_trainer

    model = MegatronGPTEarlyExitModel.restore_from(f"{directory}/base.nemo", trainer=tiny_trainer())
    model.gpt.output_weight().data.mul_(2)
    model.save_to(f"{directory}/full.nemo")


def read_with_nemo(path):
    """Samples of NeMo's own data set of chats: the words that enter the loss."""
    from nemo_ee.runtime.upstream.hugging_face_datasets import datasets_or_stand_in

    with datasets_or_stand_in():
        from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import (
            GPTSFTChatDataset,
        )
    from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer

    from tests.support.tiny_tokenizer import save_tiny_tokenizer

    tokenizer = get_nmt_tokenizer("huggingface", str(save_tiny_tokenizer(Path("byte_level"))), use_fast=True)
    special = dict(
        system_turn_start="<extra_id_0>",
        turn_start="<extra_id_1>",
        label_start="<extra_id_2>",
        end_of_turn="\n",
        end_of_name="\n",
    )
    dataset = GPTSFTChatDataset(
        path, tokenizer, 4096, special_tokens=special, tokens_to_generate=0, index_mapping_dir="."
    )
    found = []
    for sample in (dataset[i] for i in range(len(dataset))):
        kept = sample["input_ids"][sample["mask"]].tolist()
        found.append((tokenizer.ids_to_text(kept), sample["metadata"]["finish_reason"]))
    return found


def test_nemo_reads_the_file(workspace, workers):
    if not (workspace / "alone.json").exists():
        workers(1).run(generate, workspace, "alone")
    (samples,) = workers(1).run(read_with_nemo, str(workspace / "alone_train.jsonl"))
    lines = [json.loads(line) for line in read(workspace, "alone").decode().splitlines()]
    assert [text.partition("\n")[0] for text, _ in samples] == [
        line["conversations"][1]["value"] for line in lines
    ]
    assert [reason for _, reason in samples] == [line["finish_reason"] for line in lines]


def read_for_tuning(directory):
    """(prompt and answer as tuning reads them, the part that is learnt, finish_reason) of each line."""
    from nemo_ee.data.chats.chat_template import ChatTemplate
    from nemo_ee.data.chats.fine_tuning import TemplateChatDataset
    from tests.support.tiny_gpt import tokenizer as tiny_tokenizer

    tokenizer = tiny_tokenizer()
    template = ChatTemplate(tokenizer, [tokenizer.eos_token_id])
    path = f"{directory}/alone_train.jsonl"
    dataset = TemplateChatDataset(path, tokenizer, 4096, special_tokens=template)
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    samples = [dataset[i] for i in range(len(dataset))]
    learnt = [tokenizer.convert_ids_to_tokens(each["input_ids"][each["mask"]].tolist()) for each in samples]
    whole = [tokenizer.convert_ids_to_tokens(each["input_ids"].tolist()) for each in samples]
    return list(zip(lines, whole, learnt, strict=True))


def test_an_answer_that_was_cut_is_not_learnt_to_end_there(workspace, workers):
    if not (workspace / "alone.json").exists():
        workers(1).run(generate, workspace, "alone")
    (found,) = workers(1).run(read_for_tuning, str(workspace))
    assert {line["finish_reason"] for line, _, _ in found} == {"stop", "length"}
    for line, whole, learnt in found:
        question, answer = (turn["value"].split() for turn in line["conversations"])
        end = ["<eos>"] if line["finish_reason"] == "stop" else []  # what the template puts behind a turn
        assert learnt == [*answer, *end]
        assert whole == ["user", *question, "<eos>", "assistant", *answer, *end]
