"""Plots: groups of domains, downsampling, number formats, and labels that do not overlap."""

from collections.abc import Callable

import numpy as np
import pytest

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.yaml_files import dump_yaml, load_yaml
from mixtera_hpc.report.canvas import Canvas, spread_labels
from mixtera_hpc.report.domain_groups import (
    MAX_GROUPS,
    group_domains,
    group_loss,
    sum_by_group,
)
from mixtera_hpc.report.downsample import even_indices, percentile_ranges, weighted_means
from mixtera_hpc.report.mixing.domain_names import common_property, shorten_names
from mixtera_hpc.report.number_format import format_count, format_duration, format_percent, format_seconds
from mixtera_hpc.report.plots import loss_plot
from mixtera_hpc.report.run_metrics import load_run_metrics

RunMaker = Callable[..., RunFolder]


@pytest.mark.parametrize(
    ("num_domains", "num_groups"), [(1, 1), (MAX_GROUPS + 1, MAX_GROUPS + 1), (40, MAX_GROUPS + 1)]
)
def test_every_domain_is_in_exactly_one_group(make_run: RunMaker, num_domains: int, num_groups: int) -> None:
    metrics = load_run_metrics(make_run([f"d{i}" for i in range(num_domains)], [(0, 5)]))
    groups = group_domains(metrics)
    assert len(groups) == num_groups
    assert sorted(d for group in groups for d in group.domains) == list(range(num_domains))
    assert len({group.color for group in groups}) == num_groups
    assert sum_by_group(groups, metrics.mixture.weights).sum(axis=1) == pytest.approx(1)


def test_the_loss_of_a_group_is_weighted_by_tokens_and_ignores_absent_domains(make_run: RunMaker) -> None:
    run = make_run([f"d{i}" for i in range(12)], [(0, 1)])
    path = run.metrics / "steps.jsonl"
    text = path.read_text().replace(
        "[" + ",".join(["100"] * 12) + "]", "[" + ",".join(["100"] * 10 + ["300", "0"]) + "]"
    )
    path.write_text(text.replace("20.0,21.0]", "20.0,null]"))
    metrics = load_run_metrics(run)
    (other,) = [group for group in group_domains(metrics) if group.color == MAX_GROUPS]
    loss_sum, tokens = group_loss(other, metrics.steps.domain_loss, metrics.steps.domain_tokens)
    assert other.domains == (9, 10, 11)
    assert (loss_sum[0], tokens[0]) == (19 * 100 + 20 * 300, 400)


def test_the_common_property_is_removed_from_names() -> None:
    assert shorten_names(["source=C4", "source=Book"]) == ["C4", "Book"]
    assert common_property(["source=C4", "source=Book"]) == "source"
    assert shorten_names(["source=C4", "language=en"]) == ["source=C4", "language=en"]
    assert shorten_names(["everything"]) == ["everything"]


def test_names_with_several_properties_keep_only_the_values() -> None:
    names = ["source=Stack Exchange language=de", "source=C4 language=en|fr"]
    assert common_property(names) == "source · language"
    assert shorten_names(names) == ["Stack Exchange · de", "C4 · en|fr"]
    assert common_property([*names, "source=C4"]) is None
    assert shorten_names([*names, "source=C4"]) == [*names, "source=C4"]


@pytest.mark.parametrize("size", [1, 2, 7, 13, 30])
def test_labels_keep_their_order_and_a_minimum_gap(size: int) -> None:
    preferred = np.random.Generator(np.random.Philox(size)).random(size)
    placed = spread_labels(preferred, 0.07)
    gaps = np.diff(np.sort(placed))
    assert np.array_equal(np.argsort(placed), np.argsort(preferred))
    assert placed.min() >= 0
    assert placed.max() <= 1 + 1e-9
    assert (gaps >= min(0.07, 1 / max(size - 1, 1)) - 1e-9).all()


def test_labels_with_enough_room_are_not_moved() -> None:
    assert spread_labels(np.array([0.9, 0.1, 0.5]), 0.07) == pytest.approx([0.9, 0.1, 0.5])


def test_weighted_means_keep_the_mean_and_skip_nan() -> None:
    values = np.where(np.arange(1000) % 10 == 0, np.nan, np.arange(1000.0))
    x, means = weighted_means(np.arange(1000), values, np.ones(1000), max_points=50)
    assert len(x) == len(means) == 50
    assert means.mean() == pytest.approx(np.nanmean(values))
    assert x == pytest.approx(means)


def test_percentile_ranges_contain_the_median_and_even_indices_keep_both_ends() -> None:
    x, low, median, high = percentile_ranges(np.arange(900), np.arange(900.0) % 9, max_points=100)
    assert len(x) == 100
    assert (low < median).all()
    assert (median == 4).all()
    assert (high > median).all()
    assert even_indices(1000, 10)[[0, -1]].tolist() == [0, 999]
    assert even_indices(3, 10).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_count(1234567), "1.23 M"),
        (format_count(9999), "9,999"),
        (format_count(0), "0"),
        (format_count(2.5), "2.50"),
        (format_count(999.9e9), "1,000 G"),
        (format_count(None), "–"),
        (format_percent(0.1234), "12.3 %"),
        (format_percent(0.00042), "0.04 %"),
        (format_percent(1), "100 %"),
        (format_percent(float("nan")), "–"),
        (format_seconds(64e-6), "64 µs"),
        (format_seconds(0.00234), "2.34 ms"),
        (format_seconds(0.255), "0.255 s"),
        (format_duration(45), "45 s"),
        (format_duration(720), "12 min"),
        (format_duration(11_100), "3 h 5 min"),
        (format_duration(187_200), "2 d 4 h"),
    ],
)
def test_numbers_are_formatted_for_people(text: str, expected: str) -> None:
    assert text == expected


def test_the_axes_count_tokens_where_steps_have_different_sizes(make_run: RunMaker) -> None:
    run = make_run(["a", "b"], [(0, 6), (6, 12)])
    config = load_yaml(run.config)
    config["dataplane"]["batch_schedule"] = [{"start": 3, "size": 16}]
    run.config.write_text(dump_yaml(config))
    metrics = load_run_metrics(run)
    assert metrics.progress_before(np.array([0, 3, 12])).tolist() == [0, 600, 2400]
    figure = loss_plot(metrics, Canvas(wide=True))
    assert figure is not None
    [axes] = figure.axes
    assert (axes.get_xlabel(), axes.get_xlim()) == ("tokens", (0, 2400))
    assert max(float(line.get_xdata()[-1]) for line in axes.lines[1:]) > 2000
