# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One call from prompts to NeMo's output, on all tensor-parallel ranks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from nemo.utils import logging

from nemo_ee.errors import GenerationError
from nemo_ee.inference.decoder import EarlyExitDecoder
from nemo_ee.inference.output import to_output, to_prompt_logprobs
from nemo_ee.inference.prompts import tokenize_prompts
from nemo_ee.inference.request import GenerationRequest, parse_request
from nemo_ee.inference.sequence import Sequence
from nemo_ee.inference.session import DecodingSession
from nemo_ee.inference.stopping import StopRule
from nemo_ee.megatron.decoding_model import DecodingModel
from nemo_ee.megatron.sequence_parallel import sequence_parallel_off
from nemo_ee.megatron.vocab_parallel import gather_columns

T = TypeVar("T")


def generate(
    model: Any,
    inputs: Any,
    length_params: Mapping | None = None,
    sampling_params: Mapping | None = None,
    early_exit: Mapping | bool | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """Generates with early exits; see `GenerationMixin.generate`.

    Every tensor-parallel rank calls it; the prompts and parameters of the first one count.

    Args:
        model: a `MegatronGPTEarlyExitModel`.
        inputs: see `tokenize_prompts`.
        length_params: see `parse_request`.
        sampling_params: see `parse_request`.
        early_exit: see `parse_request`.
        generator: source of randomness for sampling; None takes torch's default.

    Raises:
        ConfigError: parameters that break a rule.
        GenerationError: a model or prompts that cannot be served.
    """
    check_model_can_generate(model)
    tokenizer, limit = model.tokenizer, position_limit(model.cfg)

    def read() -> tuple[GenerationRequest, list[list[int]], list[int]]:
        request = parse_request(length_params, sampling_params, early_exit, model.early_exit)
        add_bos = request.sampling.add_BOS and not request.sampling.compute_logprob
        prompts = tokenize_prompts(inputs, tokenizer, add_bos, limit)
        return request, prompts, seeds(len(prompts), generator)

    request, prompts, drawn = on_first_rank(read)
    with generating(model):
        if request.sampling.compute_logprob:
            return _prompt_logprobs(model, prompts)
        if max(map(len, prompts)) + request.max_length > limit + 1:
            logging.warning(
                f"length_params.max_length={request.max_length}: cut at the model's {limit} positions"
            )
        stop = StopRule(tokenizer, request.sampling.end_strings)
        results = [
            Sequence(prompt, request, stop, stop.eos, min(request.max_length, limit + 1 - len(prompt)), seed)
            for prompt, seed in zip(prompts, drawn, strict=True)
        ]
        if request.max_length > 0:
            continue_sequences(model.decoding_model(), results)
    return to_output(results, tokenizer)


def continue_sequences(model: DecodingModel, sequences: list[Sequence]) -> None:
    """Generates until all are finished; they are one batch.

    Args:
        model: the whole model.
        sequences: not begun, of the same request.
    """
    request = sequences[0].request
    exits = [n for n, threshold in sorted(request.exits.items()) if threshold < 1.0]
    longest = max(len(s.prompt) + s.limit - 1 for s in sequences)
    session = DecodingSession(model, exits, len(sequences), longest, request.kv_policy, request.confidence)
    session.add(sequences)
    while session.running:
        session.step()


def seeds(count: int, generator: torch.Generator | None) -> list[int]:
    """A seed for each sequence's own random numbers.

    Args:
        count: sequences.
        generator: on any device; None takes torch's default.
    """
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**62, (count,), generator=generator, device=device).tolist()


def _prompt_logprobs(model: Any, prompts: list[list[int]]) -> dict[str, Any]:
    decoder = EarlyExitDecoder(model.decoding_model(), [], len(prompts), max(map(len, prompts)))
    shard = decoder.prefill(prompts, all_positions=True).vocabulary_shard(len(model.gpt.output_weight()))
    logits = gather_columns(shard)[:, : model.gpt.true_vocab_size]
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return to_prompt_logprobs(prompts, log_probs.split([len(prompt) for prompt in prompts]), model.tokenizer)


def check_model_can_generate(model: Any) -> None:
    """Raises GenerationError for a pipeline of several stages, or a backbone without its final exit."""
    stages = model.cfg.get("pipeline_model_parallel_size", 1)
    if stages > 1:
        raise GenerationError(
            f"model.pipeline_model_parallel_size={stages}: early exits need all layers on one stage; "
            "restore the checkpoint with pipeline_model_parallel_size=1, or generate at full depth with "
            "strategy=GPTModelTextGenerationStrategy(model)"
        )
    if model.gpt.truncated:
        raise GenerationError(
            "the model lacks the layers above its last exit; restore it as MegatronGPTEarlyExitModel"
        )


def position_limit(cfg: Any) -> int:
    """Positions of the model: the length of learned embeddings, or what rotary ones were trained for."""
    if cfg.get("position_embedding_type", "learned_absolute") == "learned_absolute":
        return cfg.encoder_seq_length
    return max(cfg.encoder_seq_length, cfg.get("max_position_embeddings") or 0)


@contextmanager
def generating(model: Any, no_gradients: Callable = torch.inference_mode) -> Iterator[None]:
    """Eval mode, no gradients, no sequence parallelism, autocast as in NeMo's forward; restored on leaving.

    Args:
        model: a `MegatronGPTEarlyExitModel`.
        no_gradients: `torch.no_grad` where results are changed in place outside.
    """
    gpt = model.gpt
    training = [module for module in gpt.modules() if module.training]
    gpt.eval()
    config = gpt.config
    try:
        with ExitStack() as stack:
            stack.enter_context(no_gradients())
            stack.enter_context(sequence_parallel_off(gpt))
            if config.enable_autocast:
                device = gpt.output_weight().device.type
                stack.enter_context(torch.autocast(device, dtype=config.autocast_dtype))
            yield
    finally:
        for module in training:
            module.training = True


def on_first_rank(read: Callable[[], T]) -> T:
    """Calls `read` on the first tensor-parallel rank; all get its result, or raise its error.

    Collectives: at TP > 1 a broadcast over the tensor-parallel group.
    """
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return read()
    outcome: list[Any] = [None, None]
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        try:
            outcome[0] = read()
        except Exception as error:
            outcome[1] = error
    source = parallel_state.get_tensor_model_parallel_src_rank()
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.broadcast_object_list(outcome, source, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
