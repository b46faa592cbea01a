# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""First weights of exits: the closed form against directly solved least squares, copies, and noise."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support import tiny_llama
from tests.support.tiny_gpt import VOCABULARY, tiny_model, tiny_model_config

PENALTY = 0.02
BATCHES, ROWS, LENGTH = 3, 2, 40


def build(head: dict, exits=(3, 8), **overrides):
    model = tiny_model(tiny_model_config(exits=list(exits), head=head, **overrides), dtype=torch.float64)
    for part in model.gpt.modules():
        if getattr(part, "config", None) is not None:
            part.config.params_dtype = part.config.pipeline_dtype = torch.float64
    return model.gpt


def micro_batches() -> list:
    from nemo_ee.modeling.micro_batch import MicroBatch

    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(BATCHES):
        ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
        mask = (torch.rand(ROWS, LENGTH, generator=generator) > 0.25).float()
        positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
        made.append(MicroBatch(ids[:, :-1], ids[:, 1:], mask, positions))
    return made


def collect(gpt) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Hidden states of exits and the final normed state, [tokens that count, H]."""
    hidden, final = {n: [] for n in gpt.exit_layers}, []
    with torch.no_grad():
        for batch in micro_batches():
            states = gpt.forward_states(batch.tokens, batch.position_ids, None)
            keep = batch.loss_mask.t().reshape(-1) > 0
            final.append(states.output.reshape(-1, 64)[keep])
            for n in hidden:
                hidden[n].append(states.exits[n].reshape(-1, 64)[keep])
    return {n: torch.cat(parts) for n, parts in hidden.items()}, torch.cat(final)


def fit(gpt) -> None:
    from nemo_ee.modeling.first_weights.exit_init import RidgeInitialiser
    from nemo_ee.training.tuning_step import run_backbone

    for head in gpt.exits.values():
        head.reset_for_fit()
    closed_form = RidgeInitialiser(gpt)
    run_backbone(gpt, iter(micro_batches()), BATCHES, True, closed_form)
    closed_form.finish(PENALTY)


def ridge(groups: list[torch.Tensor], target: torch.Tensor) -> np.ndarray:
    """Coefficients [features + 1, targets], by least squares with a row for each penalty."""
    features = torch.cat([*groups, torch.ones(len(target), 1, dtype=torch.float64)], 1).numpy()
    penalties = [np.full(g.shape[1], PENALTY * g.pow(2).sum(0).mean().item()) for g in groups]
    penalties = np.concatenate([*penalties, [1e-6 * len(target)]])
    rows = np.vstack([features, np.diag(np.sqrt(penalties))])
    goal = np.vstack([target.numpy(), np.zeros((len(penalties), target.shape[1]))])
    return np.linalg.lstsq(rows, goal, rcond=None)[0]


def activations(x: torch.Tensor, module) -> torch.Tensor:
    """What the MLP's output projection reads."""
    normed = module.norm(x)
    out = F.linear(normed, module.mlp.linear_fc1.weight, module.mlp.linear_fc1.bias)
    if module.config.gated_linear_unit:
        gate, up = out.chunk(2, -1)
        return F.silu(gate) * up
    return module.config.activation_func(out)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_closed_form_is_the_least_squares_solution(block, mlp, biases):
    changes = dict(normalization="layernorm", bias=True, activation="gelu") if biases else {}
    gpt = build(dict(block=block, mlp=mlp, linear=True, projection="tied"), **changes)
    hidden, final = collect(gpt)
    fit(gpt)
    for n in gpt.exit_layers:
        head = gpt.exits[str(n)]
        plain = F.layer_norm(hidden[n], (64,), eps=1e-5) if biases else F.rms_norm(hidden[n], (64,), eps=1e-5)
        groups = [plain]
        if mlp:
            groups.append(activations(hidden[n], head.mlp).detach())
        solution = ridge(groups, final)
        fitted = [
            head.linear.weight.T,
            *([head.mlp.mlp.linear_fc2.weight.T] if mlp else []),
            head.linear.bias[None],
        ]
        np.testing.assert_allclose(torch.cat(fitted).detach().numpy(), solution, rtol=1e-6, atol=1e-8)
        # What the whole head computes from then on is that solution's prediction: nothing is counted twice.
        predicted = torch.cat([*groups, torch.ones(len(final), 1, dtype=torch.float64)], 1).numpy() @ solution
        with torch.no_grad():
            found = head.readout(hidden[n][:, None])[:, 0]
        np.testing.assert_allclose(found.numpy(), predicted, rtol=1e-6, atol=1e-8)
        error = np.square(predicted - final.numpy()).mean() / final.numpy().var()
        assert error < 0.8, f"exit {n} learns nothing of the final state: {error:.2f}"


