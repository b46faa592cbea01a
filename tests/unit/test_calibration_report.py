# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Settings, documents, reliability and the report of a calibration."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from omegaconf import OmegaConf
from PIL import Image
from sklearn.calibration import calibration_curve

from nemo_ee.calibration import plots
from nemo_ee.calibration.calibrate import check_enough, exits_in_use, make_report
from nemo_ee.calibration.documents import Documents, continue_documents, read_chats, read_documents
from nemo_ee.calibration.exit_decisions import TokenScores
from nemo_ee.calibration.markdown import summary
from nemo_ee.calibration.reliability import measure_reliability
from nemo_ee.calibration.scoring import score_documents
from nemo_ee.calibration.settings import CalibrationConfig, CalibrationTextConfig
from nemo_ee.calibration.threshold_choice import Requirement, certify, estimate, plan
from nemo_ee.calibration.write import write_report
from nemo_ee.checkpoint.archive import CONFIG_NAME
from nemo_ee.errors import ConfigError, DataError
from nemo_ee.evaluation.teacher_forced import ExitScores, TextScores
from tests.support.calibration_population import LARGEST, made_up_prices, population
from tests.support.fake_report import fake_metadata

CONF = Path(__file__).resolve().parents[2] / "conf"
GIVEN = {"gpt_model_file": "m.nemo", "output_file": "out.nemo", "data": {"prefix": "text"}}


def test_the_shipped_configuration_is_valid_and_shows_the_defaults():
    with initialize_config_dir(str(CONF), version_base=None):
        composed = compose("calibrate_early_exit", ["gpt_model_file=m", "output_file=o", "data.prefix=text"])
    values = OmegaConf.to_container(composed)
    precision = values.pop("trainer")["precision"]
    config = CalibrationConfig.from_dict({**values, "precision": precision})
    assert config == CalibrationConfig("m", "o", CalibrationTextConfig("text"))
    assert config.source == "m"
    assert dataclasses.replace(config, adapter_file="exits").source == "exits"


def test_settings_report_every_fault():
    values = {
        **GIVEN,
        "target_agreement": 1.0,
        "delta": 0,
        "exits": [6, 2],
        "levels": 0,
        "bins": -1,
        "seed": -1,
        "data": {"prefix": "text", "documents": 0, "tuning_share": 1.0},
    }
    with pytest.raises(ConfigError) as error:
        CalibrationConfig.from_dict(values)
    for part in (
        "target_agreement=1.0: must lie between 0 and 1",
        "delta=0.0",
        "exits=[6, 2]: must name exit layers in ascending order, each once; write [2, 6]",
        "levels=0",
        "bins=-1",
        "seed=-1",
        "data.documents=0",
        "data.tuning_share=1.0",
    ):
        assert part in str(error.value)
    with pytest.raises(ConfigError) as error:
        CalibrationConfig.from_dict({**GIVEN, "output_file": "???", "target": 0.9, "exits": []})
    assert "target=0.9: unknown key" in str(error.value)
    assert "output_file=null: is required" in str(error.value)
    with pytest.raises(ConfigError, match="exits=.*write null"):
        CalibrationConfig.from_dict({**GIVEN, "exits": []})


