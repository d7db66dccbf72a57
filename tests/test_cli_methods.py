"""lora-fast finetune --method: each method trains, differs from plain LoRA, and resumes to the same bits."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_cli import at_step, invoke, place, resume, same_result  # noqa: F401  (place is a fixture)

from lora_fast import methods
from lora_fast.cli.methods import METHODS, build


@pytest.fixture(scope="module")
def plain(place):  # noqa: F811
    """The adapter of plain LoRA."""
    assert invoke(place, "--output", place / "plain").exit_code == 0
    return load_file(place / "plain" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lora"])
def test_each_method_trains(place, plain, method):  # noqa: F811
    folder = place / f"method {method}"
    result = invoke(place, "--output", folder, "--method", method)
    assert result.exit_code == 0, result.output
    run = json.loads((folder / "metrics.json").read_text())["runs"]["fused"]
    assert run["held_out"][-1][1] < run["held_out"][0][1]
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == plain.keys() and not all(torch.equal(adapter[key], plain[key]) for key in plain)


@pytest.mark.parametrize("method", ["ilora", "balora", "lora-rite"])
def test_resumes_to_the_same_bits(place, monkeypatch, method):  # noqa: F811
    whole, stopped = place / f"whole {method}", place / f"stopped {method}"
    assert invoke(place, "--output", whole, "--method", method).exit_code == 0
    with monkeypatch.context() as patched:
        at_step(patched, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert invoke(place, "--output", stopped, "--method", method).exit_code == 130
    result = resume(stopped)
    assert result.exit_code == 0, result.output
    same_result(whole, stopped)


def test_options_become_hyperparameters():
    assert build("ilora", "lam=0.5, rho_scale=2") == [methods.ILoRA(lam=0.5, rho_scale=2)]
    assert build("balora", "gauge=svd,every=3") == [methods.BaLoRA(gauge="svd", every=3)]
    assert build("scale-reg", "decoupled=true") == [methods.ScaleReg(decoupled=True)]
    assert build("lora", None) == []


@pytest.mark.parametrize(
    "options, message",
    [
        (("--method", "nonsense"), "--method: expected one of lora, lora+"),
        (("--method", "ilora", "--method-options", "lambda=1"), "lam=0.1"),
        (("--method", "ilora", "--method-options", "lam"), "lam=0.1"),
        (("--method", "ilora", "--method-options", "lam=nan"), "--method-options lam"),
        (("--method-options", "lam=1"), "lora has no options"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_methods_are_named(place, options, message):  # noqa: F811
    result = invoke(place, "--output", place / "never", *options)
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not (place / "never").exists()
