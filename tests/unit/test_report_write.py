# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A report survives the way to disk and back, and every picture holds what it should."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from nemo_ee.errors import DataError, OutputError
from nemo_ee.report import plots
from nemo_ee.report.markdown import to_markdown
from nemo_ee.report.sample_text import sample_figure, sample_html
from nemo_ee.report.schema import CurvePoint, Sample
from nemo_ee.report.style import layer_colours
from nemo_ee.report.write import write_report
from tests.support.fake_report import FINAL, fake_exits, fake_report, fake_threshold, read_report
from tests.support.full_disk import file_limit

FULL = {
    "exit_histogram.png",
    "loss_curves.png",
    "per_exit_loss.png",
    "report.json",
    "report.md",
    "sample_text.html",
    "sample_text.png",
    "speed_vs_agreement.png",
}


def one_exit_report():
    exits = tuple(replace(exit_, loss_ci=None, agreement_ci=None) for exit_ in fake_exits((20,)))
    threshold = replace(fake_threshold(0.7, (20,)), agreement_ci=None)
    return fake_report(exits=exits, final_loss_ci=None, thresholds=(threshold,), tuning_curve=(), samples=())


def names(directory):
    return {path.name for path in directory.iterdir()}


def test_round_trip_and_files(tmp_path):
    report = fake_report()
    written = write_report(report, tmp_path)
    assert names(tmp_path) == FULL == {path.name for path in written}
    assert read_report(tmp_path / "report.json") == report
    for name in FULL:
        if name.endswith(".png"):
            assert np.std(imread(tmp_path / name)) > 0.05, f"{name} is blank"
            assert name in (tmp_path / "report.md").read_text()


def test_plots_without_data_are_removed(tmp_path):
    write_report(fake_report(), tmp_path)
    write_report(one_exit_report(), tmp_path)
    assert names(tmp_path) == FULL - {"loss_curves.png", "sample_text.png", "sample_text.html"}
    assert "loss_curves" not in (tmp_path / "report.md").read_text()