def write_text(prefix, documents):
    """Documents of sequences of token ids."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for sequences in documents:
        builder.add_document(np.concatenate(sequences), [len(each) for each in sequences])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_documents_are_whole_units_of_text(tmp_path):
    """A document of several sequences is one; one of a single token says nothing."""
    texts = [[np.arange(5)], [[77]], [np.arange(10, 13), np.arange(13, 30)], [np.arange(50, 52)]]
    prefix = write_text(tmp_path / "text", texts)
    found = read_documents(prefix, 99, 8, 100, seed=0)
    assert found.available == 3
    assert sorted(ids.tolist() for ids in found.tokens) == [[0, 1, 2, 3, 4], [*range(10, 19)], [50, 51]]
    assert sorted(found.sizes.tolist()) == [1, 4, 8]
    first, second = (read_documents(prefix, 2, 8, 100, seed=seed) for seed in (1, 1))
    assert [a.tolist() for a in first.tokens] == [b.tolist() for b in second.tokens] and len(
        first.tokens
    ) == 2
    with pytest.raises(DataError, match="token ids from 0 to 59, has 0 to 77"):
        read_documents(prefix, 2, 8, 60, seed=0)
    with pytest.raises(DataError, match="data.prefix=.*missing.bin does not exist"):
        read_documents(str(tmp_path / "missing"), 2, 8, 60, seed=0)
    single = write_text(tmp_path / "single", [[[1]], [[2]], [[3]]])
    with pytest.raises(DataError, match="data.prefix=.*single: no document has two tokens"):
        read_documents(single, 2, 8, 60, seed=0)


def test_batches_hold_every_document_once():
    documents = Documents(tuple(np.arange(n) + 1 for n in (5, 2, 9, 3, 7)), 5)
    seen = {}
    for numbers, ids in documents.batches(2):
        assert ids.shape[1] == max(documents.sizes[numbers]) + 1
        seen |= dict(zip(numbers, ids.tolist(), strict=True))
    assert sorted(seen) == [0, 1, 2, 3, 4]
    for number, ids in seen.items():
        assert [i for i in ids if i] == documents.tokens[number].tolist()


def test_scores_are_in_the_order_of_documents():
    """A made-up model: exit 2's confidence is the token id / 100, and it is wrong at even tokens."""

    def score(tokens, labels):
        assert torch.equal(tokens[:, 1:], labels[:, :-1])
        final = ExitScores(tokens, tokens, tokens, tokens)
        exits = {n: ExitScores(tokens + (tokens % n == 0), tokens / 100, tokens, tokens) for n in (2, 3)}
        return TextScores(final, exits)

    documents = Documents(tuple(np.arange(start, start + n) for start, n in ((1, 5), (40, 2), (7, 4))), 3)
    counts = []
    scores = score_documents(score, documents, (2, 3), 9, 2, counts.append)
    assert counts == [2, 1] and scores.layers == (2, 3) and scores.depths.tolist() == [2, 3, 9]
    tokens = np.array([1, 2, 3, 4, 40, 7, 8, 9])
    assert scores.documents.tolist() == [0, 0, 0, 0, 1, 2, 2, 2]
    assert scores.confidences == pytest.approx(np.stack([tokens / 100] * 2))
    assert np.array_equal(scores.disagrees, [tokens % 2 == 0, tokens % 3 == 0])


def test_scores_that_are_no_numbers_are_refused():
    """All exits of a model that overflows would agree, on nothing."""

    def score(tokens, labels):
        broken = ExitScores(0 * tokens, tokens / 0.0 - tokens / 0.0, tokens, tokens)
        return TextScores(broken, {2: broken})

    documents = Documents((np.arange(1, 5), np.arange(1, 4)), 2)
    with pytest.raises(DataError, match="exit 2: its confidence is not finite at 5 of 5 tokens"):
        score_documents(score, documents, (2,), 9, 2)