def test_one_exit_at_a_time_is_fitted_as_all_together():
    from nemo_ee.modeling.first_weights.exit_init import RidgeInitialiser, ridge_passes
    from nemo_ee.training.tuning_step import run_backbone

    fits = []
    for most in (2**34, 2 * 8 * 161 * (161 + 64), 1):  # 64 + 96 features and the constant, 64 targets
        gpt = build(dict(mlp=True, linear=True, projection="shortlist", shortlist_size=50), exits=(2, 3, 8))
        passes = ridge_passes(gpt, most_bytes=most)
        for head in gpt.exits.values():
            head.reset_for_fit()
        for layers in passes:
            closed_form = RidgeInitialiser(gpt, layers)
            run_backbone(gpt, iter(micro_batches()), BATCHES, True, closed_form)
            closed_form.finish(PENALTY)
            assert closed_form.sums == {}, "nothing of the sums is left"
        fits.append((passes, {name: p.detach().clone() for name, p in gpt.exits.named_parameters()}))
    assert [passes for passes, _ in fits] == [[(2, 3, 8)], [(2, 3), (8,)], [(2,), (3,), (8,)]]
    for _, found in fits[1:]:
        assert all(found[name].equal(value) for name, value in fits[0][1].items())


def test_held_out_r2_is_that_of_the_least_squares_prediction():
    from nemo_ee.modeling.first_weights.exit_init import RidgeInitialiser
    from nemo_ee.modeling.first_weights.fit_quality import HeldOutFit
    from nemo_ee.training.tuning_step import run_backbone

    gpt = build(dict(mlp=True, linear=True, projection="tied"))
    hidden, final = collect(gpt)
    read = [int((batch.loss_mask > 0).sum()) for batch in micro_batches()]
    first = sum(read[:-1])  # the last micro-batch is held out
    for head in gpt.exits.values():
        head.reset_for_fit()
    expected = {}
    for n in gpt.exit_layers:
        groups = [
            F.rms_norm(hidden[n], (64,), eps=1e-5),
            activations(hidden[n], gpt.exits[str(n)].mlp).detach(),
        ]
        solution = ridge([group[:first] for group in groups], final[:first])
        rows = torch.cat([*groups, torch.ones(len(final), 1, dtype=torch.float64)], 1)[first:].numpy()
        target = final[first:].numpy()
        error = np.square(rows @ solution - target).sum()
        expected[n] = 1 - error / np.square(target - target.mean(0)).sum()
    closed_form = RidgeInitialiser(gpt)
    batches = micro_batches()
    run_backbone(gpt, iter(batches[:-1]), BATCHES - 1, True, closed_form)
    closed_form.finish(PENALTY)
    held_out = HeldOutFit(gpt)
    run_backbone(gpt, iter(batches[-1:]), 1, True, held_out)
    assert held_out.finish() == pytest.approx(expected, rel=1e-6)


