# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One call from prompts to NeMo's output, on all ranks of a model."""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.utils import logging
from torch import Tensor

from nemo_ee.decoding.assumed_prices import prices_of
from nemo_ee.decoding.choosing import Chooser, log_softmax
from nemo_ee.decoding.confidence_rules import CONFIDENCE_RULES
from nemo_ee.decoding.decoder import EarlyExitDecoder
from nemo_ee.decoding.decoding_model import DecodingModel
from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.decoding.logprobs import POSITIONS
from nemo_ee.decoding.pipeline.channel import PipelineGroups, StageGone
from nemo_ee.decoding.pipeline.session import PipelineSession, serve
from nemo_ee.decoding.request import GenerationRequest, parse_request
from nemo_ee.decoding.session import DecodingSession
from nemo_ee.decoding.transfer import to_device
from nemo_ee.errors import ConfigError, Fault, GenerationError
from nemo_ee.generation.generating import check_model_can_generate, generating, position_limit
from nemo_ee.generation.output import to_output, to_prompt_logprobs
from nemo_ee.generation.prompts import tokenize_prompts
from nemo_ee.generation.stopping import StopRule
from nemo_ee.generation.stream import StreamedText, streamed
from nemo_ee.runtime.collective import on_first_rank

JOINING = 8
"""New prompts join when an eighth of the slots is free: a pass for one alone costs as much as for several."""
FED = 2048
"""Of prompts whose own log-probabilities are computed: tokens that are fed at once, if there are several."""


