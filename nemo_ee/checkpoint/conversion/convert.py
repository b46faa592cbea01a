# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Converts a Hugging Face directory or a GGUF file to a plain NeMo GPT ``.nemo``."""

import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_ee.checkpoint import end_of_text, gguf, keys, sizes, tokenizer
from nemo_ee.checkpoint.conversion import llama
from nemo_ee.data.tokenizer import TokenizerConfig, load
from nemo_ee.errors import CheckpointError, ConfigError, first_line
from nemo_ee.files import plain_json
from nemo_ee.files.scratch import scratch_folder
from nemo_ee.modeling.finite import not_finite
from nemo_ee.runtime.upstream.unpickling import refuse_bytearrays

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


def convert_to_nemo(
    input_name_or_path: str | os.PathLike,
    output_path: str | os.PathLike,
    precision: str = "32",
    overwrite: bool = False,
) -> Path:
    """Converts a Llama-family model; everything is checked before weights are read.

    The result is what NeMo's own converter writes: ``MegatronGPTModel`` with a torch_dist checkpoint, on
    megatron-core; and its tokenizer is inside. One process; memory for two copies of the weights in fp32.

    Args:
        input_name_or_path: a Hugging Face model directory, or a ``.gguf`` file (dequantised).
        output_path: the ``.nemo`` file to write, atomically.
        precision: dtype of the saved weights: ``32``, ``bf16`` or ``16``.
        overwrite: replaces an existing file.

    Returns:
        ``output_path``.

    Raises:
        CheckpointError: a bad path, a damaged or unsupported model, or a tokenizer that does not belong to
            it.
    """
    source, output, precision = Path(input_name_or_path), Path(output_path), str(precision)
    _check_arguments(source, output, precision, overwrite)
    file = gguf.inspect(source) if gguf.is_gguf(source) else None
    config = file.config if file else _load_config(source)
    llama.check_supported(config)
    if not file:
        _check_weight_files(source, config)
    live = file.load_tokenizer() if file else _load_tokenizer(source)
    ends = file.eos_token_ids if file else end_of_text.of_folder(source, config.vocab_size)
    nemo_config = OmegaConf.create(llama.nemo_config(config, len(live), precision))
    _count_rows(nemo_config, live, config.vocab_size)
    with scratch_folder("convert") as scratch:
        home = Path(scratch, tokenizer.DIRECTORY)
        if file:
            live.save_pretrained(home)
        else:
            tokenizer.copy_files(source, home)
        nemo_config.tokenizer = {"library": "huggingface", "type": str(home), "use_fast": bool(live.is_fast)}
        if (ids := end_of_text.setting(live.eos_token_id, ends)) is not None:
            nemo_config.tokenizer[end_of_text.KEY] = ids
        weights = file.load_weights() if file else _load_weights(source)
        _require_finite(weights, source)
        _build_and_save(nemo_config, weights, config, output)
    return output


def _check_arguments(source: Path, output: Path, precision: str, overwrite: bool) -> None:
    faults = []
    if not source.exists():
        faults.append(f"input_name_or_path={source}: no such file or directory; download the model first")
    elif source.is_dir() and not (source / "config.json").is_file():
        faults.append(
            f"input_name_or_path={source}: holds no config.json; give a Hugging Face model directory"
        )
    elif source.is_file() and not gguf.is_gguf(source):
        faults.append(f"input_name_or_path={source}: is no GGUF file; give one, or a Hugging Face directory")
    if output.suffix != ".nemo":
        faults.append(f"output_path={output}: must end in .nemo; change the name")
    if output.exists() and not overwrite:
        faults.append(f"output_path={output}: exists; choose another or set overwrite=true")
    if precision not in DTYPES:
        faults.append(f"precision={precision}: must be one of {', '.join(DTYPES)}; choose one")
    if faults:
        raise CheckpointError("\n".join(faults))


def _count_rows(nemo_config: DictConfig, live: Any, rows: int) -> None:
    """Notes how many rows count where they are not the tokenizer's tokens; warns of tokens that have none."""
    ids = live.get_vocab()
    if {len(live), max(ids.values()) + 1} != {rows}:
        nemo_config[llama.ROWS] = rows
    if without := sorted((token, name) for name, token in ids.items() if token >= rows):
        from nemo.utils import logging

        logging.warning(
            f"{len(without)} tokens of the tokenizer have no row in the embedding (vocab_size={rows}), first "
            f"{without[0][1]!r} with the id {without[0][0]}: texts that have them are refused. If these are many, the "
            "tokenizer is another model's."
        )


