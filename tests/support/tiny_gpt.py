# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A tiny `MegatronGPTEarlyExitModel` (8 layers, 8 heads, 4 query groups, 201 tokens) whose weights depend on
names alone.

The same call gives the same weights under every tensor- and pipeline-parallel layout, every vocabulary
padding and every set of exits, so models of different layouts can be compared. Confidences really vary (see
`EXIT_LOGIT_SCALE`). No network: the tokenizer is built on the spot.
"""

import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_ee.files.scratch import ScratchFolder

VOCABULARY = 201
EOS, BOS = "<eos>", "<bos>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
LOGIT_SCALE = 4.0
"""Standard deviation of the final exit's logits (of a unit-variance normed state)."""
EXIT_LOGIT_SCALE = 4.5
"""The same for exits: their highest probability then spreads over 0.1 to 1."""
BRANCH_SCALE = 3.0
"""Of attention's and MLPs' output weights, so that a layer can change the next token."""

GPT3 = dict(
    normalization="layernorm1p", bias=True, activation="gelu", position_embedding_type="learned_absolute"
)
"""A backbone with LayerNorm, biases, a plain MLP and learned positions."""
TEXTS = ["w1 w2 w3", "w9 w10 w11 w12 w13 w14 w15", "w40"]
"""Prompts of known words."""
NEMO = dict(
    use_greedy=True,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    repetition_penalty=1.0,
    add_BOS=False,
    all_probs=False,
    compute_logprob=False,
    end_strings=["<|endoftext|>"],
)
"""All that NeMo's own loop wants to be told of sampling."""
HEADS: dict[str, dict[str, Any]] = {
    "norm, tied": dict(mlp=False, linear=False, projection="tied"),
    "MLP, untied": dict(mlp=True, linear=False, projection="untied"),
    "linear, shortlist": dict(mlp=False, norm=True, linear=True, projection="shortlist", shortlist_size=120),
    "block, shortlist": dict(block=True, mlp=False, linear=False, projection="shortlist", shortlist_size=61),
    "block, MLP, linear, untied": dict(block=True, mlp=True, linear=True, projection="untied"),
}
"""One head of every kind; together they have every module and every projection."""


