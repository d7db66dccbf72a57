"""Layers in the replicas that nn.DataParallel makes for each forward. On a CPU only the broadcast is replaced."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
import torch.nn.parallel.replicate  # the module: torch.nn.parallel.replicate is the function, too
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_fast as lf
from lora_fast import backend
from lora_fast.layers.fused_peft import FusedLoraLinear

TARGETS = ["0", "2"]
INJECTED = {
    "LoRALinear": lf.LoRAConfig(r=4),
    "DoRALinear": lf.LoRAConfig(r=4, use_dora=True),
    "NBLoRALinear": lf.NBLoRAConfig(r=4),
    "SingLoRALinear": lf.SingLoRAConfig(r=4, ramp_steps=0),
}
KINDS = [*INJECTED, "fused PEFT layer"]
LAYER = dict.fromkeys(INJECTED, "0") | {"fused PEFT layer": "base_model.model.0"}


@pytest.fixture
def replicate(monkeypatch):
    """Replicates a module as torch does, with copies on the CPU in place of those on other GPUs."""
    module = sys.modules["torch.nn.parallel.replicate"]

    def broadcast(tensors, devices, detach=False):
        copies = [[t.clone() for t in tensors] for _ in devices]
        return [[t.detach() for t in replica] for replica in copies] if detach else copies

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    return lambda model: module.replicate(model, [0, 1], detach=not torch.is_grad_enabled())


def build(kind, dropout=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8, bias=False))
    if kind in INJECTED:
        lf.inject_(model, INJECTED[kind], progress=False)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, lora_dropout=dropout))
        lf.fuse_(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "free_b" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def fused_layers(model):
    return [layer for layer in model.modules() if type(layer) is FusedLoraLinear]


def gradients(model, outputs):
    model.zero_grad()
    sum(y.square().sum() for y in outputs).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", KINDS)
def test_replicas_compute_as_the_model_and_give_it_their_gradients(kind, checkpointed, replicate, monkeypatch):
    monkeypatch.setattr(peft.tuners.lora.Linear, "forward", lambda *args: pytest.fail("PEFT's forward ran"))
    model, parts = build(kind), torch.randn(2, 3, 16).requires_grad_().unbind()
    run = (
        (lambda module, x: checkpoint(module, x, use_reentrant=False)) if checkpointed else lambda module, x: module(x)
    )
    expected = [model(x) for x in parts]
    wanted = gradients(model, expected)
    replicas = replicate(model)
    outputs = [run(replica, x) for replica, x in zip(replicas, parts, strict=True)]
    got = gradients(model, outputs)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(got, wanted)
    assert all(layer.fallback_reason is None for module in (model, *replicas) for layer in fused_layers(module))


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_compute_without_gradients(kind, replicate):
    model, x = build(kind).eval(), torch.randn(3, 16)
    with torch.no_grad():
        expected = model(x)
        for replica in replicate(model):
            torch.testing.assert_close(replica(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_of_merged_layers_compute_as_the_model(kind, replicate):
    model, x = build(kind).eval(), torch.randn(3, 16)
    lf.merge_(model)
    expected = model(x)
    for replica in replicate(model):
        torch.testing.assert_close(replica(x), expected)
    assert {layer.fallback_reason for layer in fused_layers(model)} <= {"merged"}


def test_dropout_of_a_fused_layer_acts_in_its_replicas(replicate):
    model, x = build("fused PEFT layer", dropout=0.5).train(), torch.randn(3, 16)
    replica = replicate(model)[0]
    assert not torch.equal(replica(x), replica(x))
    assert {layer.fallback_reason for layer in fused_layers(model)} == {None}


def test_reason_noted_on_a_replica_shows_on_the_layer(replicate):
    model, x = build("fused PEFT layer"), torch.randn(3, 16)
    first, second = replicate(model)
    with pytest.raises(RuntimeError, match="dtype"):
        first(x.double())
    second(x)  # does not hide the other replica's reason
    assert fused_layers(model)[0].fallback_reason == "torch.float64 input to torch.float32 weights"
    for replica in replicate(model):  # the next forward
        replica(x)
    assert fused_layers(model)[0].fallback_reason is None


@pytest.mark.parametrize("kind", KINDS)
def test_reason_of_a_replica_s_call_shows_on_the_layer(kind, replicate):
    model = build(kind)
    with torch.autograd.forward_ad.dual_level():
        [replica(torch.randn(3, 16)) for replica in replicate(model)]
    assert model.get_submodule(LAYER[kind]).fallback_reason == "forward-mode differentiation"


@pytest.mark.parametrize("kind", KINDS)
def test_block_holds_in_the_threads_of_its_replicas(kind, replicate, monkeypatch):
    """nn.DataParallel runs each replica in a thread of its own."""
    loaded, load = [], backend.load_ops
    note = lambda family, triton: loaded.append((family, triton)) or load(family, triton)
    monkeypatch.setattr(backend, "load_ops", note)
    model, x = build(kind).eval(), torch.randn(3, 16)
    with ThreadPoolExecutor(1) as pool:
        for name in ("torch", "triton"):
            with lf.set_backend(name), torch.no_grad():
                replicas = replicate(model)
                loaded.clear()
                outputs = [pool.submit(replica, x).result() for replica in replicas]
            assert {triton for family, triton in loaded if family in ("linear", "dora")} == {name == "triton"}
            torch.testing.assert_close(outputs, [model(x)] * 2)


def test_reason_of_the_layer_is_not_its_replicas_own(replicate):
    model, x = build("fused PEFT layer"), torch.randn(3, 16)
    with model.disable_adapter():
        for replica in replicate(model):
            replica(x)
    assert {layer.fallback_reason for layer in fused_layers(model)} == {"adapters disabled"}
    replica = replicate(model)[0]
    assert {layer.fallback_reason for layer in fused_layers(replica)} == {None}


@pytest.mark.parametrize("kind", KINDS)
def test_model_is_copied_and_pickled_after_it_was_replicated(kind, replicate):
    model, x = build(kind).eval(), torch.randn(3, 16)
    keys, expected = model.state_dict().keys(), model(x)
    for replica in replicate(model):
        replica(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.state_dict().keys() == keys
        torch.testing.assert_close(other(x), expected)


def test_replica_of_nb_lora_does_not_use_factors_of_the_layer(replicate):
    model, x = build("NBLoRALinear").eval(), torch.randn(3, 16)
    with torch.no_grad():
        model(x)  # fills the layers' caches
        replicas = replicate(model)
        caches = [layer.cache for layer in model.modules() if isinstance(layer, lf.NBLoRALinear)]
        for replica in replicas:
            layers = [layer for layer in replica.modules() if isinstance(layer, lf.NBLoRALinear)]
            assert all(layer.cache is None for layer in layers)
            replica(x)
            assert all(layer.cache not in (None, *caches) for layer in layers)
    assert all(cache is not None for cache in caches)


def test_replica_in_a_forward_that_shares_factors_computes_its_own(replicate):
    class Outer(nn.Module):
        """A model whose inner module runs in replicas, as with nn.DataParallel around a part of it."""

        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(16, 8))

        def forward(self, x):
            replicas = replicate(self.inner)
            assert self.inner[0].shared is not None
            assert all(replica[0].shared is None for replica in replicas)
            return sum(replica(x) for replica in replicas) / len(replicas)

    torch.manual_seed(0)
    model, x = Outer(), torch.randn(3, 16)
    lf.inject_(model, lf.NBLoRAConfig(r=4), progress=False)
    nn.init.normal_(model.inner[0].free_b)
    torch.testing.assert_close(model(x), model.inner(x))
