"""lora-fast reproduce: the two synthetic experiments reach the papers' numbers, the page has every row, and after a
failing experiment or Ctrl-C the other results remain."""

from __future__ import annotations

import importlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from lora_fast.batches.pairs import Pair
from lora_fast.cli import app
from lora_fast.cli.reproduce.experiments import (
    EXPERIMENTS,
    balora_factorisation,
    result,
    scalora_overhead,
    scalora_regression,
)

EASY = "scalora-regression"


def reproduce(folder, *options: str):
    return CliRunner().invoke(app, ["reproduce", "--output", str(folder), *options])


def results(folder) -> dict:
    return json.loads((folder / "reproduce.json").read_text())["experiments"]


def small_result(paper: float = 1.0, ours: float = 1.0) -> result.Result:
    plot = result.draw("a-plot", "A caption.", lambda axes: axes.plot([1, 2]))
    rows = [result.compared("a <row>", paper, ours), result.unmatched("another", "7")]
    return result.Result("A paper, Fig. 0", rows, [plot], ["A note."], {"numbers": [1, 2]})


def replace(monkeypatch, name: str, run) -> None:
    """Replaces the ``run`` of an experiment."""
    module = importlib.import_module(f"lora_fast.cli.reproduce.experiments.{EXPERIMENTS[name][0]}")
    monkeypatch.setattr(module, "run", run)


@pytest.fixture(scope="module")
def start():
    """Returns the regression problem, a draw of a, and L."""
    problem = scalora_regression.Problem.random(scalora_regression.SEED)
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(1, 8, 64, generator=generator, dtype=torch.float64) / 8
    return problem, a, float(torch.linalg.eigvalsh(problem.xx)[-1])


def within_two(ours: float, expected: float) -> bool:
    return expected / 2 <= ours <= 2 * expected


def test_the_regression_problem_is_the_expected_one(start):
    problem, _, smoothness = start
    expected = scalora_regression.EXPECTED
    curve = scalora_regression.full(problem, 1 / smoothness)
    assert round(smoothness) == 280
    assert curve[0] == pytest.approx(expected["start"], rel=1e-3)
    assert problem.floor() == pytest.approx(expected["floor"], rel=1e-3)
    for mark, value in zip(scalora_regression.MARKS, expected["full"], strict=True):
        assert curve[mark] == pytest.approx(value, rel=0.02)


@pytest.mark.parametrize("interval, rate, caution", [(1, 0.014, 1.0), (3, 0.009, 1.0), (10, 0.0055, 2.0)])
def test_scalora_descends_below_the_floor_of_lora_as_expected(start, interval, rate, caution):
    problem, a, smoothness = start
    run = scalora_regression.descend(problem, a, rate, smoothness * caution * rate, interval)
    expected = scalora_regression.EXPECTED[interval]
    assert within_two(float(run.gaps[0, -1]), expected[-1] if interval == 1 else expected)
    assert run.ranks[0] > scalora_regression.RANK
    lora = scalora_regression.descend(problem, a, 0.004, 0.0, 0)
    assert float(lora.gaps[0, -1]) >= problem.floor() - 1e-6 and lora.ranks[0] == scalora_regression.RANK


def test_scale_preserves_the_accumulated_weight(start):
    problem, a, smoothness = start
    b = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 8
    w = torch.zeros(1, 64, 64, dtype=torch.float64)
    g = b @ a @ problem.xx - problem.yx
    alpha, beta = scalora_regression.scale(w, a, b, b.mT @ g, g @ a.mT, smoothness * 0.01)
    assert torch.allclose(w + (alpha * b) @ (beta.mT * a), b @ a, rtol=0, atol=1e-12)
    assert float((alpha - 1).abs().max()) > 0.1


def test_a_diverging_start_does_not_affect_the_others(start):
    problem, a, _ = start
    alone = scalora_regression.descend(problem, a, 0.004, 0.0, 0)
    both = scalora_regression.descend(problem, torch.cat([a, 1e3 * a]), 0.004, 0.0, 0)
    assert math.isinf(both.gaps[1, -1]) and both.ranks[1] == 0
    assert torch.allclose(both.gaps[0], alone.gaps[0], rtol=1e-9)


