"""The numbers of a report equal those of a fabricated run."""

from collections.abc import Callable

import pytest

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.report.projection import project_run
from mixtera_hpc.report.run_metrics import load_run_metrics
from mixtera_hpc.report.scaling.scaling_table import scaling_table
from mixtera_hpc.report.summary import summarize_run

RunMaker = Callable[..., RunFolder]


def test_sums_and_losses_ignore_steps_that_were_repeated(make_run: RunMaker) -> None:
    summary = summarize_run(load_run_metrics(make_run(["en", "de"], [(0, 10), (8, 40)], num_steps=50, num_nonfinite=1)))
    assert (summary.steps, summary.num_steps, summary.num_attempts) == (40, 50, 2)
    assert summary.tokens == 40 * 200
    assert summary.num_nonfinite == 40
    assert summary.loss_first == pytest.approx(10.5)
    assert summary.loss_last == pytest.approx(10.5 - 0.385)  # Mean of the last twentieth: steps 38 and 39.
    en, de = summary.domains
    assert (en.tokens, en.served_share, de.served_share) == (4000, 0.5, 0.5)
    assert (en.weight_first, en.weight_last) == (0.5, 0.5)
    assert de.epochs == pytest.approx(2 * 36 / 100)
    assert de.loss_last == pytest.approx(11 - 0.385)


def test_performance_excludes_the_first_line_of_every_attempt(make_run: RunMaker) -> None:
    performance = summarize_run(load_run_metrics(make_run(["en", "de"], [(0, 10), (8, 20)], num_ranks=4))).performance
    assert (performance.num_ranks, performance.num_nodes) == (4, 1)
    assert performance.tokens_per_s == pytest.approx(400)
    assert performance.step_p95_s == pytest.approx(0.5)
    assert performance.data_wait_share == pytest.approx(0.1)
    assert performance.data_wait_p99_share == pytest.approx(0.1)
    assert performance.start_wait_s == 4.0
    assert (performance.broadcast_p50_s, performance.reduce_p95_s) == (pytest.approx(2e-3), pytest.approx(3e-3))


def test_a_run_of_one_step_has_a_step_time(make_run: RunMaker) -> None:
    assert summarize_run(load_run_metrics(make_run(["en"], [(0, 1)]))).performance.step_p50_s == 5.0


def test_values_that_were_not_recorded_are_none(make_run: RunMaker) -> None:
    run = make_run(["en"], [(0, 4)], with_mixture=False)
    (run.metrics / "comm.jsonl").unlink()
    summary = summarize_run(load_run_metrics(run))
    assert summary.domains[0].weight_last is summary.domains[0].epochs is None
    assert summary.performance.broadcast_p50_s is summary.performance.reduce_p50_s is None


def test_a_domain_absent_at_the_end_keeps_its_last_loss(make_run: RunMaker) -> None:
    run = make_run(["en", "de"], [(0, 40)])
    path = run.metrics / "steps.jsonl"
    lines = path.read_text().splitlines()
    for i in range(10, 40):
        lines[i] = lines[i].replace('"domain_tokens":[100,100]', '"domain_tokens":[100,0]')
        lines[i] = lines[i].replace(f",{11 - i / 100}]", ",null]")
    path.write_text("\n".join(lines) + "\n")
    assert summarize_run(load_run_metrics(run)).domains[1].loss_last == pytest.approx(11 - 0.09)


def test_the_projection_continues_at_the_rate_of_the_last_quarter(make_run: RunMaker) -> None:
    metrics = load_run_metrics(make_run(["en", "de"], [(0, 20)], num_steps=100, max_epochs=1.5))
    projection = project_run(metrics, summarize_run(metrics))
    assert (projection.remaining_steps, projection.remaining_s, projection.total_tokens) == (80, 40.0, 20_000)
    de, en = projection.domains
    assert (de.name, de.epochs, de.exhausted_at_step) == ("de", pytest.approx(2.0), 75)
    assert (en.name, en.epochs, en.exhausted_at_step) == ("en", pytest.approx(1.0), None)


def test_a_domain_that_has_reached_its_limit_names_the_step_when_it_did(make_run: RunMaker) -> None:
    """Epochs are recorded every 4 steps: those of `de` grow by 0.02 per step, those of `en` by 0.01."""
    metrics = load_run_metrics(make_run(["en", "de"], [(0, 20)], num_steps=100, max_epochs=0.1))

    de, en = project_run(metrics, summarize_run(metrics)).domains

    assert (de.exhausted_at_step, en.exhausted_at_step) == (8, 12)


def test_a_finished_run_has_no_remaining_steps(make_run: RunMaker) -> None:
    metrics = load_run_metrics(make_run(["en"], [(0, 20)]))
    projection = project_run(metrics, summarize_run(metrics))
    assert (projection.remaining_steps, projection.remaining_s, projection.total_tokens) == (0, 0.0, 2000)


def test_efficiency_is_relative_to_the_run_with_the_fewest_ranks(make_run: RunMaker) -> None:
    eight = make_run(["en"], [(0, 8)], run_id="b", num_ranks=8, tokens_per_s=300.0)
    two = make_run(["en"], [(0, 8)], run_id="a", num_ranks=2, tokens_per_s=100.0)
    first, second = scaling_table([load_run_metrics(eight), load_run_metrics(two)])
    assert (first.run_id, first.speedup, first.efficiency) == ("a", 1.0, 1.0)
    assert (second.ranks, second.speedup, second.efficiency) == (8, pytest.approx(3.0), pytest.approx(0.75))
    assert second.tokens_per_s_per_rank == pytest.approx(37.5)


def test_the_summary_has_the_newest_held_out_loss_of_every_domain(make_run: RunMaker) -> None:
    summary = summarize_run(load_run_metrics(make_run(["a", "b"], [(0, 20)], validated_at=(5, 10))))
    assert summary.held_out_loss == pytest.approx(19.9)
    assert summary.domains[0].held_out_loss == pytest.approx(19.9)
    assert summary.domains[1].held_out_loss is None


def test_without_validation_there_is_no_held_out_loss(make_run: RunMaker) -> None:
    summary = summarize_run(load_run_metrics(make_run(["a", "b"], [(0, 20)])))
    assert summary.held_out_loss is None
    assert [domain.held_out_loss for domain in summary.domains] == [None, None]
