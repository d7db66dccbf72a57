"""Raises every error that docs/troubleshooting.md quotes, and compares the texts, so that a search for an error's text
finds the page."""

import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import accelerate
import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Trainer, TrainingArguments
from triton.runtime.errors import OutOfResources

import lora_fast as lf
from lora_fast import backend, checks, platforms
from lora_fast.batches.batch import Batch
from lora_fast.cli.inputs import models, quantization
from lora_fast.cli.output import run_folder
from lora_fast.kernels import device, launch, pointer_table, tiles
from lora_fast.kernels.linear import gluon_gemm
from lora_fast.layers.merge_log import record

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"(?<!\*)\*`([^`]+)`\*(?!\*)", " ".join(PAGE.split()))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def injected() -> nn.Module:
    model = plain()
    lf.inject_(model, lf.LoRAConfig(r=2))
    return model


def linear(weight_dtype=torch.float32, device="cpu", trained=False):
    weight = torch.ones(6, 8, dtype=weight_dtype, requires_grad=trained)
    a, b = torch.ones(2, 8, device=device, requires_grad=True), torch.ones(6, 2, requires_grad=True)
    return lf.functional.lora_linear(torch.ones(3, 8), weight, None, a, b, 1.0)


def one_factor_frozen() -> None:
    model = injected()
    optimizer = lf.optim.LoRAAdamW(model, methods=[lf.methods.ILoRA()])
    model(torch.ones(3, 8)).sum().backward()
    model[0].lora_A.grad = None
    optimizer.step()


def quantized_twice() -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            architectures=["LlamaForCausalLM"], quantization_config={"quant_method": "gptq", "bits": 4}
        )
        config.save_pretrained(folder)
        models.load_config(folder, "nf4")


def format_without_its_package() -> None:
    with mock.patch.object(quantization.util, "find_spec", return_value=None):
        quantization.check_installed("nf4")


def another_state() -> None:
    saved = lf.optim.LoRAAdamW(injected(), methods=[lf.methods.ILoRA()]).state_dict()
    lf.optim.LoRAAdamW(injected()).load_state_dict(saved)


def other_groups() -> None:
    saved = torch.optim.AdamW([{"params": [p]} for p in injected().parameters() if p.requires_grad]).state_dict()
    lf.optim.LoRAAdamW(injected()).load_state_dict(saved)


def incomplete_checkpoints() -> None:
    """A run of a Trainer with ScaLoRA, in which the warning is an error."""
    model = injected()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        choice = lf.hf.optimizer_cls_and_kwargs(methods=[lf.methods.ScaLoRA()])
        args = TrainingArguments(folder, use_cpu=True, report_to="none")
        trainer = Trainer(model, args, train_dataset=[{}], optimizer_cls_and_kwargs=choice)
        warnings.simplefilter("error")
        trainer.create_optimizer()


def step_while_merged() -> None:
    model = injected()
    optimizer = lf.optim.LoRAAdamW(model, methods=[lf.methods.ScaLoRA()])
    model(torch.ones(1, 8)).sum().backward()
    lf.merge_(model)
    optimizer.step()


def not_mergeable() -> None:
    model = injected()
    optimizer = lf.optim.LoRAAdamW([(model[0].lora_A, model[0].lora_B)], methods=[lf.methods.ScaLoRA()])
    model(torch.ones(3, 8)).sum().backward()
    optimizer.step()


def changed_experts() -> None:
    experts = nn.Module()
    experts.matrices = nn.Parameter(torch.ones(2, 6, 8))
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.matrices"])
    model = peft.get_peft_model(nn.ModuleDict({"experts": experts}), config)
    optimizer = lf.optim.LoRAAdamW(model, methods=[lf.methods.ScaLoRA()])
    model.base_model.model["experts"].get_delta_weight("default").sum().backward()
    optimizer.step()
    lf.save_adapter(model, "/no/such/folder")