def test_best_selects_the_best_run_of_each_start():
    gaps = [torch.tensor([[9.0, 1.0], [9.0, 8.0], [9.0, 3.0]]), torch.tensor([[9.0, 2.0], [9.0, 4.0], [9.0, math.inf]])]
    runs = [scalora_regression.Descent(gap, [5, 6, 7]) for gap in gaps]
    curve, rank, settings = scalora_regression.best(runs, [(0.1, 1.0), (0.2, 2.0)])
    assert curve == [9.0, 3.0] and rank == 6 and settings == (0.1, 1.0)


def test_balora_reaches_the_expected_gaps():
    problem = balora_factorisation.Problem.random(range(balora_factorisation.SEEDS))
    rates = torch.logspace(-4, -1, balora_factorisation.RATES, dtype=torch.float64)[40:48]  # around the best
    for gauge, expected in zip((None, "symmetric"), balora_factorisation.EXPECTED["GD"], strict=True):
        gaps = balora_factorisation.train(problem, rates, 100, gauge, balora_factorisation.descend)
        assert within_two(balora_factorisation.best(gaps[:, -1]), expected)


def test_adam_equals_torchs():
    problem = balora_factorisation.Problem.random(range(1))
    gaps = balora_factorisation.train(problem, torch.tensor([0.05]), 20, None, balora_factorisation.Adam)
    a = problem.a[0].clone().requires_grad_()
    b = torch.zeros(20, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([a, b], lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (0.5 * (b @ a - problem.z[0]).square().sum()).backward()
        optimizer.step()
    last = 0.5 * (b @ a - problem.z[0]).square().sum() - problem.floor[0]
    assert float(gaps[0, -1, 0]) == pytest.approx(last.item(), rel=1e-6)


@pytest.mark.parametrize(
    "row, verdict, met",
    [
        (result.compared("", 10, 19.9), "within a factor of two", True),
        (result.compared("", 10, 5.01), "within a factor of two", True),
        (result.compared("", 10, 30), "missed by ×3 (higher)", False),
        (result.compared("", 10, 2), "missed by ×5 (lower)", False),
        (result.compared("", 10, math.inf), "missed by any factor (higher)", False),
        (result.overhead("", 1.04, 1.30), "same order, other hardware", True),
        (result.overhead("", 1.04, 1.001), "less than in the paper, other hardware", True),
        (result.overhead("", 1.04, 0.99), "less than in the paper, other hardware", True),
        (result.overhead("", 1.04, 3.04), "missed by ×51, other hardware", False),
        (result.claim("", "yes", "no", False), "not as in the paper", False),
        (result.unmatched("", "7"), "no number to compare with", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_verdicts_of_rows(row, verdict, met):
    assert (row.verdict, row.met) == (verdict, met)


def test_number_formats_three_digits():
    shown = [result.number(value) for value in (0, 1.42, 0.026, 1331.4, 8e-5, 5e-11, 1.5e6, math.inf, math.nan)]
    assert shown == ["0", "1.42", "0.026", "1331", "8.0e-05", "5.0e-11", "1.5e+06", "diverged", "diverged"]


def test_over_lora_is_a_mean_over_the_steps_of_an_interval():
    assert scalora_overhead.over_lora(1, 1.0, 0.0, 0.5, 0.1) == pytest.approx(1.5)
    assert scalora_overhead.over_lora(4, 1.0, 0.0, 0.5, 0.1) == pytest.approx(1.2)


def test_column_share_counts_pairs_with_a_valid_unconstrained_optimum():
    generator = torch.Generator().manual_seed(0)
    adapters, valid = [], []
    for _ in range(20):
        a, b, g = (torch.randn(*shape, generator=generator).double() for shape in ((4, 6), (5, 4), (5, 6)))
        da, db = b.T @ g, g @ a.T
        cross = (da @ a.T).square()
        m = torch.cat([torch.cat([b.T @ b * (da @ da.T), cross], 1), torch.cat([cross.T, db.T @ db * (a @ a.T)], 1)])
        x = torch.linalg.solve(m, torch.cat([da.square().sum(1), db.square().sum(0)]))
        valid.append(bool((x >= 0).all()))
        a.grad, b.grad = da, db
        adapters.append(Pair("a pair", a, b))
    assert 0 < sum(valid) < 20
    assert scalora_overhead.column_share(adapters) == sum(valid) / 20


def test_page_has_every_row_plot_and_note(tmp_path, monkeypatch):
    replace(monkeypatch, EASY, lambda session: small_result(ours=5.0))
    shown = reproduce(tmp_path / "out", EASY)
    assert shown.exit_code == 0 and "missed by ×5" in shown.output
    page = (tmp_path / "out" / "reproduce.html").read_text()
    for part in ("a &lt;row&gt;", "missed by ×5 (higher)", "another", "A note.", "A caption.", "data:image/png", EASY):
        assert part in page
    assert "http://" not in page and "https://" not in page
    assert (tmp_path / "out" / "a-plot.png").read_bytes().startswith(b"\x89PNG")
    written = results(tmp_path / "out")[EASY]
    assert [row["met"] for row in written["rows"]] == [False, None] and written["data"] == {"numbers": [1, 2]}


def test_a_failing_experiment_is_reported_and_the_others_run(tmp_path, monkeypatch):
    def fail(session):
        raise ValueError("no such luck")

    replace(monkeypatch, EASY, fail)
    replace(monkeypatch, "balora-factorisation", lambda session: small_result())
    shown = reproduce(tmp_path / "out", EASY, "balora-factorisation")
    assert shown.exit_code == 1 and f"failed: {EASY}" in shown.output
    written = results(tmp_path / "out")
    assert "no such luck" in written[EASY]["error"] and written["balora-factorisation"]["error"] is None
    page = (tmp_path / "out" / "reproduce.html").read_text()
    assert "no such luck" in page and "a &lt;row&gt;" in page


def test_ctrl_c_keeps_the_finished_experiments(tmp_path, monkeypatch):
    def interrupt(session):
        raise KeyboardInterrupt

    replace(monkeypatch, EASY, lambda session: small_result())
    replace(monkeypatch, "balora-factorisation", interrupt)
    shown = reproduce(tmp_path / "out", EASY, "balora-factorisation")
    assert shown.exit_code == 130 and "1 of 2" in shown.output
    assert results(tmp_path / "out").keys() == {EASY}


def test_experiments_share_training_runs(tmp_path, monkeypatch):
    from lora_fast.cli.reproduce.experiments import finetunes, session

    calls = []

    def run(settings, folder, resume, display):
        calls.append((settings.method, folder))
        return SimpleNamespace(records=[f"record of {name}" for name in settings.method])

    monkeypatch.setattr(finetunes.pipeline, "run", run)
    quick = session.Session(tmp_path, True, None)
    assert finetunes.train(quick, ["lora", "ilora"]) == {"lora": "record of lora", "ilora": "record of ilora"}
    assert finetunes.train(quick, ["balora", "lora", "pilora"])["lora"] == "record of lora"
    assert [methods for methods, _ in calls] == [("lora", "ilora"), ("balora", "pilora")]
    assert calls[0][1] != calls[1][1]


@pytest.mark.parametrize("ratio, met", [(2.0, True), (-9.0, False)], ids=["nearer to 1", "further"])
def test_scale_norms_show_the_papers_five_methods(tmp_path, ratio, met):
    from lora_fast.cli.finetune.record import Record
    from lora_fast.cli.reproduce.experiments import scale_norms, session

    ratios = {"lora": 7.0, "lora+": 0.5, "sing-lora": 1.0, "lora-rite": 20.0, "scale-reg": ratio}
    trained = {
        name: Record(name, adapter=[{"step": 5, "adapter/norm_a_mean": 1.0, "adapter/rms_ratio_mean": ratio}])
        for name, ratio in ratios.items()
    }
    shown = scale_norms.run(session.Session(tmp_path, True, None, trained))
    assert [row.what.partition(":")[0] for row in shown.rows[1:]] == list(ratios)
    assert shown.rows[0].met is met and shown.plots[0].png.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, message",
    [(("nonsense",), "NAME: expected some of scalora-regression"), (("--quick",), "--output: expected a new or empty")],
    ids=["unknown name", "folder in use"],
)
def test_reproduce_names_bad_input(tmp_path, options, message):
    (tmp_path / "file").write_text("")
    shown = reproduce(tmp_path, *options)
    assert shown.exit_code == 2 and message in " ".join(shown.output.split())


def test_help_lists_every_experiment():
    shown = CliRunner().invoke(app, ["reproduce", "--help"]).output
    assert "lora-fast reproduce --quick" in shown and all(name in shown for name in EXPERIMENTS)


def test_every_row_of_the_table_is_an_experiment():
    for module, what in EXPERIMENTS.values():
        assert callable(importlib.import_module(f"lora_fast.cli.reproduce.experiments.{module}").run) and what.endswith(
            "."
        )
