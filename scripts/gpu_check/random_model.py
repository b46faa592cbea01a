# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A random model of a real one's shape, made on the device: for measuring speed, where no checkpoint is at hand.

Its exits are worth something, though nothing was tuned: layers add little to the hidden state, so that an exit,
which has the final norm's gain and the output layer's rows, often agrees with full depth. The norm's gain has
random signs; without them a model with tied embeddings would repeat its last token.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from omegaconf import OmegaConf
from transformers import LlamaConfig

from nemo_ee.checkpoint.conversion import llama
from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel
from tests.support.tiny_nemo import write_tiny_tokenizer

BRANCH = 0.1
"""Root mean square of what an attention or an MLP adds to a state of 1, before averaging over positions."""
LOGIT_SCALE = 6.0
"""Standard deviation of logits: the highest probability of an exit then spreads over 0.1 to 1."""
RARE = 0.5
"""Length of the rows of tokens off the shortlist, relative to the others', which then are nearly always chosen."""
NEVER = -1e4
"""The bucket's logit."""


@dataclass(frozen=True)
class Shape:
    """Of a Llama with tied embeddings, and its exits with heads as they are by default.

    Attributes:
        name: of the model that has it.
        layers: in all.
        exits: layers with exits.
        hidden: H.
        ffn: of the MLPs.
        heads: of queries.
        groups: of keys.
        vocabulary: tokens.
        shortlist: of the exits.
    """

    name: str
    layers: int
    exits: tuple[int, ...]
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocabulary: int
    shortlist: int


LLAMA_1B = Shape("Llama 3.2 1B", 16, (5, 10), 2048, 8192, 32, 8, 128256, 8192)
TINY = Shape("a tiny Llama", 4, (1, 2), 32, 64, 4, 2, 384, 64)


def hugging_face_config(shape: Shape) -> LlamaConfig:
    """The same model's in transformers."""
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=2048,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def build(shape: Shape, precision: str, work: Path) -> Any:
    """Our model with exits, in eval mode.

    Args:
        shape: of the model.
        precision: `bf16` or `32`, of weights and computation.
        work: directory for the tokenizer.
    """
    exits = {
        "layers": list(shape.exits),
        "init": "random",
        "head": {"shortlist_size": shape.shortlist},
    }
    config = OmegaConf.create(llama.nemo_config(hugging_face_config(shape), shape.vocabulary, precision))
    config.make_vocab_size_divisible_by = 128
    config.tokenizer = {
        "library": "huggingface",
        "type": write_tiny_tokenizer(work / "tokenizer", shape.vocabulary - 1),
        "use_fast": True,
    }
    config.early_exit = exits
    config.megatron_amp_O2 = precision == "bf16"
    model = MegatronGPTEarlyExitModel(config, tiny.trainer(precision if precision == "bf16" else 32))
    fill(model.gpt, shape)
    return model.eval()


@torch.no_grad()
def fill(gpt: Any, shape: Shape) -> None:
    """Gives all weights their values; every draw is made on the device."""
    torch.manual_seed(5)
    for name, parameter in gpt.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        elif parameter.dim() == 2:
            branch = "linear_proj." in name or "linear_fc2." in name
            parameter.normal_(std=(BRANCH if branch else 1.0) * parameter.shape[1] ** -0.5)
        else:
            parameter.zero_()
    embedding = gpt.embedding.word_embeddings.weight.normal_()
    embedding[shape.shortlist :] *= RARE
    gain = gpt.decoder.final_layernorm.weight
    signs = torch.where(torch.rand(gain.shape, device=gain.device) < 0.5, -1.0, 1.0)
    gain.copy_(LOGIT_SCALE * shape.hidden**-0.5 * signs)
    for head in gpt.exits.values():
        copy_final_exit(head, gain, embedding[: shape.shortlist])


def copy_final_exit(head: Any, gain: torch.Tensor, rows: torch.Tensor) -> None:
    """An exit's readout is that of the final exit; its MLP, if any, adds next to nothing to that.

    Args:
        head: of the default kind, with a shortlist of as many tokens as there are rows.
        gain: [H] of the final norm.
        rows: of the output layer.
    """
    head.norm.weight.copy_(gain)
    head.linear.weight.copy_(torch.eye(len(gain), device=gain.device))
    head.linear.bias.zero_()
    head.mlp.mlp.linear_fc2.weight.mul_(1e-3)
    projection = head.projection
    projection.weight[: len(rows)] = rows.to(projection.weight.dtype)
    projection.bucket_weight.zero_()
    projection.bucket_bias.fill_(NEVER)
