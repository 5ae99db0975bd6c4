"""What is drawn: grouped, thinned, readable numbers, names that do not touch."""

from collections.abc import Callable

import numpy as np
import pytest

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.report.canvas import spread
from mixtera_hpc.report.domain_groups import MAX_BANDS, bands_of, common_key, merged_loss, merged_sum, short_names
from mixtera_hpc.report.downsample import even_indices, percentile_ranges, weighted_means
from mixtera_hpc.report.number_format import format_count, format_duration, format_percent, format_seconds
from mixtera_hpc.report.run_metrics import load_run_metrics

RunMaker = Callable[..., RunFolder]


@pytest.mark.parametrize(("num_domains", "num_bands"), [(1, 1), (MAX_BANDS + 1, MAX_BANDS + 1), (40, MAX_BANDS + 1)])
def test_every_domain_is_in_exactly_one_band(make_run: RunMaker, num_domains: int, num_bands: int) -> None:
    record = load_run_metrics(make_run([f"d{i}" for i in range(num_domains)], [(0, 5)]))
    bands = bands_of(record)
    assert len(bands) == num_bands
    assert sorted(d for band in bands for d in band.domains) == list(range(num_domains))
    assert len({band.color for band in bands}) == num_bands
    assert merged_sum(bands, record.mixture.weights).sum(axis=1) == pytest.approx(1)


def test_the_loss_of_a_band_is_weighted_by_tokens_and_ignores_absent_domains(make_run: RunMaker) -> None:
    run = make_run([f"d{i}" for i in range(12)], [(0, 1)])
    path = run.metrics / "steps.jsonl"
    text = path.read_text().replace(
        "[" + ",".join(["100"] * 12) + "]", "[" + ",".join(["100"] * 10 + ["300", "0"]) + "]"
    )
    path.write_text(text.replace("20.0,21.0]", "20.0,null]"))
    record = load_run_metrics(run)
    (other,) = [band for band in bands_of(record) if band.color == MAX_BANDS]
    loss_sum, tokens = merged_loss(other, record.steps.domain_loss, record.steps.domain_tokens)
    assert other.domains == (9, 10, 11)
    assert (loss_sum[0], tokens[0]) == (19 * 100 + 20 * 300, 400)


def test_a_property_that_all_names_share_is_said_once() -> None:
    assert short_names(["source=C4", "source=Book"]) == ["C4", "Book"]
    assert common_key(["source=C4", "source=Book"]) == "source"
    assert short_names(["source=C4", "language=en"]) == ["source=C4", "language=en"]
    assert short_names(["everything"]) == ["everything"]


@pytest.mark.parametrize("size", [1, 2, 7, 13, 30])
def test_names_keep_their_order_and_their_distance(size: int) -> None:
    wanted = np.random.Generator(np.random.Philox(size)).random(size)
    placed = spread(wanted, 0.07)
    gaps = np.diff(np.sort(placed))
    assert np.array_equal(np.argsort(placed), np.argsort(wanted))
    assert placed.min() >= 0
    assert placed.max() <= 1 + 1e-9
    assert (gaps >= min(0.07, 1 / max(size - 1, 1)) - 1e-9).all()


def test_names_that_have_room_stay_where_they_belong() -> None:
    assert spread(np.array([0.9, 0.1, 0.5]), 0.07) == pytest.approx([0.9, 0.1, 0.5])


def test_thinning_keeps_the_mean_and_leaves_out_what_is_missing() -> None:
    values = np.where(np.arange(1000) % 10 == 0, np.nan, np.arange(1000.0))
    x, thinned = weighted_means(np.arange(1000), values, np.ones(1000), at_most=50)
    assert len(x) == len(thinned) == 50
    assert thinned.mean() == pytest.approx(np.nanmean(values))
    assert x == pytest.approx(thinned)


def test_ranges_hold_the_median_and_points_keep_both_ends() -> None:
    x, low, middle, high = percentile_ranges(np.arange(900), np.arange(900.0) % 9, at_most=100)
    assert len(x) == 100
    assert (low < middle).all()
    assert (middle == 4).all()
    assert (high > middle).all()
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
def test_numbers_read_well(text: str, expected: str) -> None:
    assert text == expected