def generate(
    model: Any,
    inputs: Any,
    length_params: Mapping | None = None,
    sampling_params: Mapping | None = None,
    early_exit: Mapping | bool | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """Generates with early exits; see `GenerationMixin.generate`.

    Every rank of the model calls it; the prompts and parameters of the first one count.

    Args:
        model: a `MegatronGPTEarlyExitModel`.
        inputs: see `tokenize_prompts`.
        length_params: see `parse_request`.
        sampling_params: see `parse_request`.
        early_exit: see `parse_request`.
        generator: source of randomness for sampling; None takes torch's default on the first rank. Greedy
            decoding draws nothing from it.

    Raises:
        ConfigError: parameters that break a rule.
        GenerationError: a model or prompts that cannot be served.
    """
    begun = _begin(model, inputs, length_params, sampling_params, early_exit, generator)
    with generating(model):
        check_pipeline_can(begun.request)
        if begun.request.sampling.compute_logprob:
            return _prompt_logprobs(model, begun)
        results = begun.sequences(model)
        decoding = model.decoding_model()
        if results[0].finish_reason is None:
            for _ in continue_sequences(model, decoding, results, len(results)):
                pass
        prices = prices_of(decoding).shown() if decoding.is_whole else None
    return {**to_output(results, model.text_tokenizer), "pass_prices": prices}


def stream(
    model: Any,
    inputs: Any,
    length_params: Mapping | None = None,
    sampling_params: Mapping | None = None,
    early_exit: Mapping | bool | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[StreamedText]:
    """Generates step by step; see `GenerationMixin.stream`. All is checked before it returns.

    Args:
        model: as for `generate`, as are the others.
        inputs: likewise.
        length_params: likewise.
        sampling_params: likewise.
        early_exit: likewise.
        generator: likewise.

    Raises:
        ConfigError: parameters that break a rule, or ask for log-probabilities of a whole vocabulary or of prompts.
        GenerationError: a model or prompts that cannot be served; several pipeline stages.
    """
    begun = _begin(model, inputs, length_params, sampling_params, early_exit, generator)
    wholes = {
        name: getattr(begun.request.sampling, name)
        for name in ("all_probs", "compute_logprob", "prompt_logprobs")
    }
    if asked := {name: value for name, value in wholes.items() if value is not None and value is not False}:
        rule, remedy = (
            "a stream has log-probabilities of its tokens alone",
            "call model.generate, or leave it out",
        )
        raise ConfigError(
            *(Fault(f"sampling_params.{name}", value, rule, remedy) for name, value in asked.items())
        )
    if (stages := parallel_state.get_pipeline_model_parallel_world_size()) > 1:
        raise GenerationError(
            f"model.pipeline_model_parallel_size={stages}: a stream needs all layers on one stage; call "
            "model.generate, or restore with pipeline_model_parallel_size=1"
        )
    return streamed(model, begun.sequences(model, always_text=True))


@dataclass(frozen=True)
class _Begun:
    """A call whose arguments are checked; the same on all ranks.

    Attributes:
        request: how to generate.
        prompts: token ids of each.
        seeds: of each one's random numbers.
        texts: the prompts as they were given, where they are texts.
    """

    request: GenerationRequest
    prompts: list[list[int]]
    seeds: list[int]
    texts: list[str] | None

    def sequences(self, model: Any, always_text: bool = False) -> list[GeneratedSequence]:
        """To be generated, with texts of their own where end strings are looked for, or always."""
        request, limit = self.request, position_limit(model.cfg)
        if max(map(len, self.prompts)) + request.max_length > limit + 1:
            logging.warning(
                f"length_params.max_length={request.max_length}: cut at the model's {limit} positions"
            )
        stop = StopRule(model.text_tokenizer, request.sampling.end_strings, always_text)
        begun = [
            stop.begin(prompt, request, min(request.max_length, limit + 1 - len(prompt)), seed)
            for prompt, seed in zip(self.prompts, self.seeds, strict=True)
        ]
        scored = request.sampling.prompt_logprobs is not None
        for sequence in begun if request.max_length == 0 and not scored else ():
            sequence.finish_reason = "length"
        return begun


def _begin(
    model: Any,
    inputs: Any,
    length_params: Mapping | None,
    sampling_params: Mapping | None,
    early_exit: Mapping | bool | None,
    generator: torch.Generator | None,
) -> _Begun:
    """Raises what `generate` raises for its arguments, on every rank."""
    check_model_can_generate(model)
    tokenizer, limit = model.text_tokenizer, position_limit(model.cfg)

    def read() -> tuple[GenerationRequest, list[list[int]], list[int], list[str] | None]:
        request = parse_request(
            length_params, sampling_params, early_exit, model.early_exit, generator is not None
        )
        sampling = request.sampling
        prompts = tokenize_prompts(inputs, tokenizer, sampling.add_BOS, limit)
        drawn = [0] * len(prompts) if sampling.use_greedy else seeds(len(prompts), generator)
        return request, prompts, drawn, list(inputs) if isinstance(inputs[0], str) else None

    return _Begun(*on_first_rank(read, parallel_state.get_model_parallel_group()))


def continue_sequences(
    model: Any, decoding: DecodingModel, sequences: list[GeneratedSequence], slots: int
) -> Iterator[int]:
    """Generates until all are finished; yields after each step how many of them that did. Use it under `generating`.

    Every rank of the model calls it, and their sequences are alike afterwards.

    Args:
        model: a `MegatronGPTEarlyExitModel`.
        decoding: the model as decoding reads it.
        sequences: not begun, of the same request.
        slots: sequences at a time. On one pipeline stage others take the places of those that have ended.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        for first in range(0, len(sequences), slots):
            batch = sequences[first : first + slots]
            continue_over_stages(model.pipeline_groups(), decoding, batch)
            yield len(batch)
        return
    request, (exits, longest), waiting = sequences[0].request, _extent(sequences), deque(sequences)
    with DecodingSession(decoding, exits, slots, longest, request.kv_policy, request.confidence) as session:
        while waiting or session.running:
            ended: list[GeneratedSequence] = []
            if waiting and session.free >= min(len(waiting), max(1, slots // JOINING)):
                ended += session.add([waiting.popleft() for _ in range(min(session.free, len(waiting)))])
            yield len(ended + session.step())


def continue_over_stages(
    groups: PipelineGroups, model: DecodingModel, sequences: list[GeneratedSequence]
) -> None:
    """Generates a batch over a pipeline; all its ranks call it, and their sequences are alike afterwards.

    Args:
        groups: of the pipeline.
        model: this stage.
        sequences: not begun, of the same request.

    Raises:
        RuntimeError: a stage has failed; on every rank.
    """
    exits, longest = _extent(sequences)
    size = exits, len(sequences), longest, sequences[0].request.confidence
    names = (
        "tokens",
        "exit_layers",
        "confidences",
        "logprobs",
        "prompt_logprobs",
        "finish_reason",
        "statistics",
    )
    failure: Exception | None = None
    try:
        if parallel_state.is_pipeline_first_stage():
            with PipelineSession(groups, model, *size) as session:
                session.add(sequences)
                while session.running:
                    session.step()
        else:
            serve(groups, model, *size)
    except StageGone:
        raise
    except Exception as error:  # of any stage; the first one knows of it, and tells all
        failure = error

    def results() -> list[list[Any]]:
        if failure is not None:
            raise failure
        return [[getattr(s, name) for name in names] for s in sequences]

    found = on_first_rank(results, parallel_state.get_model_parallel_group())
    for sequence, values in zip(sequences, found, strict=True):
        for name, value in zip(names, values, strict=True):
            setattr(sequence, name, value)


def _extent(sequences: list[GeneratedSequence]) -> tuple[list[int], int]:
    """The exits that can be taken, and the positions that are needed."""
    return sequences[0].request.asked, max(s.positions for s in sequences)


def seeds(count: int, generator: torch.Generator | None) -> list[int]:
    """A seed for each sequence's own random numbers.

    Args:
        count: sequences.
        generator: on any device; None takes torch's default.
    """
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**62, (count,), generator=generator, device=device).tolist()


def _prompt_logprobs(model: Any, begun: _Begun) -> dict[str, Any]:
    """Prompts go through the layers some at a time, and to the output layer some positions at a time: logits of
    [POSITIONS, V] are all that exists at once, but for `full_logprob`, which is kept where `all_probs` asks for it."""
    whole = begun.request.sampling.all_probs
    logprobs: list[Tensor] = []
    full: list[Tensor] = []
    groups, chooser = list(_groups(begun.prompts)), Chooser(model.gpt)
    size = max(map(len, groups)), max(map(len, begun.prompts))
    with closing(EarlyExitDecoder(model.decoding_model(), [], *size)) as decoder:
        for prompts in groups:
            states, _ = decoder.feed_prompts(prompts)
            # Behind a prompt's last token its most probable one is scored, as in NeMo 2.4.1: -1 stands for that.
            following = [token for prompt in prompts for token in (*prompt[1:], -1)]
            scored, rows = [], []
            for first in range(0, len(states), POSITIONS):
                chunk = slice(first, first + POSITIONS)
                log_probs = log_softmax(chooser.logits(decoder.output.predict(states[chunk])))
                tokens = to_device(following[chunk], states.device)
                given = log_probs.gather(1, tokens.clamp_min(0)[:, None])[:, 0]
                scored.append(torch.where(tokens < 0, log_probs.max(-1).values, given))
                rows += [log_probs] if whole else []
            lengths = [len(prompt) for prompt in prompts]
            logprobs += torch.cat(scored).split(lengths)
            full += torch.cat(rows).split(lengths) if whole else ()
            decoder.drop(range(len(prompts)))
    return to_prompt_logprobs(
        begun.prompts, logprobs, full if whole else None, model.text_tokenizer, begun.texts
    )


def _groups(prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    """Prompts that are fed together, in their order: of `FED` tokens at most, or a single one."""
    group: list[list[int]] = []
    for prompt in prompts:
        if group and sum(map(len, group)) + len(prompt) > FED:
            yield group
            group = []
        group.append(prompt)
    yield group


def check_pipeline_can(request: GenerationRequest) -> None:
    """Raises GenerationError for what several pipeline stages cannot do.

    Raises:
        GenerationError: naming the parameter and the alternative.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return
    rule = CONFIDENCE_RULES[request.confidence]
    refused = {
        "early_exit.lossless=true": request.lossless,
        f"early_exit.max_pending={request.max_pending}": request.max_pending is not None,
        f"early_exit.kv_policy={request.kv_policy}": request.kv_policy != "catch_up",
        f"early_exit.confidence={request.confidence}": rule.looks_back,
        "sampling_params.all_probs=true": request.sampling.all_probs,
        "sampling_params.compute_logprob=true": request.sampling.compute_logprob,
    }
    names = [name for name, given in refused.items() if given]
    if names:
        raise GenerationError(
            f"{', '.join(names)}: not over several pipeline stages; leave it out, or restore the model with "
            "pipeline_model_parallel_size=1 (and a larger tensor_model_parallel_size)"
        )
