# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Models as others publish them, from their files to texts: the same as Hugging Face's, or SentencePiece's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from nemo_ee.errors import GenerationError
from tests.support import tiny_chats, tiny_llama
from tests.support.published import (
    EXITS,
    STEPS,
    Published,
    answers,
    batches_of_one,
    client,
    convert,
    restored,
)
from tests.support.tiny_gpt import tiny_model, tiny_model_config, tiny_trainer
from tests.support.uncached import generate_uncached

PROMPTS = ["the cat sat on the mat", "what does"]
TURNS = [{"role": "user", "content": "the dog ran?"}]


@pytest.fixture(scope="module", autouse=True)
def batches_of_their_own():
    with batches_of_one():
        yield


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """With two tokens that end texts; the second comes in the greedy answer to the first prompt. And our model."""
    folder = tmp_path_factory.mktemp("qwen")
    endless = Published(tiny_chats.save_qwen(folder / "hf"))
    spare = list(range(len(endless.tokenizer), endless.network.config.vocab_size))
    free, known = (
        endless.generate(PROMPTS[0], eos_token_id=None, suppress_tokens=rows) for rows in (None, spare)
    )
    own = tiny_chats.qwen_tokenizer().eos_token_id
    second = next(
        token for i, token in enumerate(free) if i >= 2 and token not in free[:i] and token in known
    )
    tiny_chats.save_qwen(folder / "hf", ends=[own, second])
    published = Published(folder / "hf")
    assert published.generate(PROMPTS[0])[-1] == second and len(published.generate(PROMPTS[0])) < STEPS
    return published, restored(convert(folder / "hf", folder / "m.nemo")), second


class TestSeveralEndsOfText:
    def ways(self, model):
        """And what Hugging Face is told: NeMo's loop chooses no id behind as many as the tokenizer has tokens."""
        from nemo_ee.generation.strategy import EarlyExitTextGenerationStrategy

        yield dict(early_exit=False), {}
        yield dict(early_exit=dict(lossless=True, threshold=0.0)), {}
        spare = list(range(model.tokenizer.vocab_size, model.text_tokenizer.vocab_size))
        strategy = EarlyExitTextGenerationStrategy(model, exits=[])
        yield dict(strategy=strategy), dict(suppress_tokens=spare or None)

    @pytest.mark.parametrize("least", [0, 9])
    def test_every_loop_stops_at_each_and_says_what_hugging_face_says(self, qwen, least):
        published, model, second = qwen
        for way, told in self.ways(model):
            expected = [published.generate(p, min_new_tokens=least or None, **told) for p in PROMPTS]
            assert {second} & {*sum(expected, [])} or least, "the case must be tried"
            for prompt, ids in zip(PROMPTS, expected, strict=True):
                output = model.generate([prompt], dict(max_length=STEPS, min_length=least), **way)
                assert output["token_ids"][0] == published.ids(prompt) + ids, way
                assert output["sentences"][0] == published.text(published.ids(prompt) + ids)

    def test_chats_are_the_templates(self, qwen):
        published, model, _ = qwen
        output = model.generate([TURNS], dict(max_length=STEPS), early_exit=False)
        expected = published.ids(TURNS) + published.generate(TURNS)
        assert output["token_ids"][0] == expected and output["sentences"][0] == published.text(expected)

    def test_the_server_stops_there_and_shows_none_of_it(self, qwen):
        published, model, second = qwen
        with client(model) as http:
            for prompt in (PROMPTS[0], TURNS):
                ids = published.generate(prompt)
                stopped = ids[-1] in (second, published.tokenizer.eos_token_id)
                expected = published.text(ids[:-1] if stopped else ids), "stop" if stopped else "length"
                assert list(answers(http, prompt)) == [expected, expected]
            flagged = published.tokenizer.convert_tokens_to_ids("<|vision_start|>")
            list(answers(http, PROMPTS[0], stop=["<|vision_start|>"]))
            assert flagged in model.text_tokenizer.special and not published.text([flagged])