def too_large() -> None:
    launched = launch.Launch(SimpleNamespace(__name__="lora_grad_a_kernel"), (1,), (), {"R": 16})
    error = OutOfResources(204800, 101376, "shared memory")
    raise launch.LaunchError(launched._too_large(error, device.CARDS[89])) from error


def gluon_on_an_a100() -> None:
    x, weight = torch.zeros(16, 64, dtype=torch.bfloat16), torch.zeros(32, 64, dtype=torch.bfloat16)
    with tiles.assume(arch=80):
        gluon_gemm.GluonGemm(x, weight, None, torch.zeros(32, 8), 8, False, True, (16, 32))


def on_triton(x: torch.Tensor) -> None:
    with lf.set_backend("triton"):
        backend.uses_triton(x)


def float64_on_a_gpu() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platforms, "_gpu_obstacles", {0: None})
        on_triton(tensor_on_a_gpu(torch.float64))


def tensor_on_a_gpu(dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0), get_device=lambda: 0)


def warned_of_plain_torch() -> None:
    with warnings.catch_warnings(), lf.set_backend("auto"):
        warnings.simplefilter("error")
        backend.uses_triton(tensor_on_a_gpu())


def due() -> None:
    pair = SimpleNamespace(a=SimpleNamespace(device=torch.device("cuda")))
    Batch.due(SimpleNamespace(pairs=[pair], count=1), 2)


def trained_beside_the_adapter() -> None:
    model = injected()
    model[0].bias.requires_grad_(True)
    lf.save_adapter(model, "/no/such/folder")


def without_config() -> None:
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), plain())
    del model.peft_config
    lf.save_adapter(model, "/no/such/folder")


def parts_with_other_settings() -> None:
    configs = [peft.LoraConfig(target_modules=["0"], lora_dropout=p) for p in (0.0, 0.1)]
    parts = [peft.inject_adapter_in_model(config, plain()) for config in configs]
    lf.save_adapter(nn.ModuleList(parts), "/no/such/folder")


def loaded(model: nn.Module, edit: Callable[[Path], object] = lambda folder: None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lf.save_adapter(injected(), folder)
        edit(Path(folder))
        lf.load_adapter(model, folder)


def with_pissa(folder: Path) -> None:
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'))


class Pretrained(nn.Sequential):  # with a signature like transformers'
    def save_pretrained(self, save_directory, state_dict=None, push_to_hub=False):
        raise AssertionError


def saved(merged: bool, **options) -> None:
    model = Pretrained(nn.Linear(8, 6))
    lf.inject_(model, lf.LoRAConfig(r=2))
    with tempfile.TemporaryDirectory() as folder:
        if merged:
            lf.save_adapter(model, folder)
            lf.merge_(model)
        model.save_pretrained(folder, **options)


def tied() -> nn.Module:
    model = injected()
    model.register_module("tied", nn.Linear(8, 6))
    model.tied.weight = model[0].weight
    return model


def offloaded_while_merged() -> None:
    model = injected()
    lf.merge_(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))(torch.ones(3, 8))


