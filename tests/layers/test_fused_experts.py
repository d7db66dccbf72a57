"""FusedParamWrapper: the same results as PEFT's own forward over W + ΔW, which is never formed, and everything that
PEFT does with a wrapper still works."""

import copy

import budget
import pytest
import torch
from moe_layers import CLASSES, HIDDEN, INNER, E, adapted, experts, results, routed, wrapper_of
from tiny import COPIES, assert_same_tensors, assert_unchanged, snapshot
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lora_fast as lf
from lora_fast.layers.fused_experts import FusedParamWrapper

peft = pytest.importorskip("peft")

BOTH = CLASSES["gated"][2]
WITHIN = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums of at most a hundred terms


def pair(kind="gated", parameters=None, **options):
    """Returns a PeftModel and its fused copy."""
    theirs = adapted(experts(kind, **options), parameters or CLASSES[kind][2])
    ours = copy.deepcopy(theirs)
    lf.fuse_(ours)
    return theirs, ours


def reasons(model):
    return [layer.fallback_reason for layer in model.modules() if type(layer) is FusedParamWrapper]


# the formula


@pytest.mark.parametrize("adapters", ["both", "first", "last"])
@pytest.mark.parametrize("kind", CLASSES)
def test_results_are_those_of_peft(kind, adapters):
    names = {"both": CLASSES[kind][2], "first": CLASSES[kind][2][:1], "last": CLASSES[kind][2][1:]}[adapters]
    theirs, ours = pair(kind, names)
    got, want = results(ours, *routed()), results(theirs, *routed())
    assert got.keys() == want.keys() and reasons(ours) == [None] * len(names)
    for name in want:
        assert want[name].any(), name
        torch.testing.assert_close(got[name], want[name], **WITHIN, msg=name)


