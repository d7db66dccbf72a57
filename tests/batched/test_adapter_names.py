"""PEFT's ``adapter_names`` on fused layers: which batches the op computes, with PEFT's results, and which stay PEFT's,
with the reason."""

import peft
import pytest
import torch
from fused_models import fused_layers, hook_base
from tiny import batch, fill, peft_llama
from torch import nn

import lora_fast as lf
from lora_fast.kernels.inspection import interpreter

NAMES = ["b", "__base__", "default", "c", "b", "default"]
TARGETS = ["q_proj", "up_proj", "down_proj"]


def adapted(dtype=torch.float32, adapter=None, c_targets=("q_proj",), **options) -> nn.Module:
    """Returns a model with adapters of ranks 4, 3 and 16, of which the last has fewer layers."""
    model = peft_llama(dtype=dtype, targets=TARGETS)
    model.add_adapter("b", peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, **options))
    model.add_adapter("c", peft.LoraConfig(r=16, use_rslora=True, target_modules=list(c_targets)))
    fill(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter or dtype)
    return model.eval()


def logits(model: nn.Module, names=NAMES) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch(rows=len(names)), adapter_names=names).logits


def pair(**options) -> tuple[nn.Module, nn.Module]:
    ours, theirs = adapted(**options), adapted(**options)
    theirs.load_state_dict(ours.state_dict())
    lf.fuse_(ours)
    return ours, theirs


def reasons(model: nn.Module) -> set:
    return {layer.fallback_reason for layer in fused_layers(model)}


DTYPES = [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]
CASES = [(backend, *dtypes) for backend in ("torch", "triton") for dtypes in DTYPES]


@pytest.mark.parametrize("backend, dtype, adapter", [*CASES, ("torch", torch.float64, None)], ids=str)
def test_logits_are_pefts(backend, dtype, adapter):
    ours, theirs = pair(dtype=dtype, adapter=adapter)
    exact = adapted(dtype=torch.float64)
    exact.load_state_dict(ours.state_dict())
    wanted, eager = logits(exact), logits(theirs)
    with lf.set_backend(backend):
        got = logits(ours)
    assert reasons(ours) == {None} and got.dtype is eager.dtype
    error = lambda result: (result.double() - wanted).norm() / wanted.norm()
    # The roundings of the layers around the adapters are nearly all of the error of 16-bit logits.
    assert error(got) <= 1.3 * error(eager) + 8 * torch.finfo(dtype).eps * (dtype.itemsize > 2)
    assert not torch.allclose(eager, logits(theirs, ["__base__"] * 6), atol=1e-2), "the adapters change the logits"


def test_adapter_of_each_row_is_its_own():
    """Each row has the logits that it has alone, with its adapter active."""
    ours, theirs = pair(dtype=torch.float64)
    together = logits(ours)
    for i, name in enumerate(NAMES):
        if name != "__base__":
            theirs.set_adapter(name)
            with torch.no_grad():
                alone = theirs(input_ids=batch(rows=6)).logits[i]
            torch.testing.assert_close(together[i], alone, atol=1e-12, rtol=0)


def test_batch_is_two_launches_a_layer():
    ours, _ = pair()
    with lf.set_backend("triton"), interpreter.traffic() as counted:
        logits(ours)
    launches = ["lora_batched_project_kernel", "lora_batched_update_kernel"]
    assert sorted(counted.launches) == sorted(launches * len(list(fused_layers(ours))))


def with_gradients(model):
    model(input_ids=batch(rows=6), adapter_names=NAMES)


def with_hooks(model):
    hook_base(model)
    logits(model)


def under_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits(model)


def without_adapters(model):
    logits(model, ["__base__"] * 6)


def in_several_dtypes(model):
    for name, parameter in model.named_parameters():
        if "lora_A.b" in name or "lora_B.b" in name:
            parameter.data = parameter.data.double()
    logits(model)


FALLBACKS = {
    "with gradients": (with_gradients, {}),
    "hooks": (with_hooks, {}),
    "under autocast": (under_autocast, {}),
    "of which the layer has none": (without_adapters, {}),
    "of several dtypes": (in_several_dtypes, {}),
    "bias on lora_B": (logits, {"lora_bias": True}),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_other_batches_run_by_peft(reason):
    call, options = FALLBACKS[reason]
    ours, _ = pair(**options)
    call(ours)
    assert any(reason in (given or "") for given in reasons(ours))


def test_refusals_are_pefts():
    ours, _ = pair(use_dora=True)
    with pytest.raises(ValueError, match="adapter_names"):
        logits(ours)
    assert logits(ours, ["default", "c"]).isfinite().all() and reasons(ours) == {None}
    ours.merge_adapter(["default"])
    with pytest.raises(ValueError, match="merged adapters"):
        logits(ours, ["default", "c"])