ERRORS = {
    "model: expected layers that can all be merged": lambda: lf.unload_(tied()),
    "model: expected to be unmerged before": offloaded_while_merged,
    "save_directory: expected a folder without": lambda: saved(merged=True),
    "push_to_hub: expected False": lambda: saved(merged=False, push_to_hub=True),
    "target_modules: expected at least one torch": lambda: lf.inject_(plain(), lf.LoRAConfig(target_modules=["q"])),
    "init_lora_weights: expected an initialisation that needs": lambda: lf.inject_(
        plain(), peft.LoraConfig(target_modules=["0"], init_lora_weights="eva", eva_config=peft.EvaConfig())
    ),
    "lora_bias: expected its default": lambda: lf.inject_(
        plain(), peft.LoraConfig(target_modules=["0"], lora_bias=True)
    ),
    "model: expected a model without PEFT layers": lambda: lf.inject_(
        peft.get_peft_model(plain(), peft.LoraConfig(target_modules=["0"])), lf.LoRAConfig()
    ),
    "peft_model: expected": lambda: lf.fuse_(plain()),
    "x: expected weight's dtype": lambda: linear(torch.bfloat16),
    "… expected a tensor on x's device": lambda: linear(device="meta"),
    "weight: expected a frozen tensor": lambda: linear(trained=True),
    "… expected a gradient": one_factor_frozen,
    "methods: expected at most one": lambda: lf.optim.LoRAAdamW(
        injected(), methods=[lf.methods.ILoRA(), lf.methods.BaLoRA()]
    ),
    "LaunchError: … needs": too_large,
    "strategy 'gluon': expected": gluon_on_an_a100,
    "backend 'triton' on cuda": lambda: on_triton(tensor_on_a_gpu()),
    "lora_fast runs plain torch on cuda": warned_of_plain_torch,
    "expected Triton 3.6 or later": lambda: platforms.require("lora-fast inspect", platforms._wrong_triton("none")),
    "LORA_FAST_BACKEND: expected": lambda: checks.choice("tritton", "LORA_FAST_BACKEND", backend.BACKENDS),
    "backend 'triton' on cpu": lambda: on_triton(torch.ones(1)),
    "backend 'triton' with float64": float64_on_a_gpu,
    "… expected a weight that ScaLoRA": not_mergeable,
    "… expected a weight without a merged adapter": step_while_merged,
    "… expected base weights that an adapter's files": changed_experts,
    "model: expected a model with trained adapters … got a": lambda: lf.optim.LoRAAdamW(plain()),
    "model: expected a model with trained adapters … whose": lambda: lf.optim.LoRAAdamW(
        injected().requires_grad_(False)
    ),
    "model[0]: expected a pair": lambda: lf.optim.LoRAAdamW(injected().parameters()),
    "… expected no trained parameters": trained_beside_the_adapter,
    "model: expected PEFT's config": without_config,
    "… expected one setting, as the file": parts_with_other_settings,
    "… expected a parameter with data": lambda: loaded(plain().to("meta")),
    "path: expected adapter_model": lambda: loaded(
        plain(), lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    ),
    "init_lora_weights: expected": lambda: loaded(plain(), with_pissa),
    "state_dict: expected groups": other_groups,
    "state_dict: expected": another_state,
    "ScaLoRA changes frozen weights": incomplete_checkpoints,
    "--quantize: expected a model": quantized_twice,
    "--quantize nf4 needs": format_without_its_package,
    "--resume: expected": lambda: run_folder.saved_settings(None, {}),
    "CheckpointError": lambda: lf.load_adapter(plain(), "/no/such/folder"),
    "a tensor of the step has moved": lambda: pointer_table.cached(
        "factors", [torch.device("cpu"), "never seen"], lambda: None
    ),
    "interval, every: expected 1": due,
    "keep: expected 'weights'": lambda: record(plain()[0], SimpleNamespace(is_cuda=True), None, None, keep="terms"),
}


def test_every_quoted_error_has_a_test():
    assert {next((key for key in ERRORS if quoted.startswith(key)), quoted) for quoted in QUOTED} == set(ERRORS)


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_error_has_the_quoted_text(quoted, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(platforms, "_gpu_obstacles", {})
    monkeypatch.setattr(backend, "_warned_of", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(Exception, match=r".") as raised:
        next(run for key, run in ERRORS.items() if quoted.startswith(key))()
    message = f"{raised.type.__name__}: {' '.join(str(raised.value).split())}"
    for part in filter(None, map(str.strip, quoted.split("…"))):
        assert part in message


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_missing_package_of_the_command_line_is_named(package):
    code = f"import sys; sys.modules[{package!r}] = None; import lora_fast.cli"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = process.stderr.splitlines()[-1]
    assert last.startswith("lora_fast.checks.MissingPackageError") and "pip install typer rich" in last