@pytest.mark.parametrize("kind", ["gated", "transposed with bias"])
def test_results_on_the_kernels_are_those_of_peft(kind):
    theirs, ours = pair(kind, dtype=torch.float32)
    inputs = routed(dtype=torch.float32)
    with lf.set_backend("triton"):
        got = results(ours, *inputs)
    assert reasons(ours) == [None] * 2
    torch.testing.assert_close(got, results(theirs, *inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_results_are_those_of_the_other_implementations(implementation):
    theirs, ours = pair(implementation=implementation, dtype=torch.float32)
    got, want = results(ours, *routed(dtype=torch.float32)), results(theirs, *routed(dtype=torch.float32))
    assert reasons(ours) == [None] * 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
def test_16_bits_are_as_exact_as_peft(adapter):
    eager = adapted(experts("gated", "grouped_mm", torch.bfloat16), BOTH, r=8, adapter=adapter)
    fused, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    wrapper_of(exact).get_base_layer().config._experts_implementation = "eager"
    lf.fuse_(fused)
    inputs = routed(64, torch.bfloat16)
    got, theirs = results(fused, *inputs), results(eager, *inputs)
    truth = results(exact, inputs[0].double(), inputs[1], inputs[2].double())
    assert reasons(fused) == [None] * 2
    for name in truth:
        assert got[name].dtype == theirs[name].dtype
        budget.check(name, got[name], truth[name], budget.error(theirs[name], truth[name]), torch.bfloat16)


def test_factors_in_the_other_layout_as_in_peft_0_18():
    module = experts("gated")
    module.is_transposed = True  # PEFT 0.18 takes all parameters to be (E, in, out)
    theirs = adapted(module, BOTH)
    module.is_transposed = False
    ours = copy.deepcopy(theirs)
    lf.fuse_(ours)
    assert wrapper_of(ours).lora_A["default"].weight.shape[1] == HIDDEN  # down_proj's d_out
    got, want = results(ours, *routed()), results(theirs, *routed())
    assert reasons(ours) == [None] * 2
    torch.testing.assert_close(got, want, **WITHIN)


def test_batched_gradients_are_those_of_peft():
    gradients = []
    for model in pair(dtype=torch.float32):
        x, index, weights = routed(dtype=torch.float32)
        y = wrapper_of(model)(x.requires_grad_(), index, weights)
        batch = torch.stack([torch.ones_like(y), y.detach()])
        gradients.append(torch.autograd.grad(y, x, batch, is_grads_batched=True)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


# routing


ROUTINGS = {
    "one expert twice": lambda index: index.fill_(3),
    "tokens without experts": lambda index: index[::2].fill_(E),
    "half of a token's experts": lambda index: index[:, 1].fill_(E),
    "no expert at all": lambda index: index.fill_(E),
}


@pytest.mark.parametrize("kind", ["gated", "with norm"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_unusual_routings_are_those_of_peft(name, kind):
    theirs, ours = pair(kind)
    x, index, weights = routed()
    ROUTINGS[name](index)
    none = index == E  # which counts as any expert with weight 0
    got = results(ours, x, index, weights)
    want = results(theirs, x, index.masked_fill(none, 0), weights.masked_fill(none, 0))
    want["dweights"].masked_fill_(none, 0)
    assert reasons(ours) == [None] * 2
    torch.testing.assert_close(got, want, **WITHIN)


def test_no_tokens_give_no_rows_and_zero_gradients():
    _, ours = pair()
    x, index, weights = routed()
    got = results(ours, x[:0], index[:0], weights[:0])
    assert got["y"].shape == (0, HIDDEN) and not any(grad.any() for grad in got.values())


@pytest.mark.parametrize("number", [-1, E + 1])
def test_numbers_of_no_expert_are_refused_by_name(number):
    _, ours = pair()
    x, index, weights = routed()
    index[3, 1] = number
    with pytest.raises(lf.ArgumentError, match=rf"top_k_index: expected numbers of {E} experts.* got from"):
        wrapper_of(ours)(x, index, weights)


def test_gradients_are_deterministic_in_any_order_of_tokens():
    _, ours = pair(dtype=torch.float32)
    inputs = routed(dtype=torch.float32)
    assert_same_tensors(results(ours, *inputs), results(ours, *inputs))


# PEFT's forward


def add_adapter(model, r=2):
    try:
        model.add_adapter("other", peft.LoraConfig(r=r, target_modules=[], target_parameters=PARAMETERS))
    except ValueError as error:
        pytest.skip(f"this PEFT has one adapter of parameters: {error}")


def two_active(model):
    add_adapter(model)
    model.base_model.set_adapter(["default", "other"])


def hook_experts(model):
    wrapper_of(model).get_base_layer().register_forward_hook(lambda module, args, output: output + 1)


def hook_inner(model):
    wrapper_of(model).base_layer.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))


def own_implementation(model):
    from transformers.integrations import moe

    moe.ALL_EXPERTS_FUNCTIONS["twice"] = lambda *args: 2 * moe.batched_mm_experts_forward(*args)
    wrapper_of(model).get_base_layer().config._experts_implementation = "twice"


def train_base(model):
    wrapper_of(model).get_base_layer().down_proj.requires_grad_()


def own_factor(model):
    nn.utils.parametrizations.weight_norm(wrapper_of(model).lora_A["default"])


def large_rank(model):
    add_adapter(model, 257)
    model.set_adapter("other")


def parallel(model):
    wrapper_of(model).get_base_layer()._is_expert_parallel = True


PARAMETERS = [f"experts.{name}" for name in BOTH]
STATES = {
    "adapters disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "2 active adapters": two_active,
    "hooks, or a replaced forward, on the experts": hook_experts,
    "hooks, or a replaced forward, on the experts ": hook_inner,
    "experts implementation 'twice'": own_implementation,
    "trainable base weight": train_base,
    "adapter of ParametrizedLinear, Linear": own_factor,
    "rank 257, above 256": large_rank,
    "expert parallelism": parallel,
    "scaling of type Tensor": lambda model: wrapper_of(model).scaling.update(default=torch.tensor(0.5)),
    "scaling 1e+39": lambda model: wrapper_of(model).scaling.update(default=1e39),
    "scaling inf": lambda model: wrapper_of(model).scaling.update(default=float("inf")),
}


@pytest.mark.parametrize("reason", STATES)
def test_other_states_run_pefts_forward_and_say_why(reason):
    theirs, ours = pair()
    for model in (theirs, ours):
        STATES[reason](model)
    outputs = []
    for model in (theirs, ours):
        try:
            outputs.append(wrapper_of(model)(*routed()))
        except Exception as error:  # of PEFT
            outputs.append(str(error))
    assert reasons(ours)[0] == reason.strip()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_of_another_dtype_is_treated_as_by_peft(dtype):
    from transformers.integrations import moe

    if not hasattr(moe, "_can_use_grouped_mm"):
        pytest.skip("this transformers does not cast the input")
    theirs, ours = pair(implementation="grouped_mm", dtype=torch.float32)
    x, index, weights = routed(dtype=dtype)
    got, want = (results(model, x, index, weights) for model in (ours, theirs))
    assert reasons(ours) == [None] * 2 and got["y"].dtype == dtype
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2 if dtype is torch.bfloat16 else 1e-5)
    wrapper_of(ours).get_base_layer().config._experts_implementation = "eager"
    with torch.autocast("cpu", torch.bfloat16):
        wrapper_of(ours)(x, index, weights)
    assert reasons(ours)[0] == "torch.float32 experts under autocast to torch.bfloat16"


def test_wrapper_within_one_of_peft_runs_pefts_forward():
    theirs, _ = pair()
    ours = copy.deepcopy(theirs)
    wrapper_of(ours).base_layer.__class__ = FusedParamWrapper
    torch.testing.assert_close(results(ours, *routed()), results(theirs, *routed()), rtol=0, atol=0)
    assert reasons(ours) == ["parametrized experts, as within PEFT's forward of another parameter"]
    ours = copy.deepcopy(theirs)
    ours.base_model.model["experts"].__class__ = FusedParamWrapper
    torch.testing.assert_close(results(ours, *routed()), results(theirs, *routed()), rtol=0, atol=0)
    assert reasons(ours) == ["beside an adapter of another parameter that is not fused"]


# what PEFT does with wrappers


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_fused(how):
    _, ours = pair()
    clone = COPIES[how](ours)
    torch.testing.assert_close(results(clone, *routed()), results(ours, *routed()), rtol=0, atol=0)
    assert reasons(clone) == [None] * 2


def steps_of_peft(model):
    """Yields what the experts compute after each of PEFT's methods."""
    y = lambda: wrapper_of(model)(*routed()).detach()
    add_adapter(model)
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(3))
    yield y()
    model.set_adapter("other")
    yield y()
    with model.disable_adapter():
        yield y()
    model.merge_adapter()
    yield y()
    model.unmerge_adapter()
    yield y()
    model.set_adapter("default")
    model.delete_adapter("other")
    yield y()
    model.merge_and_unload()
    yield y()


def test_methods_of_peft_do_the_same():
    theirs, ours = pair()
    torch.manual_seed(4)
    want = list(steps_of_peft(theirs))
    torch.manual_seed(4)
    got = []
    for y in steps_of_peft(ours):
        got.append(y)
        ran = reasons(ours)
        assert len(ran) == (0 if len(got) == len(want) else 2)
        assert set(ran) <= {{3: "adapters disabled", 4: "merged"}.get(len(got))}
    torch.testing.assert_close(got, want, **WITHIN)


def test_files_are_pefts(tmp_path):
    theirs, ours = pair()
    theirs.save_pretrained(tmp_path / "theirs"), ours.save_pretrained(tmp_path / "ours")
    files = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("theirs", "ours")]
    assert files[0] == files[1] and theirs.state_dict().keys() == ours.state_dict().keys()
    lf.save_adapter(ours, tmp_path / "by us")
    for folder in ("ours", "by us"):
        loaded = peft.PeftModel.from_pretrained(nn.ModuleDict({"experts": experts("gated")}), tmp_path / folder)
        lf.fuse_(loaded)
        torch.testing.assert_close(wrapper_of(loaded)(*routed()), wrapper_of(ours)(*routed()), rtol=0, atol=0)
    another = adapted(experts("gated"), BOTH)
    for parameter in another.parameters():
        parameter.data.mul_(1.0 if parameter.dim() == 3 else 2.0)
    lf.fuse_(another)
    lf.load_adapter(another, tmp_path / "by us")
    torch.testing.assert_close(wrapper_of(another)(*routed()), wrapper_of(ours)(*routed()), rtol=0, atol=0)


