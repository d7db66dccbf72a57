"""FusedLoraLinear: the same results as PEFT's own layer, and everything that PEFT does with a layer still works."""

import contextlib
import copy

import budget
import pytest
import torch
from fused_models import (
    LLAMA_LINEARS,
    PROBE,
    fused_layers,
    fused_llama,
    hook_base,
    hook_lora,
    merge_all,
    patch_base,
    probe_model,
    train_base,
)
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from tiny import (
    COPIES,
    VOCABULARY,
    assert_same_tensors,
    assert_unchanged,
    batch,
    fill,
    injected_llama,
    llama,
    loss_of,
    peft_llama,
    snapshot,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import lora_fast as lf
from lora_fast.layers import merging
from lora_fast.layers.fused_peft import FusedLoraLinear

STEPS = 50


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# one layer against PEFT's


DTYPES = {
    "float32": (torch.float32, torch.float32, None),
    "bfloat16": (torch.bfloat16, torch.bfloat16, None),
    "float16": (torch.float16, torch.float16, None),
    "float32-autocast": (torch.float32, torch.float32, torch.bfloat16),
    "bfloat16-base-float32-adapters-autocast": (torch.bfloat16, torch.float32, torch.bfloat16),
    "bfloat16-base-float32-adapters": (torch.bfloat16, torch.float32, None),
}


LAYERS = {  # base layer, whether it has a bias, whether lora_B has one
    "bias": (nn.Linear, True, False),
    "no-bias": (nn.Linear, False, False),
    "conv1d": (Conv1D, True, False),
    "lora-bias": (nn.Linear, True, True),
    "lora-bias-alone": (nn.Linear, False, True),
    "conv1d-lora-bias": (Conv1D, True, True),
}


def build_layer(base_dtype, adapter_dtype, kind, **options):
    base, bias, lora_bias = LAYERS[kind]
    torch.manual_seed(0)
    linear = nn.Linear(48, 40, bias=bias) if base is nn.Linear else Conv1D(40, 48)
    config = LoraConfig(r=5, lora_alpha=9, target_modules=["0"], lora_bias=lora_bias, **options)
    layer = get_peft_model(nn.Sequential(linear).to(base_dtype), config).base_model.model[0]
    for parameter in (*layer.lora_B.parameters(), *([linear.bias] if bias else ())):
        nn.init.normal_(parameter, std=0.2)
    layer.lora_A.to(adapter_dtype), layer.lora_B.to(adapter_dtype)
    return layer


def run_layer(layer, x, dy, autocast):
    x = x.clone().requires_grad_()
    cast = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    with cast:
        y = layer(x)
    y.backward(dy.to(y.dtype))
    trained = {"da": layer.lora_A["default"].weight, "db": layer.lora_B["default"].weight}
    trained |= {"dbias": bias} if (bias := layer.lora_B["default"].bias) is not None else {}
    return {"y": y.detach(), "dx": x.grad} | {name: parameter.grad for name, parameter in trained.items()}


@pytest.mark.filterwarnings("ignore:.*lora_bias", "ignore:fan_in_fan_out")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("case", DTYPES)
def test_fused_layer_is_as_exact_as_peft(case, kind, backend):
    base_dtype, adapter_dtype, autocast = DTYPES[case]
    eager = build_layer(base_dtype, adapter_dtype, kind, use_rslora=kind == "lora-bias")
    fused, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    fused.__class__ = FusedLoraLinear
    x, dy = torch.randn(2, 7, 48).to(base_dtype), torch.randn(2, 7, 40).to(autocast or base_dtype)
    with lf.set_backend(backend):
        got, theirs = run_layer(fused, x, dy, autocast), run_layer(eager, x, dy, autocast)
    truth = run_layer(exact, x.double(), dy.double(), None)
    assert fused.fallback_reason is None and got.keys() == theirs.keys()
    for name in got:
        assert got[name].dtype == theirs[name].dtype, name
        dtype, least = autocast or base_dtype, 0.0
        if name in ("da", "db", "dbias") and not autocast:
            dtype, least = adapter_dtype, budget.least_error(base_dtype, adapter_dtype)
        budget.check(name, got[name], truth[name], budget.error(theirs[name], truth[name]), dtype, least)


@pytest.mark.filterwarnings("ignore:.*lora_bias", "ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["conv1d", "lora-bias"])
def test_dropout_of_all_leaves_the_frozen_layer_and_the_bias_of_lora_b(kind):
    layer = build_layer(torch.float32, torch.float32, kind, lora_dropout=1.0)
    layer.__class__ = FusedLoraLinear
    x, scaled = torch.randn(3, 48), 0.0
    if kind == "lora-bias":
        scaled = layer.lora_B["default"].bias * layer.scaling["default"]
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scaled)
    assert layer.fallback_reason is None


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_fused_gpt2_trains_as_peft():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=16)).eval()
    theirs = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    ours = copy.deepcopy(theirs)
    assert len(lf.fuse_(ours).changed) == 4
    for model in (theirs, ours):
        model(input_ids=batch(), labels=batch()).loss.backward()
    for (name, got), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if got.requires_grad:
            torch.testing.assert_close(got.grad, wanted.grad, msg=name)


