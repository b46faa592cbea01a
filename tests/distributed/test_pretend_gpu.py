# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Main paths on a pretend GPU give the CPU's results, mix no devices, and wait for the device only where they must.

On a GPU other code runs than on a CPU (no kernels of our own, torch's fused optimizer, collectives named NCCL); every
tensor that were on the wrong device would be refused.
"""

import json

import pytest
import torch

from nemo_ee.decoding.cpu.cpu_kernels import SWITCH
from tests.distributed import test_exit_editor, test_pretraining_resume, test_tuning_resume
from tests.distributed.test_pretraining_optimizers import DISTRIBUTED, OVERLAPPED
from tests.distributed.test_pretraining_parallel import section
from tests.functional import test_generate_script
from tests.support import tiny_llama, tuning
from tests.support.distributed import WorkerError
from tests.support.logprobs import same_logprobs
from tests.support.pretend_gpu import main_paths
from tests.support.pretraining import Case, largest_gap
from tests.support.tiny_gpt import HEADS
from tests.support.tuning import Layout, largest_difference, write_text

ROUNDING = 1e-4
"""Of float32: the CPU's own kernels add in another order."""

VALIDATED = dict(val_check_interval=2, limit_val_batches=1)
O2 = dict(megatron_amp_O2=True, precision="bf16", optim=OVERLAPPED)
CROSS_ENTROPY = dict(ce_weight=1.0, kl_weight=0.0, argmax_weight=0.0)
MIXED = dict(ce_weight=0.3, kl_weight=0.5, argmax_weight=0.2, token_weighting="confidence")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def by_torch(function, *arguments):
    """As on a GPU: heads in full, confidences of full depth by its output layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "0")
        return function(*arguments)


def test_generation_of_every_head(workers, pretend_gpus):
    (expected,) = workers(1).run(main_paths.generated, list(HEADS))
    (found,) = pretend_gpus(1).run(main_paths.generated, list(HEADS))
    layers = set()
    for head, requests in expected.items():
        for request, answer in requests.items():
            mine = found[head][request]
            assert mine["token_ids"] == answer["token_ids"], (head, request)
            for a, b in zip(mine["early_exit"], answer["early_exit"], strict=True):
                assert a["exit_layers"] == b["exit_layers"], (head, request)
                assert a["confidences"] == pytest.approx(b["confidences"], rel=1e-3, abs=1e-4)
                layers |= set(a["exit_layers"])
                assert a["drafts"] == b["drafts"] and bool(b["drafts"]) == ("lossless" in request)
            same_logprobs(mine, answer, rel=1e-3, abs=1e-3)
            if request.startswith("probabilities"):
                for a, b in zip(mine["full_logprob"], answer["full_logprob"], strict=True):
                    torch.testing.assert_close(a, b, rtol=ROUNDING, atol=1e-3)
    assert layers == {2, 4, 6, 8}


@pytest.mark.parametrize("graphs", [False, True])
def test_decoding_waits_once_per_exit_asked_and_once_per_step(graphs, pretend_gpus):
    heads = ["MLP, untied", "block, shortlist"] if graphs else list(HEADS)  # capturing takes long on a CPU
    (found,) = pretend_gpus(1).run(main_paths.decoding_waits, heads, graphs)
    for head, requests in found.items():
        for request, seen in requests.items():
            places = main_paths.waits.describe(seen.waits)
            assert len(seen.waits) <= seen.exits_asked + seen.steps, (head, request, seen.steps, places)
            assert seen.steps and seen.waits and bool(seen.replays) == graphs
            assert bool(seen.drafts) == ("lossless" in request)
    assert sum(seen.exits_asked for requests in found.values() for seen in requests.values()) > 200


def test_closed_form_and_tuning(text, workers, pretend_gpus):
    cases = {
        name: tuning.Case(
            dict(
                layers=[2, 8],
                head={**HEADS[name], "train_projection": HEADS[name]["projection"] != "tied"},
                ridge=dict(tokens=256, penalty=0.01),
                tuning=MIXED,
            ),
            initialise=True,
            steps=3,
        )
        for name in ("linear, shortlist", "block, MLP, linear, untied")
    }
    (expected,) = workers(1).run(main_paths.tuned, text, cases, Layout())
    (found,) = pretend_gpus(1).run(main_paths.tuned, text, cases, Layout())
    for name in cases:
        assert found[name].backbone_unchanged
        gaps = largest_difference([found[name]], expected[name])
        assert gaps["initial"] < 1e-3 and gaps["train"] < 1e-3 and gaps["validation"] < 1e-3, (name, gaps)
        first = [row[2][0] for row in found[name].train]
        assert first[-1] != first[0]


def resumed_tuning(*args):
    return main_paths.on_host(test_tuning_resume.run(*args))


def resumed_pretraining(*args):
    return main_paths.on_host(test_pretraining_resume.run(*args))


def test_tuning_goes_on_where_it_was_killed(text, pretend_gpus, tmp_path):
    case, layout = test_tuning_resume.CASES["one process"]
    (whole,) = pretend_gpus(1).run(resumed_tuning, text, str(tmp_path / "whole"), case, layout, None)
    with pytest.raises(WorkerError, match="exit code 9"):
        pretend_gpus(1).run(resumed_tuning, text, str(tmp_path / "killed"), case, layout, 3)
    (mine,) = pretend_gpus(1).run(resumed_tuning, text, str(tmp_path / "killed"), case, layout, None)
    assert len(whole.train) == 6 and mine.train == whole.train[2:] and mine.rates == whole.rates[2:]
    for key, value in whole.final.items():
        assert torch.equal(mine.final[key], value), key
    for key, state in whole.optimizer.items():
        assert all(torch.equal(mine.optimizer[key][part], value) for part, value in state.items()), key


@pytest.mark.slow
def test_pretraining_goes_on_where_it_was_killed(text, pretend_gpus, tmp_path):
    case, layout = test_pretraining_resume.CASES["PP2, layers dropped"]
    pool = pretend_gpus(2)
    whole = pool.run(resumed_pretraining, text, str(tmp_path / "whole"), case, layout, None, False)
    with pytest.raises(WorkerError, match="exit code -9"):
        pool.run(resumed_pretraining, text, str(tmp_path / "killed"), case, layout, 3, False)
    resumed = pool.run(resumed_pretraining, text, str(tmp_path / "killed"), case, layout, None, False)
    for mine, other in zip(resumed, whole, strict=True):
        assert len(other["losses"]) == 6 and mine["losses"] == other["losses"][2:]
        for key, value in other["final"].items():
            assert mine["final"][key].equal(value), key
        for found, expected in zip(mine["moments"], other["moments"], strict=True):
            assert found.equal(expected)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, workers):
    directory = tmp_path_factory.mktemp("checkpoints")
    (expected,) = workers(1).run(by_torch, test_generate_script.write_checkpoints, str(directory))
    return directory, expected


def test_exits_of_a_checkpoint_are_edited(pretend_gpus, tmp_path):
    head, writer = next(iter(test_exit_editor.WRITERS.items()))
    pretend_gpus(1).run(test_exit_editor.edit, str(tmp_path), head, writer)


def converted(source: str, output: str) -> str:
    from nemo_ee.checkpoint.content_hash import backbone_content_hash
    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

    return backbone_content_hash(convert_to_nemo(source, output))


def test_a_converted_model_has_the_same_weights(workers, pretend_gpus, tmp_path):
    source = str(tiny_llama.write(tmp_path / "llama"))
    (expected,) = workers(1).run(converted, source, str(tmp_path / "cpu.nemo"))
    (found,) = pretend_gpus(1).run(converted, source, str(tmp_path / "gpu.nemo"))
    assert found == expected


@pytest.mark.parametrize("tp", [1, 2])
def test_the_generating_scripts_steps(tp, checkpoints, pretend_gpus):
    directory, expected = checkpoints
    prompts = f"prompts={json.dumps(test_generate_script.PROMPTS)}"
    overrides = ["gpt_model_file=base.nemo", "adapter_file=exits.nemo", prompts, f"output_file=tp{tp}.jsonl"]
    overrides += [
        f"trainer.devices={tp}",
        f"tensor_model_parallel_size={tp}",
        *test_generate_script.ARGUMENTS,
    ]
    records, *_ = pretend_gpus(tp).run(test_generate_script.in_process, directory, overrides)
    test_generate_script.expect(records, expected)


def test_a_server_with_two_clients_at_once(checkpoints, workers, pretend_gpus):
    (expected,) = workers(1).run(by_torch, main_paths.served, str(checkpoints[0]))
    (found,) = pretend_gpus(1).run(main_paths.served, str(checkpoints[0]))
    assert found == expected and set(found) == {"greedy", "sampling"}
    assert {n for _, rows in found.values() for row in rows for n in row} > {2}


PRETRAINED = {
    "TP2": (
        Layout(tp=2, sp=True),
        {"block": Case(section("block, MLP, linear, untied", [3]), trainer=VALIDATED)},
    ),
    "PP2": (
        Layout(pp=2),
        {
            "tied": Case(section("norm, tied", [2, 6]), trainer=VALIDATED),
            "shortlist": Case(section("linear, shortlist", [2, 6]), trainer=VALIDATED),
            "distributed": Case(section("norm, tied", [2, 6]), dict(optim=DISTRIBUTED), trainer=VALIDATED),
        },
    ),
}


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretraining(name, text, workers, pretend_gpus):
    layout, cases = PRETRAINED[name]
    expected = workers(layout.world_size).run(main_paths.pretrained, text, cases, layout)
    found = pretend_gpus(layout.world_size).run(main_paths.pretrained, text, cases, layout)
    for mine, theirs in zip(found, expected, strict=True):
        for case in cases:
            assert mine[case].losses == pytest.approx(theirs[case].losses, rel=ROUNDING), case
            for key, value in theirs[case].logged.items():
                if key.startswith("val_loss"):
                    assert mine[case].logged[key] == pytest.approx(value, rel=ROUNDING), (case, key)
            gap, where = largest_gap(mine[case].gradients, theirs[case].gradients)
            assert gap < 1e-3, (case, where, gap)


def test_pretraining_with_bfloat16_weights_in_megatrons_buffers(text, workers, pretend_gpus):
    """O2 and the distributed optimizer: parameters and gradients are views of buffers on the device."""
    settings = dict(VALIDATED, precision="bf16")
    cases = {"O2": Case(section("norm, tied", [2, 6]), O2, trainer=settings)}
    args = (main_paths.pretrained, text, cases, Layout(pp=2))
    expected = workers(2).run(*args, dtype=torch.bfloat16)
    found = pretend_gpus(2).run(*args, dtype=torch.bfloat16)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["O2"].losses == pytest.approx(theirs["O2"].losses, rel=2e-3)
        assert mine["O2"].final.keys() == theirs["O2"].final.keys()


def test_pretraining_whose_gradients_are_reduced_meanwhile(text, workers, pretend_gpus):
    """By NeMo's optimizer with O2, on a GPU alone: on a CPU nothing would wait for it (see `cuda_stand_ins`)."""
    settings = dict(megatron_amp_O2=True, precision="bf16", optim=tuning.OPTIMIZER)
    args = (
        main_paths.pretrained_with_main_params,
        text,
        Case(section("norm, tied", [2, 6]), settings),
        Layout(dp=2),
    )
    for (expected, on_cpu), (found, on_gpu) in zip(
        workers(2).run(*args), pretend_gpus(2).run(*args), strict=True
    ):
        assert on_gpu and not on_cpu
        assert len(found) == 2 and found == pytest.approx(expected, rel=2e-3)


WATCHED = {
    **{
        f"tuning | {name}": tuning.Case(
            dict(
                layers=[2, 8],
                init="random",
                head={**head, "train_projection": head["projection"] != "tied"},
                tuning=MIXED,
            )
        )
        for name, head in HEADS.items()
    },
    **{f"pretraining | {name}": Case(section(name, [2, 6])) for name in HEADS},
    "tuning | truncated": tuning.Case(
        dict(layers=[2, 6], init="random", head=HEADS["linear, shortlist"], tuning=CROSS_ENTROPY)
    ),
    "pretraining | layers are dropped": Case(
        section("norm, tied", [2, 4, 6], token_weighting="confidence", layer_dropout=dict(max_rate=0.5))
    ),
}
WATCHED_LAYOUTS = {
    "one process": (Layout(), tuple(WATCHED)),
    "TP2": (Layout(tp=2), ("tuning | linear, shortlist", "pretraining | MLP, untied")),
    "PP2": (Layout(pp=2), ("tuning | MLP, untied", "pretraining | norm, tied")),
}


NEMOS_OWN = "core/pipeline_parallel/p2p_communication.py"
"""NeMo sets batch_p2p_sync: Megatron waits after every batched send and receive between stages."""


@pytest.mark.parametrize("name", WATCHED_LAYOUTS)
def test_training_waits_for_nothing_between_first_forward_and_last_backward(name, text, pretend_gpus):
    layout, chosen = WATCHED_LAYOUTS[name]
    cases = {case: WATCHED[case] for case in chosen}
    for rank in pretend_gpus(layout.world_size).run(main_paths.training_waits, text, cases, layout):
        for case, steps in rank.items():
            assert len(steps) == 2
            ours = [line for step in steps for line in step if NEMOS_OWN not in line]
            assert not ours, (case, ours)
            assert all("synchronize" in line for step in steps for line in step)


def test_the_closed_form_waits_for_nothing_while_it_reads(pretend_gpus):
    for name in ("linear, shortlist", "MLP, untied"):
        (found,) = pretend_gpus(1).run(main_paths.closed_form_waits, {**HEADS[name], "linear": True})
        assert not found, main_paths.waits.describe(found)