def test_a_checkpoint_that_uses_no_exits_is_asked_which(tmp_path):
    early_exit = {"layers": [2, 4], "inference": {"exits": []}}
    OmegaConf.save(
        {"num_layers": 8, "encoder_seq_length": 256, "early_exit": early_exit}, tmp_path / CONFIG_NAME
    )
    config = CalibrationConfig.from_dict({**GIVEN, "gpt_model_file": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"exits=null: the checkpoint uses none of its exits \[2, 4\]"):
        exits_in_use(config)
    assert exits_in_use(dataclasses.replace(config, exits=(4,))) == (4,)


@pytest.mark.parametrize(("documents", "enough"), [(81, False), (83, True)])
def test_too_little_text_is_refused_with_the_number_needed(documents, enough):
    """62 full documents certify 0.95 at 0.05, and they are three quarters of 83."""
    sizes, requirement = np.full(documents, 128), Requirement(0.95, 0.05, 128)
    config = CalibrationConfig.from_dict(GIVEN)
    check_enough(dataclasses.replace(config, guarantee=False), sizes, documents, requirement)
    if enough:
        check_enough(config, sizes, documents, requirement)
        return
    with pytest.raises(DataError) as error:
        check_enough(config, sizes, documents, requirement)
    assert "data.documents=81: 61 test documents cannot certify target_agreement=0.95" in str(error.value)
    assert "that takes 62 of these lengths, so 83 in all" in str(error.value)
    assert "give more text" in str(error.value) and "guarantee=false" in str(error.value)
    with pytest.raises(DataError, match="the text has 500: raise data.documents"):
        check_enough(config, sizes, 500, requirement)


def test_reliability_equals_a_loop_over_tokens():
    scores = population(0, documents=30)
    for row, exit_ in enumerate(measure_reliability(scores, 4, seed=0)):
        error = 0.0
        for number, each in enumerate(exit_.bins):
            low, high = number / 4, (number + 1) / 4
            inside = [
                token
                for token, value in enumerate(scores.confidences[row])
                if (low < value <= high) or (number == 0 and value == 0.0)
            ]
            agreed = [not scores.disagrees[row, token] for token in inside]
            sure = [scores.confidences[row, token] for token in inside]
            assert (each.low, each.high, each.tokens) == (low, high, len(inside))
            assert each.agreement == pytest.approx(np.mean(agreed))
            assert each.mean_confidence == pytest.approx(np.mean(sure))
            assert each.agreement_ci.low <= each.agreement <= each.agreement_ci.high
            error += len(inside) / len(scores.documents) * abs(np.mean(agreed) - np.mean(sure))
        assert exit_.ece == pytest.approx(error) and exit_.layer == scores.layers[row]
        assert sum(each.tokens for each in exit_.bins) == len(scores.documents)
        assert exit_.agreement == pytest.approx(1 - scores.disagrees[row].mean())


@pytest.mark.parametrize("bins", [1, 7, 20])
def test_reliability_is_the_calibration_curve_of_scikit_learn(bins):
    scores = population(1, documents=40)
    for row, exit_ in enumerate(measure_reliability(scores, bins, seed=0)):
        agreements, confidences = calibration_curve(
            ~scores.disagrees[row], scores.confidences[row], n_bins=bins
        )
        filled = [each for each in exit_.bins if each.tokens]
        assert [each.agreement for each in filled] == pytest.approx(list(agreements))
        assert [each.mean_confidence for each in filled] == pytest.approx(list(confidences))


def test_bins_without_tokens_and_of_one_document():
    sure = TokenScores(
        (2,), 4, np.array([[0.95, 0.97, 1.0000001]]), np.zeros((1, 3), dtype=bool), np.zeros(3, int)
    )
    (exit_,) = measure_reliability(sure, 2, seed=0)
    assert exit_.bins[0].tokens == 0 and exit_.bins[0].agreement is None
    assert exit_.bins[1].tokens == 3 and exit_.bins[1].agreement == 1.0 and exit_.bins[1].agreement_ci is None


def report_of(target, **changes):
    people = population(5, documents=120)
    requirement, prices = Requirement(target, 0.1, LARGEST), made_up_prices()
    tuning, test = people.of_documents(range(30)), people.of_documents(range(30, 120))
    data = {"prefix": "text", "seq_length": LARGEST}
    values = {**GIVEN, "data": data, "target_agreement": target, "bins": 5, "delta": 0.1, **changes}
    config = CalibrationConfig.from_dict(values)
    if config.guarantee:
        choice = certify(plan(tuning, requirement, 12, 90, prices), test, requirement, prices)
    else:
        test, choice = people, estimate(people, requirement, 12, prices)
    return make_report(config, fake_metadata(), people, test, choice, prices), choice


PLOTS = {"frontier.png", "path_exits.png", "reliability_exit_10.png", "reliability_exit_20.png"}


def test_report_says_what_is_promised(tmp_path):
    report, choice = report_of(0.8)
    assert report.thresholds == choice.chosen.planned.thresholds and 0 < report.kept < len(report.path)
    assert report.guaranteed and report.number <= report.kept
    assert report.tuning.documents == 30 and report.test.documents == 90
    assert report.chosen.agreement == choice.chosen.outcome.agreement
    assert report.agreement_ci.low < report.chosen.agreement < report.agreement_ci.high
    assert report.chosen.agreement_bound >= 0.8 - 1e-6
    assert report.chosen.speedup == max(point.speedup for point in report.path[: report.kept]) > 1.0
    assert sum(report.chosen.share_per_exit.values()) == pytest.approx(1.0)
    assert report.prices.full_depth == pytest.approx(34.3) and report.prices.heads == {10: 1.0, 20: 1.0}
    written = write_report(report, tmp_path / "report")
    assert {path.name for path in written} == PLOTS | {"calibration.json", "calibration.md"}
    for name in PLOTS:
        with Image.open(tmp_path / "report" / name) as image:
            assert min(image.size) > 400 and len(image.convert("RGB").getcolors(1 << 20)) > 20, "drawn on"
    values = json.loads((tmp_path / "report" / "calibration.json").read_text())
    assert values["thresholds"] == list(report.thresholds) and values["version"] == 2
    assert values["path"][0]["share_per_exit"].keys() == {"10", "20", "30"}
    page = (tmp_path / "report" / "calibration.md").read_text()
    for part in (report.promise, "(chosen)", "teacher-forced", "independent draws", "speed-up", *PLOTS):
        assert part in page
    assert f"| a token at full depth | {1000 * report.prices.full_depth:.3f} |" in page
    for part in ("at least 90 %", "90 test documents", "at least 0.8", "at most 0.2", "whichever exits"):
        assert part in report.promise
    assert f"exit 10: threshold {report.thresholds[0]:g}" in summary(report)


def test_a_point_estimate_is_named_so_everywhere(tmp_path):
    report, choice = report_of(0.8, guarantee=False, delta=0.05)
    assert not report.guaranteed and report.delta is None and report.tuning.documents == 0
    assert report.test.documents == 120 and report.chosen.agreement >= 0.8
    assert report.chosen.p_value is None and report.chosen.agreement_bound is None
    write_report(report, tmp_path)
    page = (tmp_path / "calibration.md").read_text()
    for text in (page, summary(report), report.promise):
        assert "Point estimate, no guarantee" in text and "With a probability" not in text
    assert "no guarantee" in page.partition("target agreement |")[2].partition("\n")[0]
    labels = [each.get_label() for each in plots.frontier(report).axes[0].get_lines()]
    assert "chosen (point estimate, no guarantee)" in labels and not any("bound" in each for each in labels)
    failed, _ = report_of(0.9999, guarantee=False, delta=0.05)
    assert (
        failed.number == 0
        and "no thresholds that beat full depth" in failed.promise
        and failed.thresholds == (1.0, 1.0)
    )


def test_settings_that_would_mean_nothing_are_refused():
    for changes, words in (
        ({"guarantee": False, "delta": 0.1}, "delta=0.1: means nothing with guarantee=false"),
        ({"guarantee": False, "data": {"prefix": "t", "tuning_share": 0.5}}, "data.tuning_share=0.5: means"),
        ({"data": {}}, "data.prefix=null: either this or data.chats_file"),
        ({"data": {"prefix": "t", "chats_file": "c"}}, "data.prefix=t: either this or data.chats_file"),
        (
            {"data": {"chats_file": "c", "prompt_tokens": 4}},
            "data.prompt_tokens=4: answers of data.chats_file",
        ),
        ({"data": {"prefix": "t", "prompt_tokens": 0}}, "data.prompt_tokens=0: must be positive"),
        ({"weights": "int8"}, "weights=int8: not one of native, bf16"),
    ):
        with pytest.raises(ConfigError) as error:
            CalibrationConfig.from_dict({**GIVEN, **changes})
        assert words in str(error.value)


def test_the_frontier_is_drawn_point_by_point():
    report, _ = report_of(0.8)
    measured, bound, target, chosen = plots.frontier(report).axes[0].get_lines()
    assert list(measured.get_xdata()) == [1.0, *(point.speedup for point in report.path)]
    assert list(measured.get_ydata()) == [1.0, *(point.agreement for point in report.path)]
    assert list(bound.get_ydata())[1:] == [point.agreement_bound for point in report.path]
    assert (chosen.get_xdata()[0], chosen.get_ydata()[0]) == (report.chosen.speedup, report.chosen.agreement)
    assert list(target.get_ydata()) == [0.8, 0.8]


def test_report_where_nothing_is_certified(tmp_path):
    stale = tmp_path / "reliability_exit_7.png"
    stale.touch()
    report, choice = report_of(0.999)
    assert choice.kept == 0 and report.thresholds == (1.0, 1.0) and report.chosen is None
    write_report(report, tmp_path)
    page = (tmp_path / "calibration.md").read_text()
    assert "No thresholds could be certified" in page and "With a probability" not in page
    assert "no token leaves early" in summary(report) and "threshold 1 (not asked)\n" in summary(report)
    assert not stale.exists() and (tmp_path / "reliability_exit_10.png").exists()


def test_report_of_a_path_without_points(tmp_path):
    people = population(5, documents=20)
    unsure = dataclasses.replace(people, confidences=people.confidences * 0)
    prices, old = made_up_prices(), tmp_path / "frontier.png"
    choice = certify([], unsure, Requirement(0.8, 0.1, LARGEST), prices)
    config = CalibrationConfig.from_dict(GIVEN)
    old.touch()
    report = make_report(config, fake_metadata(), unsure, unsure.of_documents(range(5, 20)), choice, prices)
    names = {path.name for path in write_report(report, tmp_path)}
    assert "path_exits.png" not in names and "reliability_exit_10.png" in names and not old.exists()
    assert "No thresholds make decoding faster" in report.promise


class Words:
    """A template: a token per letter; answers are what assistants say, and an end."""

    def tokens(self, messages, learnt):
        ids, mask = [], []
        for message, learn in zip(messages, learnt, strict=True):
            said = [ord(letter) for letter in message["content"]] + [0]
            ids, mask = ids + said, mask + [learn] * len(said)
        return ids, mask


def chat(*contents, **more):
    roles = ("user", "assistant") * len(contents)
    turns = [{"role": role, "content": each} for role, each in zip(roles, contents, strict=False)]
    return json.dumps({"messages": turns, **more})


def test_what_counts_of_chats_is_answers_behind_their_first_token(tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = [
        chat("ab", "cde"),
        chat("a", "b", "c", "defg"),
        chat("xy", "z", finish_reason="length"),
        chat("p", "qr"),
    ]
    path.write_text("\n".join(lines))
    found = read_chats(str(path), Words(), 9, 4, 20, seed=0)
    said = sorted("".join(map(chr, found.of(n, ids[1:]))) for n, ids in enumerate(found.tokens))
    assert said == ["\0efg", "de\0", "r\0"], "four at most; nothing of an answer of one token that was cut"
    assert found.available == 3 and sorted(found.sizes.tolist()) == [2, 3, 4]
    longest = max(found.tokens, key=len)
    assert "".join(map(chr, longest)) == "a\0b\0c\0defg", "nothing is read behind what counts"
    again = read_chats(str(path), Words(), 2, 4, 20, seed=0)
    assert [a.tolist() for a in again.tokens] == [a.tolist() for a in found.tokens[:2]]
    with pytest.raises(DataError, match="data.chats_file=.*no chat has an answer of two tokens within the 2"):
        read_chats(str(path), Words(), 9, 4, 2, seed=0)
    path.write_text('{"messages": []}\n')
    with pytest.raises(DataError, match="data.chats_file: .*line 1 has no list of turns"):
        read_chats(str(path), Words(), 9, 4, 20, seed=0)


def test_continued_documents_count_behind_their_first_token():
    documents = Documents(tuple(np.arange(n) + 10 * n for n in (6, 3, 9, 5)), 4)
    calls = []

    def generate(prompts, tokens):
        calls.append((len(prompts), tokens))
        return [[prompt[0] + 1000 + i for i in range(1 if prompt[0] == 50 else tokens)] for prompt in prompts]

    found = continue_documents(documents, 4, 3, 2, generate)
    assert calls == [(2, 4), (1, 4)], "the document of three tokens is too short"
    assert [ids.tolist() for ids in found.tokens] == [
        [60, 61, 62, 63, 1060, 1061, 1062, 1063],
        [90, 91, 92, 93, 1090, 1091, 1092, 1093],
    ], "one that ends after a token is left out"
    assert [found.of(n, ids[1:]).tolist() for n, ids in enumerate(found.tokens)] == [
        [1061, 1062, 1063],
        [1091, 1092, 1093],
    ]
    with pytest.raises(DataError, match="data.prompt_tokens=9"):
        continue_documents(documents, 9, 3, 2, generate)


def test_it_runs_in_one_process(tmp_path, monkeypatch):
    from nemo_ee.calibration import calibrate as module

    monkeypatch.setattr(module, "exits_in_use", lambda config: (2,))
    monkeypatch.setattr(module, "ThresholdStore", lambda *arguments: None)
    prefix = write_text(tmp_path / "text", [[np.arange(9)]] * 200)
    data = {"prefix": prefix, "seq_length": 8}
    trainer = SimpleNamespace(world_size=2, num_devices=2, num_nodes=1)
    with pytest.raises(ConfigError, match="trainer.devices=2: .* runs in one process; set both to 1"):
        module.calibrate(CalibrationConfig.from_dict({**GIVEN, "data": data}), trainer)