def test_fused_model_runs_every_layer_fused():
    model = fused_llama()
    model(batch())
    assert [layer.fallback_reason for layer in fused_layers(model)] == [None] * LLAMA_LINEARS


# PEFT's forward wherever the fused op would not compute the same


@contextlib.contextmanager
def changed(change, model):
    change(model)
    yield


def add_second(model, name="second", **options):
    torch.manual_seed(2)
    model.add_adapter(name, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], **options))
    fill(model, seed=2)


def two_active(model):
    add_second(model)
    model.base_model.set_adapter(["default", "second"])


def other_targets(model):
    model.add_adapter("other", LoraConfig(r=3, target_modules=["k_proj"]))
    model.set_adapter("other")


def variant_active(model):
    add_second(model, "alora", alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    model.set_adapter("alora")


def add_bias_to_lora_a(model):
    layer = model.get_submodule(PROBE)
    a = layer.lora_A["default"]
    a.bias = nn.Parameter(torch.linspace(-1.0, 1.0, a.out_features))


@contextlib.contextmanager
def global_hook():
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, y: y / 2 if type(module) is nn.Linear else y
    )
    yield
    hook.remove()


FALLBACKS = {
    "disabled": (lambda model: model.disable_adapter(), "adapters disabled"),
    "merged": (lambda model: changed(merge_all, model), "merged"),
    "two-active": (lambda model: changed(two_active, model), "2 active adapters"),
    "not-in-this-layer": (lambda model: changed(other_targets, model), "no adapter 'other'"),
    "variant": (lambda model: changed(variant_active, model), "ALoraLinearVariant"),
    "hook": (lambda model: changed(hook_base, model), "hooks"),
    "lora-hook": (lambda model: changed(hook_lora, model), "hooks"),
    "replaced-forward": (lambda model: changed(patch_base, model), "replaced forward"),
    "lora-a-bias": (lambda model: changed(add_bias_to_lora_a, model), "bias on lora_A"),
    "global-hook": (lambda model: global_hook(), "hooks of all modules"),
    "trainable-base": (lambda model: changed(train_base, model), "trainable base"),
    "no-input-cast": (lambda model: disable_input_dtype_casting(model), "casting of the input is off"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_forward_falls_back_to_peft_with_the_reason(case):
    change, reason = FALLBACKS[case]
    theirs, ours = probe_model(), probe_model()
    lf.fuse_(ours)
    with change(theirs), change(ours):
        assert torch.equal(ours(batch()).logits, theirs(batch()).logits) or case == "merged"  # merged: rounded once
        assert reason in ours.get_submodule(PROBE).fallback_reason


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_fall_back_to_peft(dtype):
    """float8 activations are cast by autocast."""
    theirs = build_layer(torch.float32, torch.float32, "bias")
    ours = copy.deepcopy(theirs)
    ours.__class__ = FusedLoraLinear
    x, results = torch.randn(3, 48).to(dtype), []
    for layer in (theirs, ours):
        layer = layer.to(dtype) if dtype.is_complex else layer
        with torch.autocast("cpu", torch.bfloat16, enabled=not dtype.is_complex):
            results.append(layer(x))
    assert torch.equal(*results) and ours.fallback_reason == f"{dtype} input"


def test_adapter_names_per_row_with_gradients_fall_back_to_peft():
    theirs, ours = probe_model().eval(), probe_model().eval()
    lf.fuse_(ours)
    for model in (theirs, ours):
        add_second(model)
        model.eval()
    names = ["second", "default"]
    assert torch.equal(ours(batch(), adapter_names=names).logits, theirs(batch(), adapter_names=names).logits)
    assert ours.get_submodule(PROBE).fallback_reason == "adapter_names with gradients"


def test_fallback_reason_is_cleared_by_a_fused_call():
    model = fused_llama()
    with model.disable_adapter():
        model(batch())
    assert fused_layers(model)[0].fallback_reason == "adapters disabled"
    model(batch())
    assert fused_layers(model)[0].fallback_reason is None


def test_mismatched_input_dtype_raises_as_in_torch():
    layer = build_layer(torch.float32, torch.float32, "bias")
    layer.__class__ = FusedLoraLinear
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(2, 48, dtype=torch.bfloat16))
    assert layer.fallback_reason == "torch.bfloat16 input to torch.float32 weights"


# PEFT's life cycle


def test_set_adapter_switches_the_fused_adapter():
    theirs, ours = probe_model(), probe_model()
    lf.fuse_(ours)
    for model in (theirs, ours):
        add_second(model)
    for adapter in ("second", "default"):
        theirs.set_adapter(adapter), ours.set_adapter(adapter)
        for model in (theirs, ours):
            model.zero_grad()
            loss_of(model, batch()).backward()
        assert trained(ours).keys() == trained(theirs).keys()
        layer = ours.get_submodule(PROBE)
        assert layer.fallback_reason is None
        assert (layer.lora_A[adapter].weight.grad is not None) and adapter in layer.active_adapters
    ours.delete_adapter("second")
    ours(batch())
    assert ours.get_submodule(PROBE).fallback_reason is None


@pytest.mark.parametrize("move", [*COPIES, "state_dict"])
def test_fused_model_survives_copies(move):
    model = fused_llama(dropout=0.1).eval()
    if move in COPIES:
        twin = COPIES[move](model)
    else:
        twin = peft_llama(seed=5, dropout=0.1).eval()
        twin.load_state_dict(model.state_dict())
        lf.fuse_(twin)
    assert len(fused_layers(twin)) == LLAMA_LINEARS
    assert_same_tensors(twin.state_dict(), model.state_dict())
    assert torch.equal(twin(batch()).logits, model(batch()).logits)


def test_dropout_is_active_in_training_only():
    model = fused_llama(dropout=0.5)
    assert not torch.equal(model(batch()).logits, model(batch()).logits)
    model.eval()
    assert torch.equal(model(batch()).logits, model(batch()).logits)
    assert fused_layers(model)[0].fallback_reason is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_fused_model_can_be_cast(dtype):
    model = fused_llama().to(dtype)
    loss_of(model, batch()).backward()
    assert fused_layers(model)[0].fallback_reason is None
    assert {parameter.grad.dtype for parameter in trained(model).values()} == {dtype}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing_changes_no_bit(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = fused_llama(dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        loss_of(model, batch()).backward()
        gradients.append({name: parameter.grad for name, parameter in trained(model).items()})
    assert_same_tensors(*gradients)


def test_fused_model_compiles_without_a_graph_break():
    model = fused_llama(group=False)  # compiled layers make no groups, which would round dx otherwise
    loss = loss_of(model, batch())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in trained(model).items()}
    model.zero_grad()
    compiled = torch.compile(lambda ids: loss_of(model, ids), fullgraph=True, backend="aot_eager")
    again = compiled(batch())
    again.backward()
    assert torch.equal(again, loss)
    assert_same_tensors({name: parameter.grad for name, parameter in trained(model).items()}, gradients)
    torch._dynamo.reset()


# merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["lf.merge_", "merge_adapter", "merge_adapter-safe"])
def test_merge_rounds_once_and_unmerge_restores_every_bit(way, dtype):
    model = fused_llama(dtype=dtype)
    before = snapshot(model)
    if way == "lf.merge_":
        assert len(lf.merge_(model).changed) == LLAMA_LINEARS
    else:
        model.merge_adapter(safe_merge=way.endswith("safe"))
    for name, layer in model.named_modules():
        if type(layer) is FusedLoraLinear:
            a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
            weight = before["bits"][f"{name}.base_layer.weight"].float()
            assert torch.equal(layer.base_layer.weight, torch.addmm(weight, b, a, alpha=2.0).to(dtype)), name
    assert model.state_dict().keys() == before["bits"].keys()
    lf.unmerge_(model) if way == "lf.merge_" else model.unmerge_adapter()
    assert_unchanged(model, before)


def test_disable_adapter_unmerges():
    model, base = fused_llama(), peft_llama()
    before = snapshot(model)
    lf.merge_(model)
    with model.disable_adapter(), base.disable_adapter():
        assert torch.equal(model(batch()).logits, base(batch()).logits)
    assert_unchanged(model, before)


def test_two_adapters_merge_into_the_original_weight():
    model = fused_llama(targets=["q_proj"], dtype=torch.bfloat16)
    add_second(model)
    layer, before = model.get_submodule(PROBE), snapshot(model)
    weight = layer.base_layer.weight.detach().clone()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    total = weight.float()
    for adapter in ("default", "second"):
        a, b = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
        total = torch.addmm(total, b, a, alpha=layer.scaling[adapter])
    assert torch.equal(layer.base_layer.weight, total.bfloat16())
    model.unmerge_adapter()
    assert_unchanged(model, before)


def test_merge_of_a_variant_is_refused():
    model = fused_llama(targets=["q_proj"])
    variant_active(model)
    with pytest.raises(lf.ArgumentError, match="more than scaling"):
        lf.merge_(model)


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe-merge"])
def test_merge_and_unload_gives_the_plain_model(safe):
    model = fused_llama()
    logits = model(batch()).logits
    plain = model.merge_and_unload(safe_merge=safe)
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in llama().named_parameters()}
    assert not set(merging._known) & {id(p) for p in plain.parameters()}  # no original is kept
    assert (plain(batch()).logits - logits).norm() <= 8 * torch.finfo(torch.float32).eps * logits.norm()


def test_safe_merge_refuses_nan_and_changes_nothing():
    model = fused_llama(targets=["q_proj"])
    model.get_submodule(PROBE).lora_B["default"].weight.data[0, 0] = torch.inf
    before = model.get_submodule(PROBE).base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.get_submodule(PROBE).base_layer.weight, before)


