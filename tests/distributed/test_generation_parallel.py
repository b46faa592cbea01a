# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Generation at tensor-parallel sizes 2 and 4 equals one process. Pipelines: test_pipeline_decoding.py."""

import pytest
import torch

from tests.support.logprobs import same_logprobs
from tests.support.tiny_gpt import HEADS, NEMO, TEXTS

EARLY = dict(threshold=[0.6, 0.5, 0.7], always=True)


def generate(tp, head, sequence_parallel=False):
    """Greedy, sampled, log-probability and NeMo-loop outputs of this rank; only the first has prompts."""
    from nemo_ee.generation.strategy import EarlyExitTextGenerationStrategy
    from tests.support.drafting import drafting_eagerly
    from tests.support.tiny_gpt import tiny_model, tiny_model_config

    rank = torch.distributed.get_rank()
    config = tiny_model_config(
        head=HEADS[head],
        tp=tp,
        share_embeddings_and_output_weights=False,
        sequence_parallel=sequence_parallel,
    )
    model = tiny_model(config, tp, torch.float64)
    texts = TEXTS if rank == 0 else None
    greedy = dict(add_BOS=False)
    early = EARLY if rank == 0 else None
    out = [model.generate(texts, dict(max_length=12), greedy, early_exit=early)]
    out.append(
        model.generate(
            texts,
            dict(max_length=12, min_length=6),
            dict(add_BOS=False, all_probs=True, logprobs=3, prompt_logprobs=2),
            early_exit=early,
        )
    )
    sampling = dict(use_greedy=False, add_BOS=False, top_k=20, top_p=0.9)
    generator = torch.Generator().manual_seed(3)  # alike on all ranks here, so that layouts can be compared
    out.append(model.generate(texts, dict(max_length=12), sampling, early_exit=early, generator=generator))
    for threshold in (0.0, 0.5):
        lossless = dict(threshold=threshold, lossless=True) if rank == 0 else None
        with drafting_eagerly():
            asked = {**greedy, "logprobs": 2}
            out.append(model.generate(texts, dict(max_length=12), asked, early_exit=lossless))
        assert rank > 0 or sum(each["drafts"] for each in out[-1]["early_exit"]) > 0
        assert (
            out[-1]["token_ids"]
            == model.generate(texts, dict(max_length=12), greedy, early_exit=False)["token_ids"]
        )
    lossless = dict(threshold=EARLY["threshold"], lossless=True) if rank == 0 else None
    generator = torch.Generator().manual_seed(4)
    with drafting_eagerly():
        out.append(
            model.generate(texts, dict(max_length=12), sampling, early_exit=lossless, generator=generator)
        )
    out.append(model.generate(texts, dict(max_length=1), dict(compute_logprob=True)))
    strategy = EarlyExitTextGenerationStrategy(model, threshold=EARLY["threshold"])
    if sequence_parallel:
        model.cfg.sequence_parallel = False  # NeMo's loop itself never looks at it; ours must not need it
    out.append(model.generate(TEXTS, dict(max_length=12), NEMO, strategy=strategy))
    assert config.tensor_model_parallel_size == tp
    if sequence_parallel:
        assert (
            model.gpt.config.sequence_parallel
            and model.gpt.embedding.word_embeddings.reduce_scatter_embeddings
        )
    return out


def sampled_with_different_generators(tp):
    """Tokens of this rank, whose generator is its own: those of the first rank must win."""
    from tests.support.tiny_gpt import tiny_model, tiny_model_config

    model = tiny_model(tiny_model_config(head=HEADS["MLP, untied"], tp=tp), tp)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    sampling = dict(use_greedy=False, add_BOS=False, temperature=2.0)
    return model.generate(TEXTS, dict(max_length=12), sampling, early_exit=EARLY, generator=generator)[
        "token_ids"
    ]


def decided_by_prices(tp):
    """This rank's prices of passes, and what it generates by them."""
    from tests.support.tiny_gpt import tiny_model, tiny_model_config

    model = tiny_model(tiny_model_config(head=HEADS["MLP, untied"], tp=tp), tp)
    model.prepare_decoding()
    output = model.generate(TEXTS, dict(max_length=12), dict(add_BOS=False), early_exit=dict(threshold=0.3))
    return model.decoding_model().prices, output["token_ids"], output["early_exit"]


def refused(tp, inputs):
    """The error of this rank, when only the first one can see what is wrong."""
    from nemo_ee.errors import GenerationError
    from tests.support.tiny_gpt import tiny_model, tiny_model_config

    model = tiny_model(tiny_model_config(tp=tp), tp)
    with pytest.raises(GenerationError) as caught:
        model.generate(
            inputs if torch.distributed.get_rank() == 0 else None, dict(max_length=4), dict(add_BOS=False)
        )
    return str(caught.value)


