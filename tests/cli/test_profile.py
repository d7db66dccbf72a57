"""lora-fast profile on a tiny random Llama: engines that share every weight, checkable figures, files."""

from __future__ import annotations

import dataclasses
import gzip
import html
import html.parser
import json
from pathlib import Path

import pytest
import tiny_model
import torch
from typer.testing import CliRunner

from lora_fast.cli import app
from lora_fast.cli.inputs.settings import Settings
from lora_fast.cli.output.terminal import Display
from lora_fast.cli.profile import engines as E
from lora_fast.cli.profile import layer_times, measurement, report, step_times
from lora_fast.cli.profile.profile_result import Result
from lora_fast.measure import ceilings, clock, memory

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("model"))


def settings(**changes) -> Settings:
    return Settings(**{"rank": 4, "seq_len": 32, "batch": 2, "steps": STEPS, "dropout": 0.1, **changes})


@pytest.fixture(scope="module")
def built(folder) -> E.Engines:
    return E.build(settings(), str(folder), torch.float32, compiled=False)


@pytest.fixture(scope="module")
def batch(built):
    return E.random_batch(built.device, built.vocabulary, 2, 32)


def invoke(folder: Path, *options: object):
    base = ("--model", folder, "--rank", 4, "--seq-len", 32, "--batch", 2, "--steps", STEPS, "--no-compile")
    return CliRunner().invoke(app, ["profile", *map(str, (*base, *options))])


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """Returns the output folder and the printed text of a finished profile."""
    output = tmp_path_factory.mktemp("profile") / "out"
    result = invoke(folder, "--dropout", 0.1, "--output", output)
    assert result.exit_code == 0, result.output
    return output, result.output


def figures(folder: Path) -> dict:
    return json.loads((folder / "profile.json").read_text())


def test_engines_store_every_weight_once(built):
    addresses = [{p.data_ptr() for p in engine.model.parameters()} for engine in built.by_label.values()]
    base, eager, fused = addresses
    assert base < eager == fused
    types = [type(engine.model.get_submodule(next(iter(built.fusing.changed)))).__name__
             for label, engine in built.by_label.items() if label != E.BASE]  # fmt: skip
    assert types == ["Linear", "FusedLoraLinear"]
    assert not any(p.requires_grad for p in built.by_label[E.BASE].model.parameters())


def test_eager_and_fused_engine_compute_the_same_loss_and_gradients(folder):
    built = E.build(settings(dropout=0.0), str(folder), torch.float32, compiled=False)
    batch = E.random_batch(built.device, built.vocabulary, 2, 32)
    results = []
    for label in (E.EAGER, E.FUSED):
        model = built.by_label[label].model
        loss = model(**batch).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in built.by_label[label].trained())])
        model.zero_grad()
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(eager, fused)
    assert all(gradient.norm() > 0 for gradient in results[0])  # lora_B is not zero, so lora_A has a gradient