def tokenizer() -> Any:
    """A Hugging Face tokenizer of the words w0..w194, user, assistant, system, and special ones."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = [EOS, BOS, "<unk>", "user", "assistant", "system"]
    words += [f"w{index}" for index in range(VOCABULARY - len(words))]
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, bos_token=BOS, unk_token="<unk>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@lru_cache
def tokenizer_folder(chat: bool = True) -> str:
    """The tokenizer as a directory that lives as long as this process."""
    folder = ScratchFolder("tokenizer")
    _folders.append(folder)
    built = tokenizer()
    if not chat:
        built.chat_template = None
    built.save_pretrained(folder.path)
    return str(folder.path)


_folders: list[ScratchFolder] = []


def tiny_model_config(
    exits: list[int] | None = None,
    head: dict[str, Any] | None = None,
    tp: int = 1,
    pp: int = 1,
    precision: Any = 32,
    tokenizer_path: str | Path | None = None,
    **overrides: Any,
) -> DictConfig:
    """A complete `model` section.

    Args:
        exits: exit layers; by default 2, 4 and 6.
        head: the `early_exit.head` section; by default the configuration's own default with 100 shortlisted
            tokens.
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        precision: NeMo's, e.g. 32 or "bf16".
        tokenizer_path: a tokenizer directory; by default the tiny one.
        **overrides: dotted keys with ``__`` for the dot, e.g. ``early_exit__tuning__kl_weight=0.0``.
    """
    config = OmegaConf.create(
        dict(
            mcore_gpt=True,
            micro_batch_size=2,
            global_batch_size=4,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            sequence_parallel=False,
            encoder_seq_length=64,
            max_position_embeddings=64,
            num_layers=8,
            hidden_size=64,
            ffn_hidden_size=96,
            num_attention_heads=8,
            num_query_groups=4,
            init_method_std=0.02,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            layernorm_epsilon=1e-5,
            normalization="rmsnorm",
            activation="fast-swiglu",
            bias=False,
            position_embedding_type="rope",
            rotary_percentage=1.0,
            share_embeddings_and_output_weights=True,
            make_vocab_size_divisible_by=8,
            use_cpu_initialization=True,
            megatron_amp_O2=False,
            seed=1234,
            precision=precision,
            tokenizer=dict(
                library="huggingface", type=str(tokenizer_path or tokenizer_folder()), use_fast=True
            ),
            optim=dict(name="adamw", lr=1e-3),
            early_exit=dict(layers=exits or [2, 4, 6], init="random", head=head or dict(shortlist_size=100)),
        )
    )
    for key, value in overrides.items():
        OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
    return config


def tiny_trainer(world_size: int = 1, precision: Any = 32, **settings: Any) -> Any:
    """A trainer that writes nothing; on the CPU over gloo unless there are GPUs."""
    from lightning.pytorch import Trainer

    from nemo_ee.models.runs.trainer_builder import EarlyExitDDPStrategy

    gpu = torch.cuda.is_available()
    defaults = dict(
        accelerator="gpu" if gpu else "cpu",
        devices=world_size,
        num_nodes=1,
        strategy=EarlyExitDDPStrategy(
            no_ddp_communication_hook=True,
            process_group_backend="nccl" if gpu else "gloo",
            dist_ckpt_parallel_save=True,
        ),
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        max_steps=2,
    )
    return Trainer(**{**defaults, **settings})


def tiny_model(
    config: DictConfig, world_size: int = 1, dtype: torch.dtype | None = None, kind: type | None = None
) -> Any:
    """Builds the model in eval mode, with weights that depend on their names alone.

    Args:
        config: from `tiny_model_config`.
        world_size: number of ranks of this job.
        dtype: of all parameters after building, e.g. torch.float64; None leaves them.
        kind: the model's class; by default `MegatronGPTEarlyExitModel`.
    """
    if kind is None:
        from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as kind
    model = kind(config, tiny_trainer(world_size, config.precision))
    if dtype is not None:
        model.to(dtype)
    fill(model)
    return model.eval()


@torch.no_grad()
def fill(model: Any) -> None:
    """Gives every parameter its values, see the module's text."""
    from megatron.core import parallel_state

    world = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    gpt = model.gpt
    offset = {id(layer): layer.layer_number for layer in gpt.decoder.layers}
    names = {}
    for module_name, module in gpt.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            names[f"{module_name}.{name}"] = (module, parameter)
    global_layer = {f"decoder.layers.{i}.": offset[id(layer)] for i, layer in enumerate(gpt.decoder.layers)}
    for name, (module, parameter) in names.items():
        key = name
        for local, number in global_layer.items():
            if name.startswith(local):
                key = f"layer{number}." + name[len(local) :]
        tied_copy = key == "output_layer.weight" and gpt.tied_to_embedding  # of the last of several stages
        if tied_copy or key in ("output_copy",) or key.endswith(".output_copy"):
            key = "embedding.word_embeddings.weight" if gpt.tied_to_embedding else "output_layer.weight"
        split = (
            getattr(parameter, "partition_dim", -1)
            if getattr(parameter, "tensor_model_parallel", False)
            else -1
        )
        if key.endswith("output_copy") or "word_embeddings" in key or key.startswith("output_layer."):
            split = 0
        shape = list(parameter.shape)
        if split >= 0:
            shape[split] *= world
        full = values(key, shape, gpt, module)
        if split >= 0:
            gated = "linear_fc1." in key and gpt.config.gated_linear_unit
            halves = full.chunk(2, dim=split) if gated else (full,)
            full = torch.cat([half.chunk(world, dim=split)[rank] for half in halves], dim=split)
        parameter.copy_(full)


def values(key: str, shape: list[int], gpt: Any, module: Any) -> torch.Tensor:
    """The whole parameter of that name, in float64."""
    from nemo_ee.modeling.projection import ExitProjection

    rows, used = shape[0], shape[0]
    scale = shape[-1] ** -0.5
    if isinstance(module, ExitProjection):
        used = module.num_kept if key.endswith("projection.weight") else rows
        scale *= EXIT_LOGIT_SCALE
    elif "word_embeddings" in key or key.startswith("output_layer."):
        used, scale = gpt.true_vocab_size, scale * LOGIT_SCALE
    elif "linear_proj." in key or "linear_fc2." in key:
        scale *= BRANCH_SCALE
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    drawn = torch.randn([used, *shape[1:]], generator=generator, dtype=torch.float64)
    if len(shape) == 1 and not key.endswith("bucket_weight"):
        norm = "norm" in key and not key.endswith("bias")
        drawn = 1.0 + 0.2 * drawn if norm else 0.1 * drawn
    else:
        drawn *= scale
    whole = torch.zeros([rows, *shape[1:]], dtype=torch.float64)
    whole[:used] = drawn
    return whole
