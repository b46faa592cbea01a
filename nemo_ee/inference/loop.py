# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The generation loop: continues a batch of tokenized prompts, each right behind its own end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_ee.inference.decoder import EarlyExitDecoder, Step
from nemo_ee.inference.request import GenerationRequest
from nemo_ee.inference.sampling import sample_tokens
from nemo_ee.megatron.gpt import EarlyExitGPTModel
from nemo_ee.megatron.vocab_parallel import gather_columns


@dataclass
class Continuation:
    """One prompt and what was generated after it.

    Attributes:
        prompt: token ids.
        tokens: generated token ids, with the EOS or end string that ended them.
        exit_layers: the exit of each generated token; `num_layers` for the final one.
        confidences: of that exit, for its own most probable token.
        logprobs: log-probability (nats) of each generated token by that exit, only on request (`all_probs`).
        full_logprobs: [V] each, likewise.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
    full_logprobs: list[Tensor] = field(default_factory=list)


def continue_prompts(
    gpt: EarlyExitGPTModel,
    prompts: Sequence[list[int]],
    request: GenerationRequest,
    stop: Callable[[Sequence[int]], bool],
    eos: int,
    position_limit: int,
    generator: torch.Generator | None = None,
) -> list[Continuation]:
    """Generates; all tensor-parallel ranks return the same.

    The prompts run through all layers and the first token of each comes from the final exit. A sequence
    leaves the batch when `stop` says so, after `max_length` tokens, or at the position limit.

    Args:
        gpt: the whole model on one pipeline stage, in eval mode, with sequence parallelism off.
        prompts: token ids, at least one and at most `position_limit` each.
        request: lengths, sampling, exits.
        stop: whether generated tokens end their sequence.
        eos: token that is not chosen before `min_length` tokens.
        position_limit: positions that may be fed; the last token generated need not be.
        generator: for sampling; used on the first tensor-parallel rank alone.
    """
    results = [Continuation(prompt) for prompt in prompts]
    limits = [min(request.max_length, position_limit + 1 - len(prompt)) for prompt in prompts]
    if request.max_length == 0:
        return results
    most = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)) - 1
    decoder = EarlyExitDecoder(gpt, request.exits, len(prompts), most, request.max_pending)
    live = list(range(len(prompts)))
    step = decoder.prefill(list(prompts))
    while True:
        tokens = choose(gpt, step, [results[i] for i in live], request, eos, generator)
        going = []
        for row, (i, token) in enumerate(zip(live, tokens.tolist(), strict=True)):
            result = results[i]
            result.tokens.append(token)
            result.exit_layers.append(step.exit_layers[row])
            result.confidences.append(step.confidences[row])
            if len(result.tokens) < limits[i] and not stop(result.tokens):
                going.append(row)
        if not going:
            return results
        if len(going) < len(live):
            decoder.keep(going)
            live = [live[row] for row in going]
            tokens = tokens[torch.tensor(going, device=tokens.device)]
        step = decoder.step(tokens)


def choose(
    gpt: EarlyExitGPTModel,
    step: Step,
    results: list[Continuation],
    request: GenerationRequest,
    eos: int,
    generator: torch.Generator | None,
) -> Tensor:
    """The next token of each live sequence, [N]; notes log-probabilities if they are asked for.

    Collectives: at TP > 1, for anything but plain greedy decoding, an all-gather of [N, Vp/TP]; for sampling
    a broadcast of [N] besides.
    """
    options, too_short = request.sampling, [len(r.tokens) < request.min_length for r in results]
    if options.use_greedy and not any(too_short) and not options.all_probs:
        return step.greedy_tokens()
    logits = vocabulary_logits(gpt, step)
    raw = logits
    if any(too_short):
        logits = logits.clone()
        logits[torch.tensor(too_short, device=logits.device), eos] = float("-inf")
    tokens = sample_tokens(logits, options, [r.prompt + r.tokens for r in results], generator)
    if not options.use_greedy and parallel_state.get_tensor_model_parallel_world_size() > 1:
        source = parallel_state.get_tensor_model_parallel_src_rank()
        torch.distributed.broadcast(tokens, source, group=parallel_state.get_tensor_model_parallel_group())
    if options.all_probs:
        log_probs = raw.to(torch.promote_types(raw.dtype, torch.float32)).log_softmax(-1)
        for row, result in enumerate(results):
            result.logprobs.append(log_probs[row, tokens[row]])
            result.full_logprobs.append(log_probs[row])
    return tokens


def vocabulary_logits(gpt: EarlyExitGPTModel, step: Step) -> Tensor:
    """Logits [N, V] over the tokenizer's vocabulary; -inf for what the exit cannot emit.

    Collectives: at TP > 1 an all-gather of [N, Vp/TP].
    """
    return gather_columns(step.vocabulary_shard(len(gpt.output_weight())))[:, : gpt.true_vocab_size]