def _load_config(source: Path) -> Any:
    from transformers import AutoConfig

    named = plain_json.load_section(source / "config.json").get("architectures") or ["none"]
    named = named if isinstance(named, list) else [named]
    if named[0] not in llama.ARCHITECTURES:  # before transformers meets a model type it may not know
        known = ", ".join(llama.ARCHITECTURES)
        raise CheckpointError(f"architectures={named[0]}: must be one of {known}; convert another model")
    try:
        return AutoConfig.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file leads to, or one that names code of its own
        raise CheckpointError(
            f"{source}/config.json: cannot be used ({first_line(error)}); download it again, or convert another model"
        ) from error


def _check_weight_files(source: Path, config: Any) -> None:
    """Refuses folders whose weights are not those of `config.json`, before a model of its sizes is built."""
    if (source / "adapter_config.json").exists():  # transformers would load the model that it names
        raise CheckpointError(
            f"input_name_or_path={source}: holds an adapter (adapter_config.json); merge it into its model first"
        )
    for index in source.glob("*.index.json"):
        places = plain_json.load_section(index).get("weight_map")
        for name in places.values() if isinstance(places, dict) else ():
            if not isinstance(name, str) or not name or Path(name).name != name:
                raise CheckpointError(
                    f"{index}: names {str(name)[:80]!r}, which is no file of its folder; download it again"
                )
    size = sum(
        file.stat().st_size
        for file in source.iterdir()
        if file.suffix in (".safetensors", ".bin") and file.is_file()
    )
    described = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": llama.head_size(config),
        "override_vocab_size": config.vocab_size,
    }
    if size:  # else transformers says which file is missing
        sizes.check_bytes(described, size, f"input_name_or_path={source}")


def _load_tokenizer(source: Path) -> Any:
    tokenizer.check_files(source)
    try:
        return load(TokenizerConfig(type=str(source)))
    except ConfigError as error:
        rule = error.faults[0].rule
        raise CheckpointError(f"input_name_or_path={source}: {rule}; download all its files") from error


def _load_weights(source: Path) -> dict[str, torch.Tensor]:
    """The state dict in fp32."""
    from transformers import AutoModelForCausalLM

    refuse_bytearrays()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(source),
            torch_dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # safetensors, pickle and zip files each fail in their own way
        raise CheckpointError(
            f"input_name_or_path={source}: its weights cannot be read ({type(error).__name__}: {error}); "
            "download them again"
        ) from error
    if report["missing_keys"]:
        first = ", ".join(sorted(report["missing_keys"])[:3])
        raise CheckpointError(
            f"input_name_or_path={source}: {len(report['missing_keys'])} weights are missing, first {first}; "
            "download all its files"
        )
    return dict(model.state_dict())


def _require_finite(weights: dict[str, torch.Tensor], source: Path) -> None:
    if found := not_finite(weights.items()):
        shown = ", ".join(found[:3])
        raise CheckpointError(
            f"input_name_or_path={source}: {len(found)} weights hold NaN or infinities, first {shown}; "
            "download them again"
        )


def _build_and_save(
    nemo_config: DictConfig, weights: dict[str, torch.Tensor], config: Any, output: Path
) -> None:
    """Builds the model as every user of the file will, loads it, and saves it under NeMo's class."""
    from lightning.pytorch import Trainer
    from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy

    from nemo_ee.checkpoint.connector import EarlyExitSaveRestoreConnector
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel

    strategy = NLPDDPStrategy(no_ddp_communication_hook=True, process_group_backend="gloo")
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        precision="32-true",
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    model = MegatronGPTEarlyExitModel(OmegaConf.merge(nemo_config, {"precision": 32}), trainer)
    mapped = llama.to_megatron(weights, config, model.padded_vocab_size)
    result = model.gpt.load_state_dict(keys.respell(mapped, model.gpt.state_dict()), strict=False)
    missing = [key for key in result.missing_keys if not key.endswith("_extra_state")]
    assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)
    del mapped
    model.to(DTYPES[nemo_config.precision])
    narrower = DTYPES[nemo_config.precision] is not torch.float32
    if narrower and (found := not_finite(model.gpt.named_parameters())):
        raise CheckpointError(
            f"precision={nemo_config.precision}: {len(found)} weights are too large for it, first {found[0]}; "
            "use bf16 or 32"
        )
    with open_dict(model.cfg):
        # machine-dependent switches go back to what any machine may read; our model adapts them where it
        # loads
        model.cfg.update(nemo_config)
    EarlyExitSaveRestoreConnector().save_to(model, str(output))
