"""``lora-fast tune``: its file, the launches that follow it, and the search with a timer of the tests. Only the timing
itself needs a GPU."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace

import pytest
import tiny_model
import torch
from typer.testing import CliRunner

from lora_fast import platforms
from lora_fast.cli import app
from lora_fast.cli.tune import search
from lora_fast.cli.tune.command import layer_shapes, results
from lora_fast.kernels import device, linear, tiles, tuned
from lora_fast.kernels.inspection import interpreter
from lora_fast.kernels.linear import strategies

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = search.Shape(n_tokens=48, d_in=64, d_out=32, r=4, dropout=0.1, dtype=torch.float16)
OPS = ("project_short", "linear", "grad_s_b", "grad_a", "grad_x_dropout")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Sets an empty cache folder and returns the path of the file in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned._table.cache_clear()
    yield tmp_path / "lora_fast" / "tuned.json"
    tuned._table.cache_clear()


def invoke(*options: str):
    return CliRunner().invoke(app, ["tune", *options])


def a_table() -> tuned.Table:
    key = tuned.key("linear", torch.bfloat16, 8000, 4096, 14336, 16)
    return {key: "fused", key._replace(op="linear_tma"): (128, 256, 64, 8, 3)}


def test_file_keeps_what_is_written(cache):
    assert tuned.read() == {}
    devices = {"a GPU, sm_90, triton 3.7.1": a_table(), "another": {}}
    tuned.write(devices)
    assert tuned.read() == devices
    assert [path.name for path in cache.parent.iterdir()] == ["tuned.json"]


DAMAGE = {
    "cut short": lambda text: text[: len(text) // 2],
    "another format": lambda text: text.replace('"format": 1', '"format": 2'),
    "not an object": lambda text: "[1, 2]",
    "an unknown strategy": lambda text: text.replace('"fused"', '"magic"'),
    "the default of 4-bit weights": lambda text: text.replace('"fused"', '"library"'),  # which is never written
    "a tile of four": lambda text: text.replace("8,\n    3", "8").replace("8,\n     3", "8"),
    "a size that is text": lambda text: text.replace("14336", '"14336"'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_file_is_named_and_launches_warn(cache, damage, monkeypatch):
    tuned.write({"gpu": a_table()})
    before = cache.read_text()
    cache.write_text(damage(before))
    assert cache.read_text() != before
    with pytest.raises(ValueError, match=r"tuned\.json"):
        tuned.read()
    shown = invoke("--show")
    assert shown.exit_code == 2 and "--clear" in shown.output
    monkeypatch.setattr(tuned, "device_name", lambda device: "gpu")
    with pytest.warns(UserWarning, match="tune --clear"):
        assert tuned._table(torch.device("cuda", 0), tuned.changes()) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned._table(torch.device("cuda", 0), tuned.changes()) == {}  # without a second warning


def test_choices_are_kept_by_device_and_a_cpu_has_none(monkeypatch):
    tuned.write({"gpu": a_table()})
    monkeypatch.setattr(tuned, "device_name", lambda device: ("gpu", "other")[device.index])
    assert tuned._table(torch.device("cuda", 0), tuned.changes()) == a_table()
    assert tuned._table(torch.device("cuda", 1), tuned.changes()) == {}
    assert tuned._table(torch.device("cpu"), tuned.changes()) == {}


@pytest.mark.parametrize(("n_tokens", "d_out", "r", "choice"), [
    (8192, 14336, 16, "fused"), (4097, 14336, 16, "fused"), (4096, 14336, 16, None),
    (8192, 4096, 16, None), (8192, 14336, 8, None),
])  # fmt: skip
def test_choice_holds_for_its_shape_and_tokens_up_to_a_power_of_two(n_tokens, d_out, r, choice):
    left = torch.empty(n_tokens, 4096, dtype=torch.bfloat16, device="meta")
    with tuned.using(a_table()):
        assert tuned.find("linear", left, 4096, d_out, r) == choice
        assert tuned.find("linear", left.float(), 4096, d_out, r) is None


def test_measured_choice_precedes_the_default_and_follows_assume():
    x, weight = torch.empty(48, 64, dtype=torch.float16), torch.empty(32, 64, dtype=torch.float16)

    def chosen() -> tuple:
        return tiles.project(x, 4, short=False, wide=False)

    default = chosen()
    measured = {tuned.key("project", x.dtype, 48, 64, 0, 4): (32, 0, 64, 8, 2)}
    with tuned.using(measured):
        assert chosen() == (32, 0, 64, 16, 8, 2) != default
        with tiles.assume(arch=90):
            assert chosen() != (32, 0, 64, 16, 8, 2)
    assert chosen() == default

    def gemm(direction: str) -> str:
        return strategies.strategy(direction, x, weight, x.dtype, 4, dropout=False)

    unmeasured = gemm("forward")
    other = {"fused": "cublas", "cublas": "fused"}[unmeasured]
    with tuned.using({tuned.key("linear", x.dtype, 48, 64, 32, 4): other}):
        assert gemm("forward") == other
        assert strategies.way("forward", x, weight, x.dtype, 4, dropout=False).gemm == other
        with tiles.assume(strategy=unmeasured):
            assert gemm("forward") == unmeasured


def case_of(op: str, shape: search.Shape = SHAPE) -> search.Case:
    return next(case for case in search.cases(shape, DEVICE) if case.key.op == op)


def test_cases_are_the_ops_of_a_layer():
    assert tuple(case.key.op for case in search.cases(SHAPE, DEVICE)) == OPS
    plain = tuple(case.key.op for case in search.cases(replace(SHAPE, dropout=0.0), DEVICE))
    assert plain == (*OPS[:-1], "grad_x")


HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize("arch, dtype, runs", [(90, HALF, True), (90, SINGLE, False), (100, HALF, False)])
def test_gluon_is_a_candidate_where_it_runs(arch, dtype, runs, monkeypatch):
    monkeypatch.setattr(device, "get", lambda torch_device: device.CARDS[arch])
    gemms = [case_of(op, replace(SHAPE, dtype=dtype)) for op in ("linear", "grad_x_dropout")]
    assert [{case.key: "gluon"} in case.candidates for case in gemms] == [runs, runs]
    assert all({case.key: "cublas"} in case.candidates for case in gemms)


def clock(best: int, seconds: list):
    """Returns a timer for which candidate ``best`` takes ``seconds[1]`` and every other one ``seconds[0]``."""

    def timer(calls):
        return [seconds[i == best] for i in range(len(calls))]

    return timer


@pytest.mark.parametrize("op", ["linear", "grad_a"])
def test_fastest_candidate_is_chosen_and_then_runs(op):
    case = case_of(op)
    case = replace(case, candidates=case.candidates[:3])
    outcome = search.search(case, clock(1, [2e-3, 1e-3]))
    assert outcome.choice == case.candidates[1] and outcome.failed == 0
    assert (outcome.default, outcome.best) == (2e-3, 1e-3)
    table: tuned.Table = {}
    search.remember(table, case, outcome)
    assert table == case.candidates[1]
    if op == "linear" and DEVICE.type == "cpu":
        with tuned.using(table), interpreter.traffic() as counted:
            case.call()
        assert counted.launches == ["lora_update_kernel"]  # cuBLAS runs the GEMM, then the kernel adds the update
    search.remember(table, case, search.search(case, clock(0, [2e-3, 1e-3])))
    assert table == {}  # the default is fastest, so the old choice is deleted


def test_shapes_share_cases_and_each_shape_is_kept_when_done(monkeypatch):
    """The second shape has the d_in of the first one, whose project and grad_a it shares."""
    monkeypatch.setattr(tiles, "candidates", lambda *arguments: [(32, 32, 32, 4, 2), (32, 64, 64, 4, 2)])
    table: tuned.Table = {}
    sizes = []
    shapes = [SHAPE, replace(SHAPE, d_out=48)]
    keys = []
    timer = clock(1, [2e-3, 1e-3])
    outcomes = search.search_all(shapes, DEVICE, table, timer, keys.append, lambda: sizes.append(len(table)))
    assert keys == [outcome.key for outcome in outcomes]
    assert [outcome.key.op for outcome in outcomes] == [*OPS, "linear", "grad_s_b", "grad_x_dropout"]
    assert sizes == [5, 8] and all(outcome.choice.items() <= table.items() for outcome in outcomes)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_four_bit_weights_are_measured_against_the_library(dropout):
    pytest.importorskip("bitsandbytes", reason="quantises the weight")
    shape, table = replace(SHAPE, dropout=dropout, four_bit=True), {}
    cases = list(search.four_bit_cases(shape, DEVICE))
    assert [case.key.op for case in cases] == ["four_bit_linear", "four_bit_grad_x" + "_dropout" * (dropout > 0)]
    for case in cases:
        few = replace(case, candidates=case.candidates[:3])
        outcome = search.search(few, clock(2, [2e-3, 1e-3]))
        assert (outcome.tried, outcome.failed) == (3, 0)  # both tiles agree with the library
        assert outcome.choice == few.candidates[2] and outcome.choice[case.key] == "fused"
        search.remember(table, few, outcome)
    assert len(table) == 4
    assert not list(search.four_bit_cases(replace(shape, d_in=96), DEVICE))  # the kernel takes no such rows


def test_gain_below_noise_leaves_the_default():
    case = case_of("grad_a")
    outcome = search.search(replace(case, candidates=case.candidates[:2]), clock(1, [1e-3, 0.99e-3]))
    assert outcome.choice == {} and outcome.best == outcome.default


def test_candidates_that_fail_or_differ_are_not_timed():
    case = case_of("project_short")
    broken, wrong = case.candidates[1], case.candidates[2]
    counts = []

    def call():
        chosen = tuned._used.values[-1]
        if chosen == broken:
            raise RuntimeError("out of resource: shared memory")
        return torch.full((4, 4), 2.0 if chosen == wrong else 1.0)

    def timer(calls):
        counts.append(len(calls))
        return [1.0] * len(calls)

    outcome = search.search(replace(case, call=call, candidates=case.candidates[:4]), timer)
    assert counts == [2] and (outcome.tried, outcome.failed) == (2, 2)


def test_close_allows_another_order_of_a_sum_but_no_wrong_result():
    key = tuned.key("linear", torch.float32, 48, 4096, 32, 4)
    left, right = torch.randn(2, 64, 4096, generator=torch.Generator().manual_seed(0))
    products = left * right
    in_turn = products.cumsum(1)[:, -1]  # adds the numbers one by one, as a tile does that walks the whole row
    in_pairs = products.sum(1)
    assert not torch.equal(in_turn, in_pairs)
    assert search._close(in_turn, in_pairs, key)
    assert not search._close(products[:, 1:].sum(1), in_pairs, key)
    assert not search._close(in_pairs * torch.nan, in_pairs, key)


def test_timed_calls_do_not_change_their_inputs():
    """Every tensor in the closure of a call has the same bits after two calls."""
    for case in search.cases(SHAPE, DEVICE):
        tensors = [c.cell_contents for c in case.call.__closure__ if isinstance(c.cell_contents, torch.Tensor)]
        before = [tensor.clone() for tensor in tensors]
        assert len(tensors) >= 2
        for choice in ({}, case.candidates[1]):
            with tuned.using(choice):
                case.call()
        assert all(torch.equal(after, kept) for after, kept in zip(tensors, before, strict=True)), case.key.op


def test_candidates_begin_with_the_default_and_are_distinct():
    h100 = device.CARDS[90]
    for op, size in {(op, size) for op, size, *_ in tiles.TABLE if not op.startswith("update")}:
        candidates = tiles.candidates(op, size, h100, 16)
        assert candidates[0] == tiles.row(op, size, h100, 16)
        assert len(candidates) == len(set(candidates)) > 3
        assert all(side & (side - 1) == 0 for tile in candidates for side in tile[:4])  # powers of two


def test_layer_shapes_need_only_the_configuration(tmp_path):
    folder = tiny_model.save(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert layer_shapes(str(folder), "all-linear") == [(32, 32), (32, 16), (32, 64), (64, 32)]
    assert layer_shapes(str(folder), ["down_proj"]) == [(64, 32)]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Returns options for a tiny model. Sets the test's device, and two candidates for each tile."""
    monkeypatch.setattr(sys.modules["lora_fast.cli.tune.command"], "_gpu", lambda: DEVICE)
    monkeypatch.setattr(tuned, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(tiles, "candidates", lambda *arguments: [(32, 32, 32, 4, 2), (32, 64, 64, 4, 2)])
    folder = tiny_model.save(tmp_path / "model")
    return ("--model", str(folder), "--rank", "4", "--batch", "1", "--seq-len", "16", "--dtype", "float32")


def test_command_measures_every_shape_and_keeps_the_fastest(tiny, monkeypatch):
    monkeypatch.setattr(search, "time_on_gpu", clock(1, [2e-3, 1e-3]))
    result = invoke(*tiny)
    assert result.exit_code == 0, result.output
    assert "4 layer shapes on a GPU" in result.output and "64→32" in result.output
    table = tuned.read()["a GPU"]
    assert {key.op for key in table} == {"project_short", "linear", "grad_s_b", "grad_a", "grad_x"}
    assert {choice for key, choice in table.items() if key.op == "linear"} == {"cublas"}
    monkeypatch.setattr(search, "time_on_gpu", clock(0, [2e-3, 1e-3]))
    assert invoke(*tiny).exit_code == 0
    assert tuned.read() == {"a GPU": {}}  # the defaults are fastest in this second measurement


def test_ctrl_c_keeps_the_shapes_that_are_done(tiny, monkeypatch):
    timed = []

    def timer(calls):
        timed.append(calls)
        if len(timed) == 6:
            raise KeyboardInterrupt
        return [2e-3, *[1e-3] * (len(calls) - 1)]

    monkeypatch.setattr(search, "time_on_gpu", timer)
    result = invoke(*tiny)
    assert result.exit_code == 130 and "1 of 4 shapes are kept" in result.output
    assert len(tuned.read()["a GPU"]) == 5


def test_four_bit_needs_bitsandbytes(tiny, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = invoke(*tiny, "--four-bit")
    assert result.exit_code == 2 and "--four-bit: expected an environment with bitsandbytes" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_reported_before_anything_else(cache):
    result = invoke("--model", "/nowhere", "--rank", "0")
    assert result.exit_code == 2
    assert "lora-fast tune: expected a CUDA GPU to measure on, got none" in result.output
    assert not cache.exists()


def test_interpreted_kernels_are_not_timed(cache, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = invoke()
    assert result.exit_code == 2 and "unset it" in result.output and not cache.exists()


def test_gpu_older_than_the_kernels_is_named(cache, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(platforms, "_gpu_obstacles", {})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = invoke()
    assert result.exit_code == 2 and "expected a GPU of sm_80 (Ampere) or later, got sm_75" in result.output


def test_show_and_clear_work_without_a_gpu(cache):
    assert "Nothing measured yet" in invoke("--show").output
    tuned.write({"a GPU, sm_90, triton 3.7.1": a_table()})
    shown = invoke("--show").output
    assert "a GPU, sm_90" in shown and "4096→14336" in shown and "128×256×64×8×3" in shown and "8,192" in shown
    assert json.loads(cache.read_text())["format"] == tuned.FORMAT
    assert "Removed" in invoke("--clear").output and not cache.exists()
    assert "Nothing to remove" in invoke("--clear").output


def test_results_are_a_table_of_the_choices():
    case = case_of("linear")
    rows = results([search.Outcome(case.key, 2e-3, 1e-3, case.candidates[1], 5, 1)]).rows
    assert [cell.text for cell in rows[0]] == [
        "linear", "64→32", "2000.0 µs", "1000.0 µs", "2.00", "cublas", "5, 1 unfit",
    ]  # fmt: skip


def test_layer_with_measured_tiles_gives_the_same_result():
    x = torch.randn(48, 64, dtype=torch.float16, device=DEVICE)
    a = torch.randn(4, 64, device=DEVICE)
    with tuned.using({tuned.key("project", x.dtype, 48, 64, 0, 4): (32, 0, 32, 4, 2)}):
        s = linear.project(x, a)
    exact = x.double() @ a.half().double().t()
    assert (s.double() - exact).norm() <= torch.finfo(torch.float16).eps * exact.norm()