@pytest.fixture(scope="module")
def llama31(tmp_path_factory):
    """A folder, and our model from its GGUF file: scaled positions, BOS, three tokens that end texts."""
    folder = tmp_path_factory.mktemp("llama31")
    published = Published(tiny_chats.save_llama31(folder / "hf"))
    return published, restored(convert(folder / "hf.gguf", folder / "m.nemo"))


class TestLlama31FromGguf:
    def test_texts_and_chats_are_hugging_faces(self, llama31):
        from nemo_ee.generation.strategy import EarlyExitTextGenerationStrategy

        published, model = llama31
        assert len(model.text_tokenizer.eos_ids) == 3
        assert set(model.text_tokenizer.eos_ids) == set(published.network.generation_config.eos_token_id)
        ways = (
            dict(early_exit=False),
            dict(early_exit=dict(lossless=True, threshold=0.0)),
            dict(strategy=EarlyExitTextGenerationStrategy(model, exits=[])),
        )
        ended = 0
        for prompt in (
            PROMPTS[0],
            "x  1 1234 (f;\n  12 = 3 it's",
            "",
            TURNS,
            [dict(role="system", content=" a "), *TURNS],
        ):
            expected = published.ids(prompt) + published.generate(prompt)
            assert expected.count(published.tokenizer.bos_token_id) == 1
            ended += expected[-1] in model.text_tokenizer.eos_ids
            for way in ways:
                output = model.generate([prompt], dict(max_length=STEPS, min_length=0), **way)
                assert output["token_ids"][0] == expected and output["sentences"][0] == published.text(
                    expected
                )
        assert ended, "the case must be tried"

    def test_the_server_says_what_hugging_face_says(self, llama31):
        published, model = llama31
        with client(model) as http:
            for prompt in (PROMPTS[0], "x  1 1234 (f;\n  12 = 3 it's", TURNS):
                ids = published.generate(prompt)
                stopped = ids[-1] in model.text_tokenizer.eos_ids
                expected = published.text(ids), "stop" if stopped else "length"
                assert list(answers(http, prompt)) == [expected, expected]


def tuned_texts(base, chats, prompts):
    """Tunes exits by two steps on chats, as the script does; texts with them, from apart and merged.

    Returns:
        Exit code; whether texts in full depth and lossless ones are alike; token ids and sentences; whether the merged
        checkpoint, its exits taken off, has the base's content hash.
    """
    from nemo_ee.checkpoint.content_hash import backbone_content_hash
    from nemo_ee.checkpoint.exits import adapter
    from nemo_ee.models.exit_editor import edit_exits
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel
    from tests.functional.test_tuning_script import call_script

    folder = Path(base).parent
    values = {
        "model.restore_from_path": base,
        "model.early_exit.layers": "[2]",
        "model.early_exit.init": "copy",
        "model.early_exit.head": "{projection: tied, mlp: false}",
        "model.data.chat": "true",
        "model.data.train_ds.file_names": f"[{chats}]",
        "model.data.train_ds.max_seq_length": 64,
        "model.micro_batch_size": 1,  # as converted models have, which are loaded in this process afterwards
        "model.global_batch_size": 1,
        "trainer.max_steps": 2,
        "trainer.limit_val_batches": 0,
        "trainer.precision": 32,
        "model.optim.sched.warmup_steps": 1,
        "exp_manager.explicit_log_dir": f"{folder}/run",
    }
    code = call_script([f"{key}={value}" for key, value in values.items()])
    if code:
        return (code,)
    exits, merged = f"{folder}/run/checkpoints/megatron_gpt_ee_tuning.nemo", f"{folder}/merged.nemo"
    adapter.merge(base, exits, merged)
    edit_exits(merged, f"{folder}/plain.nemo", [], {}, tiny_trainer())
    outputs = []
    for model in (
        MegatronGPTEarlyExitModel.restore_with_exits(base, exits, tiny_trainer(), {"precision": 32}),
        restored(merged, exits=_config(merged).early_exit),
    ):
        for way in (False, dict(lossless=True, threshold=0.0)):
            made = [
                model.eval().generate([prompt], dict(max_length=STEPS, min_length=0), early_exit=way)
                for prompt in prompts
            ]
            outputs.append([(each["token_ids"][0], each["sentences"][0]) for each in made])
    same = backbone_content_hash(f"{folder}/plain.nemo") == backbone_content_hash(base)
    return code, all(each == outputs[0] for each in outputs), outputs[0], same