# surgery


def test_fuse_reports_each_parameter_and_unfuse_restores_the_classes():
    model = adapted(experts("gated"), BOTH)
    before, status = snapshot(model), str(model.get_layer_status())
    report = lf.fuse_(model)
    assert str(model.get_layer_status()) == status
    assert list(report.changed.values()) == [
        f"FusedParamWrapper, adapter of the parameter {name!r} of {E} experts" for name in ("down_proj", "gate_up_proj")
    ]
    wrapper_of(model)(*routed())
    assert set(lf.fuse_(model, allow_empty=True).left.values()) == {"already fused"}
    assert repr(model).count("fused") == 2
    assert len(lf.unfuse_(model).changed) == 2
    assert_unchanged(model, before)


def test_parameters_of_one_module_are_fused_together_or_not_at_all():
    model = adapted(experts("gated"), BOTH)
    report = lf.fuse_(model, lambda name, layer: layer.parameter_name == "down_proj", allow_empty=True)
    assert not report.changed and sorted(report.left.values()) == [
        f"adapter of the parameter 'down_proj' of {E} experts: beside that of 'gate_up_proj', which is left",
        "excluded by filter_fn",
    ]
    model = adapted(experts("transposed with bias"), ("down_proj", "down_proj_bias"))
    report = lf.fuse_(model, allow_empty=True)
    assert not report.changed and "'down_proj_bias', which is none of its linear layers" in str(report)