# training


def train(model):
    """Losses of every step and the final adapters, as float64 vectors."""
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=5e-3)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, batch(step % 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses), torch.cat([parameter.detach().double().flatten() for parameter in adapters])


def injected_twin(peft_model):
    """A plain model with LoRALinear layers that start from the PEFT model's adapters."""
    model = injected_llama()
    for name, layer in model.named_modules():
        if isinstance(layer, lf.LoRALinear):
            theirs = peft_model.get_submodule(f"base_model.model.{name}")
            layer.lora_A.data.copy_(theirs.lora_A["default"].weight)
            layer.lora_B.data.copy_(theirs.lora_B["default"].weight)
            layer.weight.data.copy_(theirs.base_layer.weight)
    model.model.embed_tokens.load_state_dict(peft_model.base_model.model.model.embed_tokens.state_dict())
    model.lm_head.load_state_dict(peft_model.base_model.model.lm_head.state_dict())
    return model


def test_training_is_as_exact_as_peft():
    """Errors of a run differ by a third from seed to seed, so the mean of their ratios to PEFT's is what counts."""
    ratios = []
    for seed in range(4):
        eager = peft_llama(seed, filled=False)
        exact, model = copy.deepcopy(eager).double(), copy.deepcopy(eager) if seed % 2 else injected_twin(eager)
        if seed % 2:
            lf.fuse_(model)
        truth, theirs, ours = train(exact), train(eager), train(model)
        assert truth[0][-4:].mean() < truth[0][:4].mean() - 0.5  # it does learn
        unit = 2 * torch.finfo(torch.float32).eps
        pairs = zip(ours, theirs, truth, strict=True)
        ratios.append([(budget.error(got, true) - unit) / budget.error(peft, true) for got, peft, true in pairs])
        assert all(layer.fallback_reason is None for layer in fused_layers(model))
    losses, adapters = torch.tensor(ratios).clamp(min=1e-3).log().mean(0).exp()
    assert losses <= budget.EAGER and adapters <= budget.EAGER, ratios


