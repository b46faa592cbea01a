# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Losses over rows sharded by tensor parallelism: those of one process, in three small all-reduces.

States and weights are small whole numbers, so logits are exact in any sharding and have many equal maxima on
several ranks. Padding fills the last rank.
"""

from collections.abc import Callable
from unittest import mock

import pytest
import torch

from nemo_ee.config import ExitObjective, HeadConfig
from tests.support.distributed import initialize_model_parallel

HIDDEN, VOCABULARY, PADDED, TOKENS, CHUNK, KEPT = 6, 10, 18, 23, 9, 4
CHUNKS = 3
TEACHES = ExitObjective(ce_weight=0.2, kl_weight=0.5, argmax_weight=0.3, loss_chunk_tokens=CHUNK)
ALONE = ExitObjective(loss_chunk_tokens=CHUNK)
HEADS = {
    "tied": HeadConfig(projection="tied"),
    "untied": HeadConfig(projection="untied", train_projection=True),
    "shortlist": HeadConfig(projection="shortlist", shortlist_size=KEPT, train_projection=True),
}


def whole_numbers(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator).double()


def shard(whole: torch.Tensor) -> torch.Tensor:
    """This rank's rows."""
    from megatron.core import parallel_state

    world, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    return whole.chunk(world)[rank].clone()


def projection_of(head: HeadConfig):
    """One exit's projection, with the same rows at every TP."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_ee.modeling.projection import ExitProjection

    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1)
    config.use_cpu_initialization, config.params_dtype = True, torch.float64
    projection = ExitProjection(config, head, VOCABULARY, PADDED)
    if projection.weight is not None:
        projection.weight.data.copy_(shard(whole_numbers(1, projection.num_rows, HIDDEN)))
    if head.projection == "shortlist":
        projection.bucket_weight.data.copy_(whole_numbers(2, HIDDEN))
        projection.set_shortlist(torch.tensor([7, 1, 3, 8]))
    return projection


def counted(call: Callable, *args) -> tuple:
    """What a call returns, and how many all-reduces it made."""
    with mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as reduce:
        return call(*args), reduce.call_count


def all_losses(tp: int) -> dict:
    """Per case: statistics, most probable tokens, whole gradients, and the number of all-reduces."""
    from megatron.core import parallel_state

    from nemo_ee.modeling.vocab_parallel import gather_columns
    from nemo_ee.training.exit_loss import ExitInput, exit_losses

    initialize_model_parallel(tp=tp)
    found = {}
    labels = torch.arange(TOKENS) % VOCABULARY
    mask = (torch.arange(TOKENS) % 4 > 0).double()
    for kind, head in HEADS.items():
        for objective in (TEACHES, ALONE):
            projection, output_weight = projection_of(head), shard(whole_numbers(3, PADDED, HIDDEN))
            output_weight.requires_grad_()
            teacher = ExitInput(whole_numbers(4, TOKENS, HIDDEN), projection_of(HEADS["tied"]))
            state = whole_numbers(5, TOKENS, HIDDEN)
            result, count = counted(
                exit_losses,
                {1: ExitInput(state, projection, 0.7)},
                output_weight,
                labels,
                mask,
                objective,
                teacher if objective.distils else None,
                0.3,
            )
            gradients = {"state": result.state_gradients[1]}
            torch.distributed.all_reduce(
                gradients["state"], group=parallel_state.get_tensor_model_parallel_group()
            )
            for name, parameter in [*projection.named_parameters(), ("tied", output_weight)]:
                if parameter in result.parameter_gradients:
                    value = result.parameter_gradients[parameter]
                    sharded = name in ("weight", "tied")
                    gradients[name] = gather_columns(value.T).T[:VOCABULARY] if sharded else value
            if kind == "shortlist":
                gradients["weight"] = gradients["weight"][:KEPT]
            found[kind, objective.distils] = (result.stats, result.best_tokens, gradients, count)
    return found


@pytest.mark.parametrize("tp", [2, 3])
def test_a_sharded_vocabulary_changes_nothing(tp, workers):
    (expected,) = workers(1).run(all_losses, 1)
    for rank in workers(tp).run(all_losses, tp):
        for case, (stats, best, gradients, count) in rank.items():
            kind, distils = case
            wanted = expected[case]
            assert wanted[3] == 0, "one process has nothing to reduce"
            for n, values in wanted[0].items():  # float64; sums over shards are rounded in another order
                torch.testing.assert_close(stats[n], values, rtol=1e-13, atol=1e-13)
                assert best[n].equal(wanted[1][n]), "of equal logits the lowest token counts"
            assert gradients.keys() == wanted[2].keys()
            for name, value in wanted[2].items():
                assert value.abs().max() > 1e-3, "the reference has a gradient"
                torch.testing.assert_close(gradients[name], value, rtol=1e-13, atol=1e-13)
            per_chunk = 3 * (1 + distils) + (kind == "shortlist") * (1 + distils)
            assert count == CHUNKS * per_chunk, case


def predictions(tp: int) -> tuple:
    """Tokens and confidences of sharded logits, and the number of all-reduces."""
    from nemo_ee.decoding.prediction import Prediction, Rows
    from nemo_ee.modeling.row_summary import summarise_rows

    initialize_model_parallel(tp=tp)
    projection = projection_of(HEADS["untied"])
    with torch.no_grad():
        logits = projection.local_logits(whole_numbers(4, TOKENS, HIDDEN))
    made, count = counted(Prediction.from_logits, logits, Rows.of_exit(projection))
    summary = summarise_rows(logits, projection.emittable_rows())
    (whole, top), again = counted(summary.over_ranks, projection.first_row, logits.amax(-1))
    assert again == count and whole.row.equal(made.tokens) and whole.confidence.equal(made.confidence)
    return made.tokens, made.confidence, count, whole.log_sum, top


def test_a_prediction_takes_three(workers):
    logits = (whole_numbers(4, TOKENS, HIDDEN) @ whole_numbers(1, PADDED, HIDDEN).T)[:, :VOCABULARY]
    highest = logits.amax(-1, keepdim=True)
    assert ((logits == highest).sum(-1) > 1).any(), "there are equal maxima"
    lowest = torch.where(logits == highest, torch.arange(VOCABULARY), VOCABULARY).amin(-1)
    for tokens, confidence, count, log_sum, top in workers(3).run(predictions, 3):
        torch.testing.assert_close(log_sum, logits.logsumexp(-1), rtol=1e-13, atol=0)
        assert top.equal(highest[:, 0])
        assert tokens.equal(lowest) and count == 3
        torch.testing.assert_close(confidence, logits.softmax(-1).amax(-1), rtol=1e-13, atol=0)
