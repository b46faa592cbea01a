# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What every process of pipeline_decoding.py runs: one stage of a tiny GPT, which decodes in several ways."""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch

STAGE_LAYERS, HIDDEN, HEADS, VOCABULARY = 1, 64, 4, 512
PROMPT = 4
"""Tokens of a prompt."""
STD, EXIT_STD = 0.1, 0.5
"""Of weights, and of exits' projections: confidences then spread over most of 0 to 1."""
CONFIDENCE, TEMPERATURE = "max_probability", 2.0
"""Of exits; and at which tokens are drawn: greedy texts of random weights soon repeat themselves."""


@dataclass(frozen=True)
class Way:
    """How tokens may leave.

    Attributes:
        name: for the page.
        thresholds: stage, from 1 -> threshold of the exit on its last layer.
    """

    name: str
    thresholds: dict[int, float]


@dataclass(frozen=True)
class Job:
    """A pipeline and what it decodes.

    Attributes:
        stages: P.
        batches: numbers of sequences.
        ways: taken in turn.
        seconds: that a pass sleeps.
        tokens: generated per sequence.
        repeats: calls of every way at every batch; a short one before warms up.
    """

    stages: int
    batches: tuple[int, ...]
    ways: tuple[Way, ...]
    seconds: float
    tokens: int
    repeats: int


@dataclass(frozen=True)
class Call:
    """The decoding of one batch as one stage saw it.

    Attributes:
        times: [B][T] seconds from the prompts' start until the first stage had the token; of that stage alone.
        passed: [B][T] stages from the first to that whose exit chose the token; likewise.
        passes: of this stage when each began, awoke and ended; the prompts' one first. One clock for all.
    """

    times: list[list[float]]
    passed: list[list[int]]
    passes: list[tuple[float, float, float]]


def measure(job: Job) -> dict[tuple[int, str], list[Call]]:
    """Decodes every batch in every way, in turn and beginning with another way each time. In every rank.

    Returns:
        (batch, way's name) -> calls in the order of repetitions.
    """
    from megatron.core import parallel_state

    from nemo_ee.inference.pipeline_channel import PipelineGroups
    from nemo_ee.megatron.decoding_model import DecodingModel

    torch.set_num_threads(1)
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=job.stages)
    groups = PipelineGroups.make()
    found: dict[tuple[int, str], list[Call]] = {(b, w.name): [] for b in job.batches for w in job.ways}
    with torch.inference_mode():
        run = partial(decode, groups, DecodingModel(build_stage(job.stages)), job.seconds)
        for batch, way in ((b, w) for b in job.batches for w in job.ways):
            run(way, batch, tokens=2)
        for repeat in range(job.repeats):
            first = repeat % len(job.ways)
            for way in job.ways[first:] + job.ways[:first]:
                for batch in job.batches:
                    found[batch, way.name].append(run(way, batch, job.tokens))
    return found


def decode(groups: Any, model: Any, seconds: float, way: Way, batch: int, tokens: int) -> Call:
    """Decodes one batch; its prompts depend on its size alone. Collective over the pipeline.

    Args:
        groups: `PipelineGroups`.
        model: `DecodingModel` of this stage.
        seconds: that a pass sleeps.
        way: when tokens leave.
        batch: sequences.
        tokens: to generate.
    """
    from megatron.core import parallel_state
    from slept_decoding import SleptStage, TimedSequence

    from nemo_ee.inference import pipeline_session
    from nemo_ee.inference.request import GenerationRequest, SamplingOptions

    exits = {STAGE_LAYERS * stage: threshold for stage, threshold in way.thresholds.items()}
    size = list(exits), batch, PROMPT + tokens, CONFIDENCE
    passes: list[tuple[float, float, float]] = []
    slept = partial(SleptStage, seconds=seconds, passes=passes)
    with mock.patch.object(pipeline_session, "Stage", slept):
        if not parallel_state.is_pipeline_first_stage():
            torch.distributed.barrier()
            pipeline_session.serve(groups, model, *size)
            return Call([], [], passes)
        drawn = SamplingOptions(use_greedy=False, temperature=TEMPERATURE)
        request = GenerationRequest(max_length=tokens, sampling=drawn, exits=exits)
        prompts = torch.randint(VOCABULARY, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
        sequences = [TimedSequence(prompt, request, seed) for seed, prompt in enumerate(prompts.tolist())]
        session = pipeline_session.PipelineSession(groups, model, *size)
        torch.distributed.barrier()
        begin = time.perf_counter()
        session.add(sequences)
        while session.running:
            session.step()
        session.end()
    times = [[at - begin for at in sequence.times] for sequence in sequences]
    passed = [[-(-n // STAGE_LAYERS) for n in sequence.exit_layers] for sequence in sequences]
    return Call(times, passed, passes)


def build_stage(stages: int) -> Any:
    """This rank's stage of a small random GPT with an exit on the last layer of each stage but the last."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_ee.config import EarlyExitConfig, HeadConfig
    from nemo_ee.megatron.gpt import EarlyExitGPTModel

    layers = STAGE_LAYERS * stages
    torch.manual_seed(1234 + parallel_state.get_pipeline_model_parallel_rank())
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=STD,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=stages,
        use_cpu_initialization=True,
    )
    head = HeadConfig(mlp=False, norm=True, linear=False, projection="untied")
    gpt = EarlyExitGPTModel(
        config,
        early_exit=EarlyExitConfig(layers=tuple(range(STAGE_LAYERS, layers, STAGE_LAYERS)), head=head),
        padded_vocab_size=VOCABULARY,
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    for exit_head in gpt.exits.values():
        torch.nn.init.normal_(exit_head.projection.weight, std=EXIT_STD)
    return gpt.eval()
