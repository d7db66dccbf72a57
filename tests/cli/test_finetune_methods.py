"""Runs of ``lora-fast finetune --method``: training, resuming to the same bits, and comparing methods."""

import signal

import pytest
import tiny_model
import torch
import transformers
from finetune_runs import (
    Page,
    at_step,
    gpt2,
    held_out_loss_in_peft,
    invoke,
    metrics,
    refused,
    resume,
    same_result,
)
from safetensors.torch import load_file

from lora_fast.cli.inputs.method_options import METHODS, read
from lora_fast.cli.inputs.settings import Settings
from lora_fast.cli.output import run_folder
from lora_fast.measure import memory

pytestmark = pytest.mark.usefixtures("unrendered")
SEVERAL = ("lora", "ilora:lam=2", "lora:lr=2e-3")


def adapter(folder):
    """Returns the tensors of the adapter in a run's folder."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def plain(place):
    """The adapter that plain LoRA trains."""
    assert invoke(place, "--output", place / "plain").exit_code == 0
    return adapter(place / "plain")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lora"])
def test_method_trains_unlike_plain_lora(place, plain, method):
    folder = place / f"method {method}"
    result = invoke(place, "--output", folder, "--method", method)
    assert result.exit_code == 0, result.output
    run = metrics(folder)["runs"]["fused"]
    assert run["held_out"][-1][1] < run["held_out"][0][1]
    assert run["method"] == method and METHODS[method][0].__name__ in run["options"]
    trained = adapter(folder)
    assert trained.keys() >= plain.keys() and not all(torch.equal(trained[key], plain[key]) for key in plain)


def test_scalora_adapter_and_changed_weights_load_in_peft(place):
    folder = place / "for peft"
    assert invoke(place, "--output", folder, "--method", "scalora").exit_code == 0
    run = metrics(folder)["runs"]["fused"]
    assert "14 weights saved whole" in run["layers"]
    assert run["change_erank"] > 0
    assert held_out_loss_in_peft(place, folder) == pytest.approx(run["held_out"][-1][1], abs=1e-5)


@pytest.mark.usefixtures("rendered")
def test_nb_lora_stays_within_its_bound_beside_plain_lora(place, plain):
    """Plain LoRA ends as it would alone, PEFT reads nb-lora's adapter, and every ΔW is within its bound."""
    folder, method = place / "bounded", "nb-lora:norm=spectral,lr=0.1,bound=0.5"
    options = ("--compare", "--method", "nb-lora:norm=spectral,lr=0.1", "--bound", 0.5)
    assert invoke(place, "--output", folder, *options).exit_code == 0
    runs = metrics(folder)["runs"]
    assert list(runs) == ["lora", method]
    used = [row["adapter/bound_used_max"] for row in runs[method]["adapter"]]
    assert used[0] == 0 < used[-1] <= 1 + 1e-5
    assert "Spectral norm of each ΔW at most 0.5" in runs[method]["layers"]
    lora_beside = adapter(folder / "lora")
    assert lora_beside.keys() == plain.keys() and all(torch.equal(lora_beside[key], plain[key]) for key in plain)
    bounds, used_at_end = runs[method]["bounds"], metrics(folder)["comparison"][method]["bound_used_mean"]
    assert len(bounds) == 14 and runs["lora"]["bounds"] == {}
    assert all(row["norm"] == "spectral" and row["bound"] == 0.5 for row in bounds.values())
    assert [max(values) / 0.5 for values in zip(*(row["values"] for row in bounds.values()), strict=True)] == used
    assert sum(row["values"][-1] / 0.5 for row in bounds.values()) / 14 == pytest.approx(used_at_end)
    page = Page((folder / "report.html").read_text())
    assert page.addresses == [] and len(page.ids) == len(set(page.ids))
    limits = "Spectral norm of each ΔW at most 0.5. metrics.json has"
    for text in (limits, "mlp.down_proj", "% of the bound", f"{100 * used_at_end:.1f}%"):
        assert text in " ".join(page.words), text
    bounded_folder = folder / Settings(method=("lora", method), compare=True).runs[1].folder
    assert held_out_loss_in_peft(place, bounded_folder) == pytest.approx(runs[method]["held_out"][-1][1], abs=1e-5)