def test_experts_with_another_forward_are_left():
    class Own(type(experts("gated"))):
        def forward(self, *args):
            return 2 * super().forward(*args)

    module = experts("gated")
    module.__class__ = Own
    model = adapted(module, BOTH)
    with pytest.raises(lf.ArgumentError, match="Own with a forward of its own"):
        lf.fuse_(model, strict=True)


def test_experts_of_another_interface_are_left():
    from transformers.integrations import moe

    if not hasattr(moe, "_can_use_grouped_mm"):
        pytest.skip("this transformers has one interface")
    kind = type(experts("gated"))
    own = moe.use_experts_implementation(type("Own", (kind,), {}), experts_interface=moe.ExpertsInterface())
    module = experts("gated")
    module.__class__ = own
    assert "Own with a forward of its own" in str(lf.fuse_(adapted(module, BOTH), allow_empty=True))


def test_llama4_experts_are_left_with_the_reason():
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    module = Llama4TextExperts(Llama4TextConfig(hidden_size=16, intermediate_size=16, num_local_experts=2))
    report = lf.fuse_(adapted(module, BOTH), allow_empty=True)
    assert list(report.left.values()) == [
        f"adapter of the parameter {name!r} of 2 experts: Llama4TextExperts with a forward of its own"
        for name in reversed(BOTH)
    ]


def test_functions_of_this_package_know_the_wrappers():
    _, ours = pair()
    wrapper_of(ours)(*routed())
    assert "adapter of the parameter" in str(lf.groups(ours))
    with pytest.raises(lf.ArgumentError, match="which PEFT merges"):
        lf.merge_(ours)
    with lf.disable_adapters(ours) as report:
        without = wrapper_of(ours)(*routed())
    assert len(report.changed) == 2 and reasons(ours) == ["adapters disabled"] * 2
    torch.testing.assert_close(without, experts("gated")(*routed()), rtol=0, atol=0)
    stats = lf.metrics.adapter_stats(ours)
    assert len(stats) == 2 * E
    optimizer = lf.optim.LoRAAdamW(ours, lr=1e-2, methods=[lf.methods.ScaleReg(lam=0.1)])
    before = [p.clone() for p in ours.parameters() if p.requires_grad]
    results(ours, *routed())
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(optimizer.param_groups[0]["params"], before, strict=True))


# memory, graphs, checkpoints


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest result of an op."""

    size, known = 0, frozenset()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() not in self.known:
                self.size = max(self.size, part.numel())
        return result


@pytest.mark.parametrize("kind", ["gated", "transposed with bias"])
def test_no_tensor_is_as_large_as_the_change_of_a_parameter(kind):
    theirs, ours = pair(kind, dtype=torch.float32)
    least = E * HIDDEN * INNER
    for model, forms_it in ((theirs, True), (ours, False)):
        mode = Largest()
        mode.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with mode:
            results(model, *routed(3, torch.float32))
        assert (mode.size >= least) == forms_it, mode.size
    assert reasons(ours) == [None] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_calls_give_the_same_bits(reentrant):
    _, ours = pair(dtype=torch.float32)
    x, index, weights = routed(dtype=torch.float32)
    want = results(ours, x, index, weights)
    ours.zero_grad()
    x.requires_grad_()
    y = checkpoint(wrapper_of(ours), x, index, weights, use_reentrant=reentrant)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().view(y.shape).to(y.dtype))
    assert torch.equal(y, want["y"]) and torch.equal(x.grad, want["dx"])
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, want[name]), name


@pytest.mark.parametrize("parameters", [BOTH, BOTH[1:]], ids=["both", "down"])
def test_compiled_calls_have_no_graph_break(parameters):
    _, ours = pair(parameters=parameters, dtype=torch.float32)
    want = results(ours, *routed(dtype=torch.float32))
    torch.compiler.reset()
    wrapper_of(ours).forward = torch.compile(wrapper_of(ours).forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(ours, *routed(dtype=torch.float32)), want, rtol=1e-5, atol=1e-6)


def test_second_derivatives_are_those_of_peft():
    theirs, ours = pair()
    for_all = []
    for model in (ours, theirs):
        x, index, weights = routed()
        x.requires_grad_()
        trained = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(
            wrapper_of(model)(x, index, weights).square().sum(), [x, *trained], create_graph=True
        )
        for_all.append(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *trained]))
    torch.testing.assert_close(*for_all, **WITHIN)