def test_the_bucket_fits_the_other_tokens_log_mass():
    from nemo_ee.modeling.first_weights.exit_init import initialise_projections

    gpt = build(dict(mlp=False, linear=True, projection="shortlist", shortlist_size=50))
    shortlist = torch.arange(0, 200, 4)
    initialise_projections(gpt, shortlist, None)
    _, final = collect(gpt)
    fit(gpt)
    others = torch.ones(VOCABULARY, dtype=torch.bool)
    others[shortlist] = False
    weight = gpt.output_weight()[:VOCABULARY]
    target = (final @ weight[others].T).logsumexp(-1)[:, None]
    solution = ridge([final], target.detach())
    projection = gpt.exits["3"].projection
    found = torch.cat([projection.bucket_weight, projection.bucket_bias]).detach().numpy()
    np.testing.assert_allclose(found, solution[:, 0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(projection.weight, weight[shortlist])


def test_a_shortlist_of_the_whole_vocabulary():
    """Its bucket stands for nothing: it must be all but impossible, and finite."""
    from nemo_ee.modeling.first_weights.exit_init import initialise_projections

    gpt = build(dict(mlp=False, linear=True, projection="shortlist", shortlist_size=VOCABULARY))
    initialise_projections(gpt, torch.arange(VOCABULARY), None)
    fit(gpt)
    projection = gpt.exits["3"].projection
    _, final = collect(gpt)
    bucket = final @ projection.bucket_weight + projection.bucket_bias
    assert torch.isfinite(projection.bucket_weight).all() and bucket.max() < -50


def test_projections_copy_the_output_weight_or_are_noise():
    from nemo_ee.modeling.first_weights.exit_init import initialise_projections, initialise_randomly

    gpt = build(dict(linear=True, projection="untied"))
    initialise_projections(gpt, None, None)
    for n in ("3", "8"):
        torch.testing.assert_close(gpt.exits[n].projection.weight, gpt.output_weight())
    initialise_projections(gpt, None, 0.02)
    initialise_randomly(gpt, 0.02)
    first = gpt.exits["3"].linear.weight.clone()
    initialise_randomly(gpt, 0.02, seed=1)
    assert not torch.equal(gpt.exits["3"].linear.weight, first)
    drawn = [gpt.exits[n].projection.weight[:VOCABULARY] for n in ("3", "8")]
    drawn += [gpt.exits[n].linear.weight for n in ("3", "8")]
    for noise in drawn:
        assert noise.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(noise.mean().item()) < 0.002
    for i, one in enumerate(drawn):
        for other in drawn[i + 1 :]:
            both = torch.stack([one[:64].flatten(), other[:64].flatten()])
            assert abs(torch.corrcoef(both)[0, 1].item()) < 0.1, "exits and modules start differently"


def write_base(source: str, path: str) -> None:
    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

    convert_to_nemo(source, path)


EXITS = {
    "layers": [1, 3],
    "init": "copy",
    "head": {"block": True, "mlp": True, "norm": True, "linear": True, "projection": "untied"},
}


def copied(base: str, tp: int, pp: int, linear: bool = True) -> dict[str, torch.Tensor]:
    """This stage's exits of a model that was restored with exits to copy."""
    from nemo_ee.models.megatron_gpt_ee_tuning_model import MegatronGPTEETuningModel as Model
    from tests.support.tuning import restored_for_tuning, whole_exits

    exits = {**EXITS, "head": {**EXITS["head"], "linear": linear}}
    model = restored_for_tuning(Model, base, exits, tp, pp)
    model.initialise_exits()
    return whole_exits(model.gpt)


@pytest.fixture(scope="module")
def base(tmp_path_factory, workers) -> Path:
    folder = tmp_path_factory.mktemp("base")
    source = tiny_llama.write(folder / "hf")
    workers(1).run(write_base, str(source), str(folder / "base.nemo"))
    return folder / "base.nemo"


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_copies_are_the_backbones_tensors(base, workers, tmp_path, tp, pp):
    from nemo_ee.checkpoint import archive
    from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint

    weights = TorchDistCheckpoint(archive.extract(base, tmp_path / "content") / archive.WEIGHTS_DIRECTORY)
    exits: dict[str, torch.Tensor] = {}
    for stage in workers(tp * pp).run(copied, str(base), tp, pp):
        exits |= stage
    last, layers = 3, "model.decoder.layers."

    def stored(name: str, layer: int | None = None) -> torch.Tensor:
        return weights.read(name, layer)

    names = {
        "self_attention.linear_qkv.weight": "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight": "self_attention.linear_proj.weight",
        "mlp.linear_fc1.weight": "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight": "mlp.linear_fc2.weight",
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    for n in EXITS["layers"]:
        for mine, theirs in names.items():
            torch.testing.assert_close(
                exits[f"{n}.block.{mine}"], stored(layers + theirs, last), rtol=0, atol=0
            )
        own = stored(f"{layers}mlp.linear_fc1.weight", n - 1)
        torch.testing.assert_close(exits[f"{n}.mlp.mlp.linear_fc1.weight"], own, rtol=0, atol=0)
        assert not exits[f"{n}.mlp.mlp.linear_fc2.weight"].any(), "added to a normed state, not to a residual"
        gain = stored(f"{layers}mlp.linear_fc1.layer_norm_weight", n - 1)
        torch.testing.assert_close(exits[f"{n}.mlp.norm.weight"], gain, rtol=0, atol=0)
        final = stored("model.decoder.final_layernorm.weight")
        torch.testing.assert_close(exits[f"{n}.norm.weight"], final, rtol=0, atol=0)
        rows = stored("model.embedding.word_embeddings.weight")[:100]
        torch.testing.assert_close(exits[f"{n}.projection.weight"], rows, rtol=0, atol=0)
        torch.testing.assert_close(exits[f"{n}.linear.weight"], torch.eye(32), rtol=0, atol=0)


def test_a_residual_mlp_is_copied_whole(base, workers, tmp_path):
    from nemo_ee.checkpoint import archive
    from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint

    weights = TorchDistCheckpoint(archive.extract(base, tmp_path / "content") / archive.WEIGHTS_DIRECTORY)
    (exits,) = workers(1).run(copied, str(base), 1, 1, False)
    for n in EXITS["layers"]:
        own = weights.read("model.decoder.layers.mlp.linear_fc2.weight", n - 1)
        torch.testing.assert_close(exits[f"{n}.mlp.mlp.linear_fc2.weight"], own, rtol=0, atol=0)
