# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""scripts/megatron_gpt_ee_tuning.py on chats and prompts, as a user runs it."""

import json
from pathlib import Path

import pytest
import torch

from nemo_ee.checkpoint import archive
from tests.functional.test_tuning_script import call_script, write_base
from tests.support import tiny_llama

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ ('state ' if m['role'] == 'assistant' else 'token ') }}"
    "{{ m['content'] + '</s>' }}{% endfor %}{% if add_generation_prompt %}state {% endif %}"
)
"""The answers' words stand between `state` and `</s>`."""
LAST = "{mlp: false, norm: true, linear: false, projection: tied, train_projection: false}"


def chats(path: Path, lines: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)

    def words(most: int) -> str:
        count = int(torch.randint(1, most + 1, (), generator=generator))
        return " ".join(f"w{int(n)}" for n in torch.randint(0, 70, (count,), generator=generator))

    with path.open("w") as file:
        for line in range(lines):
            turns = []
            for _ in range(1 + line % 3):
                turns += [dict(role="user", content=words(4)), dict(role="assistant", content=words(6))]
            file.write(json.dumps({"messages": turns}) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, workers) -> Path:
    """A base whose tokenizer has a chat template and one whose tokenizer has none; chats."""
    folder = tmp_path_factory.mktemp("chats")
    source = tiny_llama.write(folder / "hf")
    for name, template in (("plain", None), ("base", TEMPLATE)):
        tokenizer = tiny_llama.tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(source)
        workers(1).run(write_base, str(source), str(folder / f"{name}.nemo"))
    chats(folder / "train.jsonl", 9, 0)
    chats(folder / "validation.jsonl", 7, 1)
    return folder


def arguments(folder: Path, **changes: str | None) -> list[str]:
    values = {
        "model.restore_from_path": f"{folder}/base.nemo",
        "model.early_exit.layers": "[4]",
        "model.early_exit.head": LAST,
        "model.early_exit.init": "copy",
        "model.early_exit.tuning": "{ce_weight: 1.0, kl_weight: 0.0, argmax_weight: 0.0}",
        "model.data.chat": "true",
        "model.data.train_ds.file_names": f"[{folder}/train.jsonl]",
        "model.data.train_ds.max_seq_length": "40",
        "model.data.validation_ds.file_names": f"[{folder}/validation.jsonl]",
        "trainer.max_steps": "2",
        "trainer.val_check_interval": "2",
        "trainer.limit_val_batches": "1.0",
        "trainer.log_every_n_steps": "1",
        "trainer.precision": "32",
        "model.optim.sched.warmup_steps": "1",
        "exp_manager.explicit_log_dir": f"{folder}/run",
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in values.items() if value is not None]


def hugging_face_loss(folder: Path) -> float:
    """Cross-entropy of the whole model on the answers of the validation file, `</s>` included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(folder / "hf") for kind in (AutoModelForCausalLM, AutoTokenizer))
    losses = []
    for line in (folder / "validation.jsonl").open():
        ids = torch.tensor(tokenizer.apply_chat_template(json.loads(line)["messages"]))[:41]
        labels, says = [], False
        for word in tokenizer.convert_ids_to_tokens(ids.tolist()):
            labels.append(says)
            says = word == "state" or (says and word != "</s>")
        with torch.no_grad():
            log = model(ids[None]).logits[0].log_softmax(-1)
        losses += (-log[:-1].gather(1, ids[1:, None])[:, 0])[torch.tensor(labels[1:])].tolist()
    return sum(losses) / len(losses)


def test_the_last_layers_exit_begins_with_hugging_faces_loss_of_the_answers(folder, workers):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert workers(1).run(call_script, arguments(folder)) == [0]
    log = EventAccumulator(f"{folder}/run")
    log.Reload()
    first, *_, last = (event.value for event in log.Scalars("val_loss/exit_4"))
    assert first == pytest.approx(hugging_face_loss(folder), rel=1e-5)
    assert (
        last != first
        and archive.read_config(f"{folder}/run/checkpoints/megatron_gpt_ee_tuning.nemo").data.chat
    )


BAD = {
    "no template": (
        dict(model__restore_from_path="FOLDER/plain.nemo"),
        "model.data.chat=true: the checkpoint's tokenizer has no chat template; give lines of input and output",
    ),
    "no file": (dict(model__data__train_ds__file_names="[FOLDER/none.jsonl]"), "there is no such file"),
    "a line": (
        dict(model__data__validation_ds__file_names="[FOLDER/bad.jsonl]"),
        "bad.jsonl: line 2 is no JSON",
    ),
    "an answer cut away": (dict(model__data__train_ds__max_seq_length="2"), "has no token of an answer"),
    "text as well": (dict(model__data__data_prefix="[FOLDER/text]"), "exclude one another"),
    "nothing": (
        dict(model__data__train_ds__file_names=None, model__data__validation_ds__file_names=None),
        "model.data.data_prefix=null: there is nothing to train on",
    ),
    "longer than the model": (dict(model__data__train_ds__max_seq_length="65"), "encoder_seq_length=64"),
    "packed": (dict(model__data__train_ds__packed_sequence="true"), "packed_sequence=true: NeMo keeps"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, folder, workers, tmp_path):
    changes, message = BAD[case]
    (folder / "bad.jsonl").write_text((folder / "train.jsonl").read_text().splitlines()[0] + "\n{\n")
    changes = {key: value and value.replace("FOLDER", str(folder)) for key, value in changes.items()}
    given = arguments(folder, **{"exp_manager__explicit_log_dir": str(tmp_path), **changes})
    (left,) = workers(1).run(call_script, given)
    assert isinstance(left, str) and left.startswith("error: ") and message in left, left


def test_a_base_without_template_learns_prompts(folder, workers, tmp_path):
    """What the remedy says works."""
    lines = [{"input": "w1 w2", "output": f"w{n} w4"} for n in range(5)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = dict(
        model__restore_from_path=f"{folder}/plain.nemo",
        model__data__chat="false",
        model__data__train_ds__file_names=f"[{folder}/prompts.jsonl]",
        model__data__validation_ds__file_names=None,
        exp_manager__explicit_log_dir=str(tmp_path),
    )
    assert workers(1).run(call_script, arguments(folder, **changes)) == [0]
    assert list(tmp_path.rglob("*.nemo"))