def test_fused_layer_has_the_name_of_peft_and_says_that_it_is_fused():
    model, plain = probe_model(), probe_model()
    lf.fuse_(model)
    assert [x.module_type for x in model.get_layer_status()] == [x.module_type for x in plain.get_layer_status()]
    lines = repr(model.get_submodule(PROBE)).splitlines()
    assert lines[:2] == ["lora.Linear(", "  fused"] and lines[2:] == repr(plain.get_submodule(PROBE)).splitlines()[1:]
    with model.disable_adapter():
        model(batch())
    assert "fused, last call by PEFT's forward: adapters disabled" in repr(model.get_submodule(PROBE))


def test_hooks_of_all_modules_do_not_keep_layers_from_being_fused():
    """Those are the state of a call, which runs PEFT's forward while they are there."""
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"]))
    with FlopCounterMode(display=False):
        assert len(lf.fuse_(model).changed) == 1
        model(torch.ones(2, 6))
        assert fused_layers(model)[0].fallback_reason == "hooks of all modules"
    model(torch.ones(2, 6))
    assert fused_layers(model)[0].fallback_reason is None


def test_hooks_of_all_modules_within_a_checkpointed_region():
    """One layer of the region runs without them, the next one with them, and both do so again in backward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    first, second = model.base_model.model

    def region(x):
        x = first(x)
        with FlopCounterMode(display=False):
            return second(x)

    gradients = []
    for _ in range(2):
        x = torch.linspace(-1, 1, 12).view(2, 6).requires_grad_()
        checkpoint(region, x, use_reentrant=False).square().sum().backward()
        gradients.append(x.grad)
        lf.fuse_(model, allow_empty=True)
        first, second = model.base_model.model
    torch.testing.assert_close(*gradients)