def test_non_finite_numbers_are_named_and_nothing_is_written(tmp_path):
    bad = replace(fake_threshold(0.5), perplexity=float("inf"))
    with pytest.raises(DataError, match=r"report.thresholds\[1\].perplexity=inf"):
        write_report(fake_report(thresholds=(fake_threshold(0.3), bad)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shares_must_sum_to_one_and_samples_align():
    with pytest.raises(AssertionError, match="sum to"):
        replace(fake_threshold(0.5), share_per_exit={10: 0.5, FINAL: 0.4})
    with pytest.raises(AssertionError, match="one exit layer and confidence per token"):
        Sample("p", "0.5", ("a", "b"), (10,), (0.5, 0.5))


def test_curves_show_the_logged_points():
    axes = plots.loss_curves(fake_report()).axes
    lines = {line.get_label(): line for line in axes[0].get_lines()}
    assert list(lines) == ["exit 10", "exit 20", "layer 30 (final)"]
    expected = [point.loss for point in fake_report().tuning_curve if point.layer == 20]
    assert lines["exit 20"].get_ydata().tolist() == expected
    assert lines["exit 20"].get_xdata()[-1] == pytest.approx(102.4)
    assert len(axes) == 2 and len(axes[1].get_lines()) == 2


def test_curve_without_tokens_and_agreement_has_steps_and_one_panel():
    curve = (CurvePoint(5, 20, 4.0), CurvePoint(10, 20, 3.9), CurvePoint(10, None, 2.8))
    axes = plots.loss_curves(fake_report(tuning_curve=curve)).axes
    assert len(axes) == 1 and axes[0].get_xlabel() == "optimizer steps"
    assert axes[0].get_lines()[0].get_xdata().tolist() == [5, 10]


def test_speed_plot_has_a_labelled_point_per_threshold():
    figure = plots.speed_vs_agreement(fake_report())
    for axes in figure.axes:
        assert [text.get_text() for text in axes.texts] == ["0.3", "0.5", "0.6", "0.7", "0.8", "0.9", "1"]
    near = tuple(fake_at(0.9, f"{t:g}", t) for t in (0.9, 0.95))
    figure = plots.speed_vs_agreement(fake_report(thresholds=(fake_threshold(0.3), *near)))
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.3", "0.9, 0.95"]


def fake_at(like, name, *thresholds):
    return replace(fake_threshold(like), name=name, thresholds=thresholds)


def test_thresholds_per_exit_are_shown_beside_the_others(tmp_path):
    calibrated = fake_at(0.5, "calibrated (0.43, 1)", 0.43, 1.0)
    report = fake_report(thresholds=(*map(fake_threshold, (0.3, 0.9)), calibrated))
    page = to_markdown(report)
    assert page.count("| calibrated (0.43, 1) |") == 2 and "those of exits 10, 20" in page
    for axes in plots.speed_vs_agreement(report).axes:
        assert "calibrated (0.43, 1)" in [text.get_text() for text in axes.texts]
        line = axes.get_lines()[0]
        assert len(line.get_xdata()) == 2, "the line goes through thresholds that are one number"
    labels = [text.get_text() for text in plots.exit_histogram(report).axes[0].get_xticklabels()]
    assert labels == ["0.3", "0.9", "calibrated\n(0.43, 1)"]
    only = fake_report(thresholds=(calibrated,))
    write_report(only, tmp_path)
    assert read_report(tmp_path / "report.json") == only


def test_histogram_bars_are_the_shares():
    report = fake_report()
    axes = plots.exit_histogram(report).axes[0]
    heights = [bar.get_height() for bar in axes.patches[:3]]
    expected = [100 * report.thresholds[0].share_per_exit[layer] for layer in (10, 20, FINAL)]
    assert heights == pytest.approx(expected)


def test_layers_look_the_same_everywhere_and_differ_from_each_other():
    colours = layer_colours((5, 10, 15, 20, 25), FINAL)
    assert len(set(colours.values())) == 6
    assert layer_colours((20, FINAL), FINAL).keys() == {20, FINAL}


def test_an_exit_on_the_last_layer_is_not_called_the_final_exit():
    exits, both = (20, FINAL), f"layer {FINAL} (exit {FINAL} or final)"
    sample = Sample("p", "0.5", ("a",), (FINAL,), (0.5,))
    report = fake_report(
        exits=fake_exits(exits),
        thresholds=(replace(fake_threshold(0.5, (20,)), thresholds=(0.5, 0.5)),),
        tuning_curve=tuple(CurvePoint(5, layer, 4.0) for layer in (*exits, None)),
        samples=(sample,),
    )
    bars = plots.per_exit_loss(report).axes[0].get_xticklabels()
    assert [each.get_text() for each in bars] == ["exit 20", f"exit {FINAL}", f"layer {FINAL}\n(final)"]
    lines = [line.get_label() for line in plots.loss_curves(report).axes[0].get_lines()]
    assert lines == ["exit 20", f"exit {FINAL}", f"layer {FINAL} (final)"]
    assert [each.get_text() for each in plots.exit_histogram(report).legends[0].texts] == [both, "exit 20"]
    assert f"| threshold | exit 20 | {both} |" in to_markdown(report)
    assert f'title="{both}, confidence' in sample_html(report)


def test_html_escapes_and_names_the_exit_of_each_token():
    sample = Sample("<script>", "0.5", ("<b>", "&\n"), (10, FINAL), (0.75, 0.5))
    page = sample_html(fake_report(samples=(sample,)))
    assert "<script>" not in page and "<b>" not in page
    assert "&lt;script&gt;" in page and ">&lt;b&gt;</span>" in page
    assert (
        'title="exit 10, confidence 0.750"' in page and 'title="layer 30 (final), confidence 0.500"' in page
    )


def test_sample_picture_keeps_text_and_order_and_wraps():
    report = fake_report()
    drawn = [text.get_text() for text in sample_figure(report).axes[0].texts]
    text = "".join(report.samples[0].tokens).replace("\n", "\u21b5").replace("\u65e5\u672c", "\u25a1\u25a1")
    assert "".join(drawn[2:]) == text
    long = Sample("p" * 300, "0.5", ("word " * 40, "x" * 200), (10, 20), (0.5, 0.5))
    picture = sample_figure(fake_report(samples=(long,)))
    assert max(len(text.get_text()) + text.get_position()[0] for text in picture.axes[0].texts) <= 92


def test_markdown_states_numbers_with_their_spread():
    page = to_markdown(fake_report())
    assert "| 20 | 4.000 [3.920, 4.090] | 0.510 [0.498, 0.521] |  | 0.460 | 20,480 |" in page
    assert "| 0.5 | 0.750 [0.730, 0.765] | 8.60 (4.10) | 19.2 (18.7 to 19.8) |" in page
    assert "a=1\\|2" in page, "a bar inside a cell would end it"
    assert "| 20 | 4.000 | 0.510 |" in to_markdown(one_exit_report())


def test_a_full_disk_leaves_the_old_report(tmp_path):
    write_report(fake_report(), tmp_path / "report")
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    with file_limit(1000), pytest.raises(OutputError, match="report.json: cannot be written"):
        write_report(one_exit_report(), tmp_path / "report")
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before
    with file_limit(1000), pytest.raises(OutputError):
        write_report(one_exit_report(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
