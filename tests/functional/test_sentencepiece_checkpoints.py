# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's checkpoints with a SentencePiece model keep it, and its mode, through all that becomes of them."""

import tarfile
from pathlib import Path

import pytest

from nemo_ee.errors import CheckpointError
from tests.support import stock_nemo, tiny_chats

TEXT = "the cat sat on the mat"
HEAD = {"norm": True, "projection": "tied"}


def config(model: str, legacy: bool | None) -> dict:
    section = dict(library="sentencepiece", type=None, model=model)
    if legacy is not None:
        section["sentencepiece_legacy"] = legacy
    return dict(
        mcore_gpt=True,
        micro_batch_size=1,
        global_batch_size=1,
        encoder_seq_length=64,
        max_position_embeddings=64,
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_add_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        share_embeddings_and_output_weights=True,
        position_embedding_type="learned_absolute",
        normalization="layernorm",
        precision=32,
        tokenizer=section,
        optim=dict(name="adamw", lr=1e-3),
    )


def through_everything(folder: str, legacy: bool | None) -> dict[str, tuple]:
    """Checkpoint -> ids of a text, size, mode, name of the packed file; each is deleted before the next is written."""
    from omegaconf import OmegaConf

    from nemo_ee.checkpoint import archive
    from nemo_ee.checkpoint.exits import adapter
    from nemo_ee.checkpoint.tokenizer import tokenizer_from_nemo
    from nemo_ee.models.exit_editor import edit_exits
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel
    from tests.support.tiny_nemo import LocalSpecGPT, tiny_trainer

    paths = {
        name: f"{folder}/{name}.nemo" for name in ("base", "edited", "exits", "merged", "saved", "again")
    }
    file = tiny_chats.train_sentencepiece(Path(folder), "bpe")
    LocalSpecGPT(OmegaConf.create(config(str(file), legacy)), tiny_trainer()).save_to(paths["base"])
    file.unlink()
    section = {"init": "random", "head": HEAD}
    edit_exits(paths["base"], paths["edited"], [1], {}, tiny_trainer(), section)
    plain = MegatronGPTEarlyExitModel.restore_from(paths["base"], return_config=True)
    model = MegatronGPTEarlyExitModel.restore_from(
        paths["base"],
        override_config_path=MegatronGPTEarlyExitModel.add_exits(plain, {"layers": [1], **section}),
        trainer=tiny_trainer(),
    )
    model.save_adapters(paths["exits"])
    adapter.merge(paths["base"], paths["exits"], paths["merged"])
    Path(paths["base"]).rename(f"{folder}/elsewhere.nemo")
    model.save_to(paths["saved"])
    with tarfile.open(paths["saved"]) as tar:
        tar.extractall(f"{folder}/unpacked", filter="data")
    MegatronGPTEarlyExitModel.restore_from(f"{folder}/unpacked", trainer=tiny_trainer()).save_to(
        paths["again"]
    )
    stray = Path(folder, "stray")
    stray.mkdir()
    OmegaConf.save(
        {"tokenizer": {"library": "sentencepiece", "model": "/nowhere"}}, stray / "model_config.yaml"
    )
    with pytest.raises(CheckpointError, match="stray: tokenizer.library=sentencepiece: NeMo cannot load it"):
        tokenizer_from_nemo(stray)
    found = {}
    for name in ("edited", "merged", "saved", "again"):
        section = archive.read_config(paths[name]).tokenizer
        loaded = tokenizer_from_nemo(paths[name])
        live = stock_nemo.restore(paths[name]).tokenizer
        assert live.vocab_size == loaded.vocab_size and live.legacy == loaded.legacy
        assert live.text_to_ids(TEXT) == loaded.text_to_ids(TEXT)
        found[name] = loaded.text_to_ids(TEXT), loaded.eos_id, loaded.legacy, str(section.model)
    return found


@pytest.mark.parametrize("legacy", [None, pytest.param(False, marks=pytest.mark.slow)])
def test_the_model_and_its_mode_come_along(legacy, workers, tmp_path):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(tiny_chats.train_sentencepiece(tmp_path / "reference", "bpe"))
    )
    for name, found in workers(1).run(through_everything, str(tmp_path), legacy)[0].items():
        ids, eos, mode, file = found
        assert (ids, eos, mode) == (processor.encode_as_ids(TEXT), processor.eos_id(), legacy is None), name
        assert (
            file.startswith("nemo:") and file.endswith("_sp.model") and len(file) == 5 + 32 + len("_sp.model")
        ), file