def test_take_turns_starts_each_engine_first_equally_often(built, batch, monkeypatch):
    seen = []
    monkeypatch.setattr(step_times, "step", lambda engines, engine, batch: seen.append(engine.label) or (1.0, 2.0, 3.0))
    times, failure = step_times.take_turns(built, batch, 3, lambda text: None, lambda: None)
    rounds = [tuple(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert len(rounds) == 4 and all(len(set(labels)) == 3 for labels in rounds)
    assert {labels[0] for labels in rounds[1:]} == set(built.by_label)
    assert failure == "" and times[E.FUSED].step == [6.0] * 3


def test_take_turns_drops_a_compiler_that_fails_with_its_reason(built, batch, monkeypatch):
    failing = dataclasses.replace(built, by_label={**built.by_label})
    failing.by_label[E.COMPILED] = E.Engine(E.COMPILED, built.by_label[E.EAGER].model, None)

    def step(engines, engine, batch):
        if engine.label == E.COMPILED:
            raise RuntimeError("no C++ compiler\nand more")
        return 1.0, 1.0, 1.0

    monkeypatch.setattr(step_times, "step", step)
    times, failure = step_times.take_turns(failing, batch, 1, lambda text: None, lambda: None)
    assert failure == "RuntimeError: no C++ compiler" and set(times) == set(built.by_label)


def test_take_turns_raises_the_error_of_any_other_engine(built, batch, monkeypatch):
    monkeypatch.setattr(step_times, "step", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step_times.take_turns(built, batch, 1, lambda text: None, lambda: None)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the allocator's own peak there")
def test_peak_bytes_count_model_optimizer_state_and_allocations_of_a_step(built, batch):
    engine = built.by_label[E.FUSED]
    step_times.step(built, engine, batch)
    resident = memory.distinct_bytes(engine.model.parameters()) + memory.distinct_bytes(engine.model.buffers())
    adapters = sum(p.nbytes for p in engine.trained())
    logits = 2 * 32 * built.vocabulary * 4
    peak = step_times.peak_bytes(built, engine, batch)
    assert peak > resident + 2 * adapters + logits
    assert peak < resident + 3 * adapters + 40 * logits
    hidden = E.Engine(E.COMPILED, engine.model, engine.optimizer)
    assert step_times.peak_bytes(built, hidden, batch) is None


def test_gradient_errors_compare_with_float64_and_detect_a_wrong_scaling(built, batch):
    (d_in, d_out), names = next(iter(layer_times.by_shape(built).items()))
    x, dy = layer_times.activations(built, batch, names[:1])[names[0]]
    assert x.shape[-1] == d_in and dy.shape[-1] == d_out and dy.norm() > 0
    pair = {label: built.by_label[label].model.get_submodule(names[0]) for label in (E.EAGER, E.FUSED)}
    errors = layer_times.gradient_errors(built, pair, x, dy)
    assert all(0 < error < 20 * torch.finfo(torch.float32).eps for error in errors.values())
    assert all(layer.training for layer in pair.values())
    assert all(p.grad is None for p in built.by_label[E.EAGER].trained())
    fused = pair[E.FUSED]
    fused.scaling["default"] *= 1.001
    wrong = layer_times.gradient_errors(built, pair, x, dy)
    fused.scaling["default"] /= 1.001
    assert wrong[E.FUSED] == pytest.approx(1e-3, rel=0.2) and wrong[E.EAGER] == errors[E.EAGER]


def test_profile_writes_figures_traces_and_verdict(finished):
    output, printed = finished
    profile = figures(output)
    assert list(profile["engines"]) == [E.BASE, E.EAGER, E.FUSED]
    for label, engine in profile["engines"].items():
        assert len(engine["times"]["forward"]) == len(engine["times"]["optimizer"]) == STEPS
        assert engine["step"]["p20"] <= engine["step"]["median"] <= engine["step"]["p80"]
        assert engine["tokens_per_second"] == pytest.approx(2 * 32 / engine["step"]["median"])
        events = json.loads(gzip.decompress((output / engine["files"][0]).read_bytes()))["traceEvents"]
        names = {event.get("name") for event in events}
        assert "aten::mm" in names and ("LoRALinearFunction" in names) == (label == E.FUSED)
    assert profile["engines"][E.FUSED]["over_fused"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    assert profile["engines"][E.FUSED]["saved"] < profile["engines"][E.EAGER]["saved"]  # with dropout
    shapes = [(layer["d_in"], layer["d_out"], layer["count"]) for layer in profile["layers"]]
    assert shapes == [(32, 32, 4), (32, 16, 4), (32, 64, 4), (64, 32, 2)]
    assert profile["skipped"] == measurement.SKIPPED and profile["fusing"] == "fused 14 layers"
    assert profile["verdict"] in " ".join(printed.split()) and "PEFT compiled skipped" in printed


class Links(html.parser.HTMLParser):
    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            assert not (name in ("src", "href") and not value.startswith("#")), f"{tag} needs {value}"


def test_page_is_self_contained(finished):
    text = (finished[0] / "profile.html").read_text()
    Links().feed(text)
    assert text.count("<svg") == 5 and figures(finished[0])["verdict"] in text
    assert "http" not in text.replace("http://www.w3.org/", "")


def spread(low: float, high: float) -> clock.Spread:
    return clock.Spread((low + high) / 2, low, high)


@pytest.mark.parametrize(("ratio", "text"), [
    (spread(1.1, 1.3), "Faster than PEFT eager: PEFT eager over fused 1.20 (p20–p80 1.10–1.30)."),
    (spread(0.9, 1.2), "No gain over PEFT eager that exceeds the noise"),
    (spread(0.8, 0.9), "No gain, slower than PEFT eager"),
])  # fmt: skip
def test_verdict_states_that_there_is_no_gain(built, batch, ratio, text):
    result = example_result(built)
    result.engines[E.EAGER].over_fused = ratio
    assert text in result.verdict()
    result.fused_layers = 0
    assert result.verdict() == "No gain: no layer ran fused."
    result.fused_layers, result.fallbacks = 3, {"hooks": 2, "merged": 1}
    assert result.verdict() == "No gain: no layer ran fused."


def example_result(built) -> Result:
    """Returns a result without measuring anything."""
    from lora_fast.cli.profile.profile_result import Measured

    times = step_times.Times([1.0], [2.0], [0.5])
    spreads = [spread(1, 1)] * 5
    measured = {label: Measured(times, *spreads, 10.0, 2**20, None, ["trace.json.gz"]) for label in E.LABELS}
    seconds = dict.fromkeys((E.BASE, E.EAGER, E.FUSED), spread(1, 2))
    layer = layer_times.Layer("q", 2, 8, 16, seconds, dict.fromkeys(seconds, 0.5), {E.EAGER: 1e-7, E.FUSED: 2e-7})
    environment = {"device": "CPU", "versions": {}}
    roof = ceilings.Ceilings("float32", 1e12, 1e10)
    return Result(
        settings().as_dict(),
        environment,
        "quiet",
        "fused 3 layers",
        3,
        {},
        "",
        roof,
        "",
        2**20,
        2**20,
        measured,
        [layer],
    )


def test_tables_show_what_was_not_counted(built):
    result = example_result(built)
    cells = [cell.text for table in report.tables(result) for row in table.rows for cell in row]
    assert "not counted" in cells and "50 · 50 · 50 %" in cells and "1.0e-07 · 2.0e-07" in cells


def test_fallbacks_count_layers_that_ran_pefts_forward_by_reason(folder, batch):
    built = E.build(settings(), str(folder), torch.float32, compiled=False)
    fused = built.by_label[E.FUSED]
    step_times.step(built, fused, batch)
    assert built.fallbacks() == {}
    for name in list(built.fusing.changed)[:2]:
        fused.model.get_submodule(name).get_base_layer().register_forward_hook(lambda *arguments: None)
    step_times.step(built, fused, batch)
    ((reason, count),) = built.fallbacks().items()
    assert count == 2 and reason.startswith("hooks")
    result = example_result(built)
    result.fallbacks = built.fallbacks()
    assert result.fused_layers_text() == f"fused 3 layers; 2 of them ran PEFT's own forward: {reason}"
    assert html.escape(result.fused_layers_text()) in report.html(result, "title").replace("&#39;", "&#x27;")
    assert result.verdict() != "No gain: no layer ran fused."


def test_tables_fit_a_terminal_of_80_columns(built):
    display = Display()
    display.console.width = 80
    with display.console.capture() as shown:
        for table in report.tables(example_result(built)):
            display.show(table)
    assert max(map(len, shown.get().splitlines())) <= 80 and "…" not in shown.get()


def test_build_accepts_a_model_with_nothing_to_fuse(folder, monkeypatch):
    from lora_fast.surgery.change_report import Report

    monkeypatch.setattr(E, "fuse_", lambda model, allow_empty: Report("fused", {}, {"q_proj": "hooks"}))
    built = E.build(settings(), str(folder), torch.float32, compiled=False)
    assert not built.fusing.changed and str(built.fusing) == "fused 0 layers; left 1: q_proj (hooks)"


@pytest.mark.parametrize(("options", "message"), [
    (("--rank", 0), "--rank: expected an integer from 1 to 256"),
    (("--steps", 0), "--steps: expected an integer of at least 1"),
    (("--seq-len", 4096), "--seq-len: expected at most the model's 128 positions"),
    (("--targets", "nothing"), "--targets: expected all-linear, or some of"),
    (("--model", "/nowhere/x"), "--model: expected an existing folder"),
])  # fmt: skip
def test_profile_names_bad_input_and_writes_nothing(folder, tmp_path, options, message):
    result = invoke(folder, "--output", tmp_path / "out", *options)
    assert result.exit_code == 2 and message in result.output
    assert not (tmp_path / "out").exists()


def test_profile_refuses_a_folder_in_use(folder, finished):
    result = invoke(folder, "--output", finished[0])
    assert result.exit_code == 2 and "--output: expected a new or empty folder" in result.output


@pytest.mark.parametrize(("name", "least", "most"), [("nf4", 0.5, 3.0), ("int8", 1.0, 1.3), ("torchao-int8", 1.0, 1.3)])
def test_quantised_engines_share_the_weights_and_compute_the_same(folder, batch, name, least, most):
    """``least`` and ``most`` bound the bytes of an element with its share of the scales."""
    pytest.importorskip("torchao" if "torchao" in name else "bitsandbytes", reason="pip install '.[quantized]'")
    built = E.build(settings(quantize=name, dropout=0.0), str(folder), torch.float32, compiled=False)
    losses, gradients = {}, {}
    for label, engine in built.by_label.items():
        loss = engine.model(**batch).loss
        loss.backward()
        losses[label], gradients[label] = loss.item(), [p.grad.clone() for p in engine.trained()]
        engine.model.zero_grad()
    assert losses[E.FUSED] == pytest.approx(losses[E.EAGER], abs=1e-6) and losses[E.BASE] != losses[E.EAGER]
    torch.testing.assert_close(gradients[E.FUSED], gradients[E.EAGER])
    assert str(built.fusing) == "fused 14 layers" and built.fallbacks() == {}
    for (d_in, d_out), names in layer_times.by_shape(built).items():
        layer = built.by_label[E.EAGER].model.get_submodule(names[0])
        assert least <= layer_times._weight_bytes(layer.get_base_layer()) < most, (d_in, d_out)
        pair = {label: built.by_label[label].model.get_submodule(names[0]) for label in (E.EAGER, E.FUSED)}
        x, dy = layer_times.activations(built, batch, names[:1])[names[0]]
        assert max(layer_times.gradient_errors(built, pair, x, dy).values()) < 20 * torch.finfo(torch.float32).eps
    assert built.weights[0] < built.weights[1] and built.weight_format == name