def chat_file(folder):
    path, answer = folder / "chats.jsonl", {"role": "assistant", "content": "the cat sat on the mat"}
    lines = ({"messages": [*TURNS, answer] * turns} for turns in (1, 2))
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize(
    "kind", ["llama31", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen", "mistral"))]
)
def test_exits_tuned_on_chats_leave_hugging_faces_texts(kind, request, workers, tmp_path):
    published = request.getfixturevalue(kind)[0]
    base = tmp_path / "base.nemo"
    shutil.copy(published.folder.parent / "m.nemo", base)
    prompts = [PROMPTS[0], TURNS]
    found = workers(1).run(tuned_texts, str(base), str(chat_file(tmp_path)), prompts)[0]
    expected = [published.ids(prompt) + published.generate(prompt) for prompt in prompts]
    assert found == (0, True, [(ids, published.text(ids)) for ids in expected], True)


def parallel_ids(path, sizes, prompts):
    """What a rank of a model over two ranks generates."""
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel

    settings = OmegaConf.merge(_config(path), {"early_exit": EXITS, "precision": 32, **sizes})
    model = MegatronGPTEarlyExitModel.restore_from(
        path, override_config_path=settings, trainer=tiny_trainer(2)
    )
    lengths = [dict(max_length=STEPS, min_length=least) for least in (0, 9)]
    return [model.eval().generate(prompts, each, early_exit=False)["token_ids"] for each in lengths]


def _config(path):
    from nemo_ee.checkpoint import archive

    return archive.read_config(path)


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_all_ranks_stop_at_each_end_of_text(workers, qwen, kind):
    published, _, _ = qwen
    path = str(published.folder.parent / "m.nemo")
    sizes = {f"{kind}_model_parallel_size": 2}
    found = workers(2).run(parallel_ids, path, sizes, PROMPTS)
    assert found[0] == found[1]
    for least, ids in zip((0, 9), found[0], strict=True):
        expected = [published.generate(p, min_new_tokens=least or None) for p in PROMPTS]
        assert ids == [published.ids(p) + new for p, new in zip(PROMPTS, expected, strict=True)]


def test_ids_with_gaps_are_said_as_well(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*(f"w{n}" for n in range(20)), "</s>", "x"]
    ids = {name: n if n < 20 else n + 20 for n, name in enumerate(names)}
    core = Tokenizer(models.WordLevel(ids, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tiny_llama.model(tiny_llama.config(vocab_size=48, eos_token_id=40)).save_pretrained(tmp_path / "hf")
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(tmp_path / "hf")
    published = Published(tmp_path / "hf")
    model = restored(convert(tmp_path / "hf", tmp_path / "m.nemo"))
    assert model.tokenizer.vocab_size == 22 and model.text_tokenizer.vocab_size == 48  # the embedding's rows
    for prompt in (f"w{n} x w{n + 3}" for n in range(8)):
        expected = published.generate(prompt)
        output = model.generate([prompt], dict(max_length=STEPS), early_exit=False)
        assert output["token_ids"][0] == published.ids(prompt) + expected
        assert output["sentences"][0] == published.text(published.ids(prompt) + expected)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    published = Published(tiny_chats.save_mistral(folder / "hf"))
    return published, restored(convert(folder / "hf", folder / "m.nemo"))


class TestBosByTheTokenizersRule:
    def test_prompts_and_chats_begin_with_one(self, mistral):
        published, model = mistral
        for prompt in (*PROMPTS, TURNS):
            expected = published.ids(prompt) + published.generate(prompt)
            assert expected[0] == 1 and 1 not in published.ids(prompt)[1:]
            output = model.generate([prompt], dict(max_length=STEPS), early_exit=False)
            assert output["token_ids"][0] == expected
            assert output["sentences"][0] == published.text(expected)
        written = model.generate(["<s>the cat"], dict(max_length=1))["token_ids"][0]
        assert written.count(1) == 1 + (written[-1] == 1) and written[0] == 1

    def test_what_is_said_goes_before_the_rule(self, mistral):
        published, model = mistral
        ids = published.ids(PROMPTS[0])
        for add_bos, expected in ((False, ids[1:]), (True, ids), (None, ids)):
            output = model.generate(PROMPTS[:1], dict(max_length=0), dict(add_BOS=add_bos))
            assert output["token_ids"][0] == expected

    @torch.no_grad()
    @pytest.mark.parametrize("nemos_loop", [False, True])
    def test_log_probabilities_are_hugging_faces(self, mistral, nemos_loop):
        from nemo_ee.generation.strategy import EarlyExitTextGenerationStrategy

        published, model = mistral
        way = dict(strategy=EarlyExitTextGenerationStrategy(model, exits=[])) if nemos_loop else {}
        output = model.generate(PROMPTS[:1], None, dict(compute_logprob=True), **way)
        ids = published.ids(PROMPTS[0])
        assert output["token_ids"][0] == ids and output["sentences"] == PROMPTS[:1]
        expected = published.network(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert torch.allclose(output["logprob"][0][: len(expected)], expected, atol=1e-4)

    def test_the_server_says_what_hugging_face_says(self, mistral):
        published, model = mistral
        with client(model) as http:
            for prompt in (PROMPTS[0], TURNS):
                expected = published.text(published.generate(prompt))
                for text, _ in answers(http, prompt):
                    assert text.strip() == expected, (
                        "transformers drops the first space, which a stream needs"
                    )
            turns = [{"role": "system", "content": "the"}, *TURNS]
            refused = http.post("/v1/chat/completions", json={"model": "tiny", "messages": turns})
            assert refused.status_code == 400 and "Only user and assistant" in refused.text

    def test_documents_begin_as_prompts_do(self, mistral, tmp_path):
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        from nemo_ee.preprocessing.preprocess import preprocess
        from nemo_ee.preprocessing.preprocess_config import PreprocessConfig

        published, _ = mistral
        lines = [*PROMPTS, "<s>the dog"]
        (tmp_path / "in.txt").write_text("\n".join(lines))
        for add_bos, before in ((None, [1]), (True, [1]), (False, [])):
            prefix = str(tmp_path / f"out{add_bos}")
            tokenizer = {"nemo": str(published.folder.parent / "m.nemo"), "add_bos": add_bos}
            values = dict(input=str(tmp_path / "in.txt"), output_prefix=prefix, document="line", workers=1)
            summary = preprocess(PreprocessConfig.from_dict({**values, "tokenizer": tokenizer}))
            bare = [published.tokenizer(line, add_special_tokens=False).input_ids for line in lines]
            expected = [ids + [2] if ids[0] == 1 else [*before, *ids, 2] for ids in bare]
            found = IndexedDataset(prefix)
            assert [found[i].tolist() for i in range(3)] == expected and summary["bos"] == before


NEMOS_TEMPLATE = {
    "prefix": "{_bos_id_}",
    "roles": {"User": "user {_content_}\n", "Assistant": "assistant {_content_}{_eos_id_}"},
}


class TestSentencePiece:
    @pytest.fixture(scope="class", params=["legacy", "new"])
    def model(self, request, tmp_path_factory):
        """NeMo's own form of a tokenizer: in its default mode, which is the legacy one, and without it."""
        folder = tmp_path_factory.mktemp("sentencepiece")
        file = tiny_chats.train_sentencepiece(folder, "bpe" if request.param == "legacy" else "unigram")
        section = dict(library="sentencepiece", type=None, model=str(file), chat_template=NEMOS_TEMPLATE)
        if request.param == "new":
            section["sentencepiece_legacy"] = False
        config = tiny_model_config(micro_batch_size=1, global_batch_size=1)
        config.tokenizer = section
        tiny_model(config).save_to(str(folder / "m.nemo"))
        model = restored(folder / "m.nemo", exits=config.early_exit)
        model.path = folder / "m.nemo"
        return model

    def prompt_ids(self, model, prompt):
        encode = model.tokenizer.tokenizer.encode
        return (
            encode(prompt) if isinstance(prompt, str) else [1, *encode("user " + prompt[0]["content"] + "\n")]
        )

    @pytest.mark.parametrize("prompt", [PROMPTS[0], TURNS], ids=["text", "chat"])
    def test_texts_are_those_of_the_model_and_of_sentencepiece(self, model, prompt):
        from nemo.collections.nlp.modules.common.text_generation_strategy import (
            GPTModelTextGenerationStrategy,
        )

        from nemo_ee.generation.strategy import EarlyExitTextGenerationStrategy

        assert model.text_tokenizer.eos_ids == (2,)
        ids = self.prompt_ids(model, prompt)
        whole = ids + generate_uncached(model.gpt, ids, 12, {}).tokens
        if 2 in whole[len(ids) :]:
            whole = whole[: whole.index(2, len(ids)) + 1]
        lengths = dict(max_length=12, min_length=0)
        ours = model.generate([prompt], lengths, early_exit=False)
        strategies = [EarlyExitTextGenerationStrategy(model, exits=[])]
        if isinstance(prompt, str):
            strategies.append(GPTModelTextGenerationStrategy(model))
        theirs = [model.generate([prompt], lengths, strategy=strategy) for strategy in strategies]
        text = model.tokenizer.tokenizer.decode(whole)
        for output in (ours, *theirs):
            assert output["token_ids"][0] == whole and output["sentences"][0].strip() == text.strip()
        assert ours["sentences"][0] == text

    def test_the_server_completes_and_chats(self, model):
        decode = model.tokenizer.tokenizer.decode
        with client(model) as http:
            for prompt in (PROMPTS[0], TURNS):
                ids = self.prompt_ids(model, prompt)
                new = model.generate([prompt], dict(max_length=STEPS), early_exit=False)["token_ids"][0][
                    len(ids) :
                ]
                expected = decode(ids + new)[len(decode(ids)) :]
                assert [text for text, _ in answers(http, prompt)] == [expected, expected]
            turns = [{"role": "system", "content": "the"}, *TURNS]
            refused = http.post("/v1/chat/completions", json={"model": "tiny", "messages": turns})
            assert refused.status_code == 400 and "role system; it has User, Assistant" in refused.text

    def test_documents_of_its_checkpoint_end_with_its_eos(self, model, tmp_path):
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        from nemo_ee.preprocessing.preprocess import preprocess
        from nemo_ee.preprocessing.preprocess_config import PreprocessConfig

        (tmp_path / "in.txt").write_text("\n".join(PROMPTS))
        values = dict(
            input=str(tmp_path / "in.txt"), document="line", workers=1, output_prefix=str(tmp_path / "out")
        )
        summary = preprocess(PreprocessConfig.from_dict({**values, "tokenizer": {"nemo": str(model.path)}}))
        found = IndexedDataset(str(tmp_path / "out"))
        encode = model.tokenizer.tokenizer.encode
        assert [found[i].tolist() for i in range(2)] == [[*encode(text), 2] for text in PROMPTS]
        assert summary["bos"] == [] and summary["eod"] == 2

    @pytest.mark.slow
    def test_exits_tuned_on_chats_leave_the_models_texts(self, model, workers, tmp_path):
        base = tmp_path / "base.nemo"
        shutil.copy(model.path, base)
        found = workers(1).run(tuned_texts, str(base), str(chat_file(tmp_path)), [PROMPTS[0], TURNS])[0]
        made = [model.generate([p], dict(max_length=STEPS), early_exit=False) for p in (PROMPTS[0], TURNS)]
        expected = [(each["token_ids"][0], each["sentences"][0]) for each in made]
        assert found == (0, True, expected, True)

    def test_bos_comes_where_the_checkpoint_or_the_caller_says(self, model):
        ids = self.prompt_ids(model, PROMPTS[0])
        output = model.generate(PROMPTS[:1], dict(max_length=0), dict(add_BOS=True))
        assert output["token_ids"][0] == [1, *ids]
        with pytest.raises(GenerationError, match="role tool; it has User, Assistant"):
            model.generate([[{"role": "tool", "content": "x"}]], dict(max_length=1))