def refused_with_what_does_not_pickle(tp):
    """The error of this rank, for a value that the first one cannot send to the others."""
    from nemo_ee.errors import ConfigError
    from tests.support.tiny_gpt import tiny_model, tiny_model_config

    model = tiny_model(tiny_model_config(tp=tp), tp)
    with pytest.raises(ConfigError) as caught:
        model.generate(TEXTS, dict(max_length=4), dict(top_k=lambda: 5))
    return str(caught.value)


def refused_in_nemos_loop(tp, inputs):
    """The error of this rank in NeMo's loop, which tokenizes on the first one alone."""
    from nemo_ee.errors import GenerationError
    from nemo_ee.generation.strategy import EarlyExitTextGenerationStrategy
    from tests.support.tiny_gpt import tiny_model, tiny_model_config

    model = tiny_model(tiny_model_config(tp=tp), tp)
    strategy = EarlyExitTextGenerationStrategy(model)
    with pytest.raises(GenerationError) as caught:
        model.generate(inputs, dict(max_length=4), NEMO, strategy=strategy)
    return str(caught.value)


def pipeline(pp):
    """The error of this stage for NeMo's loop with exits, and the tokens that NeMo's own strategy generates."""
    from nemo.collections.nlp.modules.common.text_generation_strategy import GPTModelTextGenerationStrategy

    from nemo_ee.errors import GenerationError
    from nemo_ee.generation.strategy import EarlyExitTextGenerationStrategy
    from tests.support.tiny_gpt import tiny_model, tiny_model_config

    config = tiny_model_config(head=HEADS["MLP, untied"], pp=pp, share_embeddings_and_output_weights=False)
    model = tiny_model(config, pp, torch.float32)
    with pytest.raises(GenerationError) as caught:
        EarlyExitTextGenerationStrategy(model)
    output = model.generate(
        TEXTS[:1], dict(max_length=8), NEMO, strategy=GPTModelTextGenerationStrategy(model)
    )
    return str(caught.value), output["token_ids"][0]


def same(one, other):
    assert one["token_ids"] == other["token_ids"] and one["sentences"] == other["sentences"]
    for a, b in zip(one.get("early_exit", []), other.get("early_exit", []), strict=True):
        assert a["exit_layers"] == b["exit_layers"]
        assert a["confidences"] == pytest.approx(b["confidences"], rel=1e-9)
    same_logprobs(one, other)
    for key in ("logprob", "full_logprob"):
        if isinstance(one[key], list):
            for a, b in zip(one[key], other[key], strict=True):
                assert torch.allclose(a, b)


@pytest.mark.parametrize("head", HEADS)
def test_tensor_parallel_equals_one_process(workers, head):
    (single,) = workers(1).run(generate, 1, head)
    layers = {layer for row in single[0]["early_exit"] for layer in row["exit_layers"]}
    assert len(layers) >= 3
    ranks = workers(2).run(generate, 2, head)
    if head == "block, shortlist":  # 61 rows: at 4 the last rank holds padding beside the bucket
        ranks += workers(4).run(generate, 4, head)
    for rank in ranks:
        for ours, expected in zip(rank, single, strict=True):
            same(ours, expected)


def test_a_model_built_for_sequence_parallelism_generates_the_same(workers):
    head = "block, MLP, linear, untied"
    (single,) = workers(1).run(generate, 1, head)
    for rank in workers(2).run(generate, 2, head, sequence_parallel=True):
        for ours, expected in zip(rank, single, strict=True):
            same(ours, expected)


def test_the_first_ranks_draws_count(workers):
    first, second = workers(2).run(sampled_with_different_generators, 2)
    assert first == second


def test_all_ranks_decide_by_the_prices_that_the_first_has_measured(workers):
    first, second = workers(2).run(decided_by_prices, 2)
    assert first == second and first[0].source.startswith("measured")


def test_errors_reach_all_ranks(workers):
    first, second = workers(2).run(refused, 2, ["w1", ""])
    assert first == second == "prompt 1: it has no tokens; give at least one, or set add_BOS=true"


def test_errors_that_do_not_pickle_reach_all_ranks(workers):
    first, second = workers(2).run(refused_with_what_does_not_pickle, 2, timeout=120)
    assert first == second and "sampling_params.top_k=<function" in first


def test_errors_of_nemos_loop_reach_all_ranks(workers):
    first, second = workers(2).run(refused_in_nemos_loop, 2, ["w1", ""], timeout=120)
    assert first == second == "prompt 1: it has no tokens; give at least one, or set add_BOS=true"


def test_nemos_loop_with_exits_refuses_pipelines_and_nemos_strategy_serves_them(workers):
    results = workers(2).run(pipeline, 2)
    assert all("pipeline_model_parallel_size=2" in message for message, _ in results)
    assert all("call model.generate without a strategy" in message for message, _ in results)
    assert results[0][1] == results[1][1] and len(results[0][1]) == 11