def test_resume_accepts_only_the_bound_of_the_run(place, monkeypatch):
    folder, options = place / "bound kept", ("--compare", "--method", "nb-lora", "--norm", "frobenius", "--bound", 0.5)
    with monkeypatch.context() as patched:
        at_step(patched, 1, lambda: signal.raise_signal(signal.SIGINT))
        assert invoke(place, "--output", folder, *options).exit_code == 130
    refused(resume(folder, *options[:-1], 2), "--method: expected ('lora', 'nb-lora:norm=frobenius,bound=0.5'), as in")
    result = resume(folder, *options)
    assert result.exit_code == 0, result.output
    run = metrics(folder)["runs"]["nb-lora:norm=frobenius,bound=0.5"]
    assert "norm='frobenius', bound=0.5" in run["options"]
    assert "norm='frobenius', bound=0.5" in (folder / "report.html").read_text().replace("&#39;", "'")


RESUMED = [  # tests/batches/test_grouped.py resumes every method
    "scalora:interval=2",
    "nb-lora:norm=spectral",
    "sing-lora:ramp_steps=5",
    *(pytest.param(method, marks=pytest.mark.budget) for method in ("balora", "lora-muon:lr=0.05")),
]


@pytest.mark.parametrize("method", RESUMED)
def test_method_resumes_to_the_same_bits(place, monkeypatch, method):
    whole, stopped = place / f"whole {method}", place / f"stopped {method}"
    assert invoke(place, "--output", whole, "--method", method).exit_code == 0
    with monkeypatch.context() as patched:
        at_step(patched, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert invoke(place, "--output", stopped, "--method", method).exit_code == 130
    result = resume(stopped)
    assert result.exit_code == 0, result.output
    same_result(whole, stopped)


def test_sing_lora_ramp_is_a_quarter_of_the_run_by_default(place):
    """The adapter in PEFT's files has the scale of the last step, even if the ramp has not ended."""
    for method, steps in (("sing-lora", 2), ("sing-lora:ramp_steps=9", 9)):
        folder = place / f"ramp {method}"
        assert invoke(place, "--output", folder, "--method", method, "--alpha", 8).exit_code == 0
        run = metrics(folder)["runs"]["fused"]
        assert run["layers"].endswith(f"ΔW ramps up over the first {steps} steps")
        assert held_out_loss_in_peft(place, folder) == pytest.approx(run["held_out"][-1][1], abs=1e-5)


@pytest.fixture(scope="module")
def compared(place):
    """The folder of a comparison of SEVERAL."""
    options = [word for method in SEVERAL for word in ("--method", method)]
    result = invoke(place, "--output", place / "several", "--compare", *options)
    assert result.exit_code == 0, result.output
    assert "ilora:lam=2 (2 of 3): fused 14 layers" in result.output
    return place / "several"


def test_comparison_starts_all_methods_alike_and_records_their_figures(compared, plain):
    figures = metrics(compared)
    assert list(figures["runs"]) == list(figures["comparison"]) == list(SEVERAL)
    first, second, third = (figures["runs"][name] for name in SEVERAL)
    assert first["losses"][0] == second["losses"][0] == third["losses"][0]
    assert len({tuple(run["losses"]) for run in (first, second, third)}) == 3
    assert all(torch.equal(tensor, plain[name]) for name, tensor in adapter(compared / "lora").items())  # as alone
    for name, run in figures["runs"].items():
        row = figures["comparison"][name]
        assert len(run["optimizer_seconds"]) == len(run["seconds"]) == len(run["losses"])
        assert all(0 < part < whole for part, whole in zip(run["optimizer_seconds"], run["seconds"], strict=True))
        assert [moment["step"] for moment in run["adapter"]] == [0, 1, 2, 3, 4, 5, 6]
        assert row["held_out_before"] == first["held_out"][0][1] and row["held_out_after"] == run["held_out"][-1][1]
        assert row["norm_b"] == run["adapter"][-1]["adapter/norm_b_mean"] > 0
        assert 0 < row["state_bytes"] <= row["peak_bytes"]
    assert figures["comparison"]["lora"]["step_over_baseline"] == 1
    trained = sum(tensor.numel() for tensor in plain.values())
    assert figures["comparison"]["lora"]["state_bytes"] == pytest.approx(
        2 * 4 * trained, rel=0.05
    )  # two float32 moments; step counts


def test_page_of_a_comparison_explains_each_method(compared):
    text = (compared / "report.html").read_text()
    page = Page(text)
    assert page.addresses == [] and len(page.ids) == len(set(page.ids))
    words = " ".join(" ".join(page.words).split())
    for name in SEVERAL:
        assert read(name).sentence in words and words.count(name) > 8  # in the table and the legends
    options, figures = ("ILoRA(lam=2, rho=None", "learning rate 0.002"), ("Norm of b", "overhead, % of lora's step")
    for expected in (*options, *figures):
        assert expected in words, expected
    assert metrics(compared)["runs"]["lora"]["adapter"][0].get("adapter/rms_ratio_mean") is None  # b = 0 has no ratio


def test_comparison_resumes_where_it_was_interrupted(place, compared, monkeypatch):
    folder = place / "stopped in the second"
    options = [word for method in SEVERAL for word in ("--method", method)]
    calls = []

    def stop_in_the_second_run():
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        at_step(patched, 3, stop_in_the_second_run)
        assert invoke(place, "--output", folder, "--compare", *options).exit_code == 130
    assert (folder / "lora" / run_folder.RECORD).exists() and not (folder / "ilora-lam=2" / run_folder.RECORD).exists()
    steps = at_step(monkeypatch, 0, None)
    assert resume(folder, "--method", "lora").exit_code == 2  # the run has other methods
    result = resume(folder, *options)
    assert result.exit_code == 0, result.output
    assert steps == [5, 6, 1, 2, 3, 4, 5, 6]
    whole, resumed = metrics(compared)["runs"], metrics(folder)["runs"]
    for name in SEVERAL:
        for figure in ("losses", "held_out", "adapter", "bounds"):
            assert whole[name][figure] == resumed[name][figure], (name, figure)


@pytest.mark.usefixtures("rendered")
def test_comparison_continues_without_a_diverged_method(place, tmp_path):
    result = invoke(place, "--output", tmp_path / "out", "--compare", "--method", "lora:lr=1e30", "--method", "lora")
    assert result.exit_code == 0, result.output
    assert "the comparison continues without this run" in result.output
    figures = metrics(tmp_path / "out")
    assert "loss is nan at step 2" in figures["runs"]["lora:lr=1e30"]["diverged"]
    assert figures["comparison"]["lora:lr=1e30"]["held_out_after"] is None
    assert figures["runs"]["lora"]["held_out"][-1][1] < figures["runs"]["lora"]["held_out"][0][1]
    words = " ".join(Page((tmp_path / "out" / "report.html").read_text()).words)
    assert "diverged" in words and "Lowest held-out loss: lora," in words


def test_method_that_cannot_train_the_model_is_rejected_before_any_run(place, tmp_path):
    gpt2(tmp_path / "gpt2")  # its layers have transposed weights
    options = ("--engine", "eager", "--compare", "--method", "lora", "--method", "scalora")
    result = invoke(place, "--model", tmp_path / "gpt2", "--output", tmp_path / "out", *options)
    refused(result, "--method scalora: ", "expected a weight that ScaLoRA can merge into")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ("nb-lora:norm=spectral,lr=1", "--method nb-lora:norm=spectral,lr=1: r: expected at most in_features, 32"),
        ("nb-lora:bound_ratio=1", "--method nb-lora:bound_ratio=1: bound_ratio: expected a weight whose norm is"),
    ],
    ids=["rank", "zero weight"],
)
def test_later_run_that_cannot_begin_is_rejected_before_the_first(place, tmp_path, later, message):
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    if "ratio" in later:
        torch.nn.init.zeros_(model.model.layers[1].mlp.up_proj.weight)
    model.save_pretrained(tmp_path / "model")
    tiny_model.byte_tokenizer().save_pretrained(tmp_path / "model")
    rank = 4 if "ratio" in later else 33
    options = ("--model", tmp_path / "model", "--rank", rank, "--compare", "--method", "lora", "--method", later)
    result = invoke(place, "--output", tmp_path / "out", *options)
    refused(result, message)
    assert not (tmp_path / "out").exists()


def test_peak_bytes_count_tensors_that_exist_at_once():
    with memory.PeakBytes() as counted:
        a = torch.zeros(1000)
        b = a + 1
        view = b[:10]
        del b
        assert counted.peak == 8000
        del view
        for _ in range(3):
            a = a + 1  # frees the previous a
        a.add_(1)
    assert counted.peak == 8000


@pytest.mark.parametrize(
    "options, message",
    [
        (("--method", "nonsense"), "--method: expected one of lora, lora+"),
        (("--method", "ilora:lambda=1"), "--method: expected ilora:KEY=VALUE,… with lam=0.1, rho=None"),
        (("--method", "ilora:lam"), "lam=0.1"),
        (("--method", "ilora:lam=1,lam=2"), "lam=0.1"),
        (("--method", "ilora:lam=nan"), "--method ilora:lam: expected a finite number"),
        (("--method", "lora:lr=0"), "--method lora:lr: expected a finite number above 0"),
        (("--method", "lora:lam=1"), "with lr=(that of --lr)"),
        (("--method", "nb-lora:norm=l2"), "--method nb-lora:norm: expected one of spectral, frobenius, nuclear"),
        (("--method", "nb-lora:bound=0"), "--method nb-lora:bound: expected a finite number above 0"),
        (("--norm", "spectral"), "--norm: expected a --method nb-lora that leaves norm open, got --method lora"),
        (("--method", "nb-lora:norm=nuclear", "--norm", "spectral"), "--norm: expected a --method nb-lora that leaves"),
        (("--method", "nb-lora:bound=1", "--bound-ratio", 0.5), "--bound-ratio: expected a --method nb-lora that"),
        (("--method", "nb-lora", "--norm", "l2"), "--norm: expected one of spectral, frobenius, nuclear, got 'l2'"),
        (("--method", "nb-lora", "--bound", 0), "--bound: expected a finite number above 0, got 0.0"),
        (("--method", "nb-lora", "--bound", "nan"), "--bound: expected a finite number above 0, got nan"),
        (("--method", "nb-lora", "--bound-ratio", -1), "--bound-ratio: expected a finite number above 0, got -1.0"),
        (("--method", "nb-lora", "--bound", 1, "--bound-ratio", 1), "--bound-ratio: expected either --bound or"),
        (("--method", "nb-lora", "--engine", "eager"), "--engine: expected fused for nb-lora"),
        (("--method", "sing-lora", "--engine", "eager"), "--engine: expected fused for sing-lora"),
        (("--method", "sing-lora:ramp_steps=-1"), "--method sing-lora:ramp_steps: expected an integer of at least 0"),
        (("--method", "lora", "--method", "ilora"), "--method: expected one method, or several with --compare"),
        (("--method", "lora", "--method", "lora", "--compare"), "--method: expected each method with its options once"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_method_is_named_and_writes_nothing(place, options, message):
    refused(invoke(place, "--output", place / "never", *options), message)
    assert not (place / "never").exists()
