"""Layers of one parent that are called with the same x, against the formula in float64 by torch's own autograd.

Every case runs twice: "entered", where the layers find each other (the first call), and "together", where the first
one computes all.
"""

import copy
import gc
import io
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from sibling_layers import D_OUT, LAYERS, Attention, D, model_of, settled, x_of
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lora_fast as lf
from lora_fast.layers import groups
from lora_fast.layers.groups import Siblings

STAGES = ("entered", "together")


class Formula(nn.Module):
    """PEFT's formula of a layer, in plain torch ops over the same parameters."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer = self.layer
        low_rank = F.linear(F.linear(x, layer.lora_A), layer.lora_B) * layer.scaling
        return F.linear(x, layer.weight, layer.bias) + low_rank


def formula_of(model):
    plain = Attention(torch.float64)
    for name in D_OUT:
        setattr(plain, name, Formula(getattr(model, name)))
    return plain


def count_nodes(result, name):
    """Returns how many nodes of this name the graph has."""
    seen, stack = set(), [result.grad_fn]
    while stack:
        if (node := stack.pop()) is not None and node not in seen:
            seen.add(node)
            stack += [other for other, _ in node.next_functions]
    return sum(node.name() == name for node in seen)


def gradients(model, run, x):
    """Returns the result of run(model, x), and the gradients of x and of all adapters, which ``run`` has filled."""
    model.zero_grad()
    x.grad = None
    value = run(model, x)
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"value": value.detach(), "x": x.grad, **{name.replace(".layer.", "."): g for name, g in grads.items()}}


def all_parts(m, x):
    return m(x).square().sum()


def subset(m, x):
    return m(x, called="qv").square().sum()


def without_the_first(m, x):
    return (m.k(x).sin().sum() * m.v(x).cos()).sum()


def other_uses(m, x):
    return (m(x) * x.exp() + m.o(x.tanh())).square().sum() + x.pow(3).sum()


def two_tensors(m, x):
    y = x * 2
    return (m.q(x) * m.q(y)).sum() + (m.k(y) * m.v(x)).sum() + (m.k(x) * m.v(y)).sum()


def called_twice(m, x):
    return (m.q(x) * m.q(x) + torch.cat((m.k(x), m.k(x)), -1)).square().sum()


def views(m, x):
    q = m.q(x).view(2, 5, 2, 6).transpose(1, 2)
    return (q * m.k(x).view(2, 5, 1, 6).transpose(1, 2)).square().sum() + m.v(x).mul_(2).relu_().sum()


def backward(run):
    def step(m, x):
        value = run(m, x)
        value.backward()
        return value

    return step


def checkpointed(reentrant):
    def step(m, x):
        value = checkpoint(lambda y: all_parts(m, y * 1), x, use_reentrant=reentrant)
        value.backward()
        return value

    return step


def retained(m, x):
    value = all_parts(m, x)
    value.backward(retain_graph=True)
    value.backward()
    return value


def one_gradient(m, x):
    value = all_parts(m, x)
    layer = m.k.layer if isinstance(m.k, Formula) else m.k
    (layer.lora_A.grad,) = torch.autograd.grad(value, [layer.lora_A], retain_graph=True)
    value.backward()
    return value


def second_derivatives(m, x):
    (dx,) = torch.autograd.grad(all_parts(m, x), x, create_graph=True)
    value = dx.square().sum() + all_parts(m, x)
    value.backward()
    return value


def hooks_on_x(m, x):
    y = x * 1
    y.register_hook(lambda grad: grad * 3)
    value = all_parts(m, y)
    value.backward()
    return value


def unused_result(m, x):
    m.v(x)
    value = (m.q(x).sum() * m.k(x)).sum()
    value.backward()
    return value


RUNS = {
    **{f.__name__: backward(f) for f in (all_parts, subset, without_the_first, other_uses, two_tensors, called_twice)},
    "views": backward(views),
    "checkpointed": checkpointed(False),
    "checkpointed, reentrant": checkpointed(True),
    **{f.__name__: f for f in (retained, one_gradient, second_derivatives, hooks_on_x, unused_result)},
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_gradients_are_autograds(run, stage):
    model = settled(model_of(), stage)
    expected = gradients(formula_of(model), run, x_of())
    for turn in range(2):  # the second one with what the first one has found out
        got = gradients(model, run, x_of())
        assert got.keys() == expected.keys()
        for name, grad in got.items():
            if expected[name] is None:
                assert grad is None or not grad.any(), (turn, name)
            else:
                torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-12, msg=f"{turn} {name}")


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_stage_and_are_those_of_single_layers_but_for_dx(dtype, dropout):
    config = lf.LoRAConfig(r=3, alpha=6, dropout=dropout)
    alone = model_of(dtype, group=False, config=config)
    model = model_of(dtype, config=config)
    results = []
    for m in (alone, model, model, model):
        torch.manual_seed(3)
        results.append(gradients(m, RUNS["all_parts"], x_of(dtype)))
    assert lf.groups(model).groups == [LAYERS] and not lf.groups(alone).groups
    dx, others = zip(*((result.pop("x"), result) for result in results), strict=True)
    for result in others[1:]:
        assert all(torch.equal(others[0][name], value) for name, value in result.items())
    assert torch.equal(dx[1], dx[2]) and torch.equal(dx[1], dx[3])
    # One rounding a member, in units of the largest of the sums.
    assert (dx[1] - dx[0]).abs().max() <= 4 * torch.finfo(dtype).eps * dx[0].abs().max()


def test_a_group_is_one_node_and_saves_x_once():
    model = settled(model_of(), "together")
    x = x_of()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = torch.cat([getattr(model, name)(x) for name in LAYERS], -1)
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    kept = {address: size for address, size in storages.items() if address not in frozen}
    assert kept == {x.data_ptr(): x.nbytes} | {a: s for a, s in kept.items() if a != x.data_ptr()}
    assert sum(kept.values()) == x.nbytes + 10 * 3 * 3 * x.element_size()  # and S of three members
    assert count_nodes(y, "LoRAGroupFunctionBackward") == 1 and count_nodes(y, "LoRALinearFunctionBackward") == 0


def test_what_does_not_match_is_no_group():
    model = settled(model_of(), "together")
    x = x_of()
    changed = (x * 1).detach().requires_grad_()
    q = model.q(changed)
    with torch.no_grad():
        changed.add_(1)
    torch.testing.assert_close(model.k(changed), Formula(model.k)(changed))  # another version
    weights = model_of()
    settled(weights, "together").q(x)
    with torch.no_grad():
        weights.k.lora_B.mul_(2)
        weights.v.weight.add_(1)
    torch.testing.assert_close(weights.k(x), Formula(weights.k)(x))
    torch.testing.assert_close(weights.v(x), Formula(weights.v)(x))
    k = settled(model_of(), "together")
    with torch.no_grad():
        k.q(x)
    assert k.k(x).requires_grad  # another state of autograd
    assert q.requires_grad


def test_a_layer_that_is_called_otherwise_is_no_longer_computed_with_the_others():
    model = settled(model_of(), "together")
    x = x_of()
    model(x, called="qk")
    assert not groups._thread.met.waiting
    with torch.no_grad():
        calls = []
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
        handle.remove()
        model(x)
    report = lf.groups(model)
    assert report.groups == [("q", "k")] and "as expected" in report.left["v"]
    expected = gradients(formula_of(model), RUNS["all_parts"], x_of())
    got = gradients(model, RUNS["all_parts"], x_of())
    assert all(torch.allclose(got[name], expected[name], rtol=1e-12) for name in expected)


@pytest.mark.parametrize("change", ["merged", "disabled", "frozen", "fallback", "hooked"])
@pytest.mark.parametrize("stage", STAGES)
def test_members_in_other_states(stage, change):
    model = settled(model_of(), stage)
    handle = None
    if change == "merged":
        model.k.merge()
    elif change == "disabled":
        model.k.set_disabled_(True)
    elif change == "frozen":
        model.k.lora_A.requires_grad_(False)
        model.v.lora_A.requires_grad_(False), model.v.lora_B.requires_grad_(False)
    elif change == "fallback":
        model.k.weight = nn.Parameter(model.k.weight.as_subclass(Marked), requires_grad=False)
    else:
        handle = model.k.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    formula = formula_of(model)
    if change in ("merged", "disabled"):
        formula.k.forward = lambda x: F.linear(x, model.k.weight, model.k.bias)
    elif change == "hooked":
        formula.k.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    for _ in range(2):
        got = gradients(model, RUNS["all_parts"], x_of())
        expected = gradients(formula, RUNS["all_parts"], x_of())
        for name in ("value", "x", "q.lora_A", "q.lora_B"):
            torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-10)
        if change == "frozen":
            assert got.keys() == expected.keys()
    assert (handle is not None) == (change == "hooked")


class Marked(torch.Tensor):
    """A subclass, which the fused op does not serve."""


def test_backward_hooks_of_members_see_their_gradients():
    seen = {}
    model = settled(model_of(), "together")
    for name in LAYERS:
        getattr(model, name).register_full_backward_hook(
            lambda _, grad_in, grad_out, name=name: seen.update({name: (grad_in[0], grad_out[0])})
        )
    x = x_of()
    all_parts(model, x).backward()
    expected = x_of()
    outputs = {name: formula_of(model).get_submodule(name)(expected) for name in LAYERS}
    y = formula_of(model).o(outputs["q"] * torch.cat((outputs["k"].sin(), outputs["v"].cos()), -1))
    grads = torch.autograd.grad(y.square().sum(), [*outputs.values(), expected])
    for (_, grad_out), exact in zip((seen[name] for name in LAYERS), grads, strict=False):
        torch.testing.assert_close(grad_out, exact)
    torch.testing.assert_close(x.grad, grads[-1])
    torch.testing.assert_close(sum(grad_in for grad_in, _ in seen.values()), grads[-1])


@pytest.mark.parametrize("stage", STAGES)
def test_two_parents_of_one_x(stage):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = Attention(), Attention()

        def forward(self, x):
            return self.left(x) + self.right(x)

    torch.manual_seed(0)
    model = Two()
    lf.inject_(model, lf.LoRAConfig(r=3, alpha=6))
    x = x_of()
    if stage == "together":
        model(x)
    model(x).square().sum().backward()
    expected = x_of()
    sum(formula_of(part)(expected) for part in (model.left, model.right)).square().sum().backward()
    torch.testing.assert_close(x.grad, expected.grad, rtol=1e-12, atol=1e-12)
    parents = [{name.split(".")[0] for name in group} for group in lf.groups(model).groups]
    assert parents == [{"left"}, {"right"}]


@pytest.mark.parametrize("stage", STAGES)
def test_a_backward_that_failed_leaves_nothing(stage):
    model = settled(model_of(), stage)
    x, armed = x_of(), [True]

    def fail(grad):
        if armed[0]:
            raise ArithmeticError

    q = model.q(x)
    q.register_hook(fail)  # q's gradient comes last, if all of them come
    value = (model.v(x) * 2).sum() + (model.k(x).sin()).sum() + q.square().sum()
    with pytest.raises(ArithmeticError):
        value.backward(retain_graph=True)
    armed[0] = False
    model.zero_grad()
    x.grad = None
    value.backward()
    formula, expected = formula_of(model), x_of()
    ((formula.v(expected) * 2).sum() + formula.k(expected).sin().sum() + formula.q(expected).square().sum()).backward()
    torch.testing.assert_close(x.grad, expected.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_nothing_is_kept_alive_after_the_call(stage, grad):
    model = settled(model_of(), stage)
    with torch.set_grad_enabled(grad):
        x = x_of() * 1
        y = model(x)
        kept = weakref.ref(x), weakref.ref(y), weakref.ref(y.grad_fn) if grad else weakref.ref(y)
    met = groups._thread.met
    del x, y
    gc.collect()
    assert all(reference() is None for reference in kept)
    assert met is None or (not met.waiting and met.entered is None)
    assert grad or stage == "entered" or met is None  # without gradients only the first calls are noted
    alive = weakref.ref(model)
    del model
    assert alive() is None  # without the garbage collector


def test_results_that_nobody_takes_are_given_up():
    model = settled(model_of(), "together")
    x = x_of()
    y = model.q(x)
    assert len(groups._thread.met.waiting) == 2
    waiting = weakref.ref(groups._thread.met.waiting[id(model.k)][-1])
    y.sum().backward()
    assert waiting() is None
    model.q(x)
    model.o(x.tanh())
    assert not groups._thread.met.waiting


def test_copies_and_pickles_find_their_own_groups():
    model = settled(model_of(), "together")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert not lf.groups(other).groups and set(lf.groups(other).left.values()) == {"not called yet"}
        for _ in range(2):
            got = gradients(other, RUNS["all_parts"], x_of())
        assert lf.groups(other).groups == [LAYERS]
        assert lf.groups(model).groups == [LAYERS]
        expected = gradients(formula_of(model), RUNS["all_parts"], x_of())
        torch.testing.assert_close(got["x"], expected["x"], rtol=1e-12, atol=1e-12)
    assert copy.deepcopy(model.q).siblings is not model.q.siblings


@pytest.mark.parametrize("stage", STAGES)
def test_compiled_autograd(stage):
    model = settled(model_of(), stage)
    expected = gradients(formula_of(model), RUNS["all_parts"], x_of())
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        got = gradients(model, RUNS["all_parts"], x_of())
    torch._dynamo.reset()
    for name, exact in expected.items():
        torch.testing.assert_close(got[name], exact, rtol=1e-10, atol=1e-10)


class Same:
    """A hook for saved tensors of which there are no weak references."""

    __slots__ = ()

    def __call__(self, tensor):
        return tensor


@pytest.mark.parametrize("hook", [Same(), lambda tensor: tensor], ids=["no references", "function"])
def test_hooks_for_saved_tensors(hook):
    model = model_of()
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(hook, hook):
            got = gradients(model, RUNS["all_parts"], x_of())
    expected = gradients(formula_of(model), RUNS["all_parts"], x_of())
    torch.testing.assert_close(got["x"], expected["x"], rtol=1e-12, atol=1e-12)
    assert bool(lf.groups(model).groups) == (not isinstance(hook, Same))


@pytest.mark.parametrize("stage", STAGES)
def test_regions_that_some_layers_are_in(stage):
    """q runs in a checkpointed region, k and v outside of it."""
    model = settled(model_of(), stage)

    def run(m, x):
        q = checkpoint(m.q, x, use_reentrant=False)
        value = (q * torch.cat((m.k(x), m.v(x).sin()), -1)).square().sum()
        value.backward()
        return value

    expected = gradients(formula_of(model), run, x_of())
    for _ in range(2):
        got = gradients(model, run, x_of())
        for name, exact in expected.items():
            if exact is not None:
                torch.testing.assert_close(got[name], exact, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_a_compiled_model_after_a_call_under_a_mode():
    """After such a call torch.compile compiles what it finds inside of the layers' calls."""
    model = model_of()
    expected = gradients(formula_of(model), RUNS["all_parts"], x_of())
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x_of())
    with FlopCounterMode(display=False):
        compiled(x_of())
    for _ in range(3):
        got = gradients(model, lambda _, x: RUNS["all_parts"](compiled, x), x_of())
        for name, exact in expected.items():
            torch.testing.assert_close(got[name], exact, rtol=1e-12, atol=1e-12)
    torch.compiler.reset()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_mode_in_one_run_of_a_checkpointed_region(where):
    model = settled(model_of(), "together")
    expected = gradients(formula_of(model), RUNS["all_parts"], x_of())
    mode = {where: FlopCounterMode(display=False)}

    def run(m, x):
        with mode.get("forward", nullcontext()):
            value = checkpoint(all_parts, m, x, use_reentrant=False)
        with mode.get("backward", nullcontext()):
            value.backward()
        return value

    for name, grad in gradients(model, run, x_of()).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_a_layer_that_takes_no_part_are_not_called(stage, kind):
    model = settled(model_of(), stage)
    seen = []
    for name in LAYERS:
        getattr(getattr(model, name).lora_A, kind)(lambda got, name=name: seen.append((name, got)) or None)
    for _ in range(2):
        model.k(x_of()).sum()
        x = x_of()
        (model.q(x).sum() + model.v(x).sum() + model.k(x).detach().sum()).backward()
    assert [name for name, got in seen if got is None] == [] and {name for name, _ in seen} == {"q", "v"}


def test_losses_of_their_own_over_an_x_without_gradient():
    model, x = settled(model_of(), "together"), x_of().detach()
    for _ in range(2):
        q, k = model.q(x), model.k(x)
        q.sum().backward()
        k.sum().backward()
    model.k.requires_grad_(False)
    model.q(x)
    assert not model.k(x).requires_grad


def test_an_exception_between_the_calls_keeps_no_model_alive():
    model = settled(model_of(), "together")
    model.k.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x_of())
    alive = weakref.ref(model.k.lora_A)
    del model
    gc.collect()  # of the exception's frames
    assert alive() is None


@pytest.mark.parametrize("config", [lf.NBLoRAConfig(r=3), lf.SingLoRAConfig(r=3, ramp_steps=0)], ids=repr)
def test_layers_whose_factors_are_computed_make_no_groups(config):
    model = model_of(config=config)
    for _ in range(2):
        all_parts(model, x_of()).backward()
    assert not lf.groups(model).groups and all("computed" in reason for reason in lf.groups(model).left.values())


@pytest.mark.parametrize("stage", STAGES)
def test_two_threads(stage):
    model, failed = settled(model_of(), stage), []

    def work(seed):
        formula = formula_of(model)
        for turn in range(20):
            x = torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + turn))
            mine, exact = x.clone().requires_grad_(), x.clone().requires_grad_()
            trained = model.k.lora_A
            got = torch.autograd.grad(all_parts(model, mine), [mine, trained])
            expected = torch.autograd.grad(all_parts(formula, exact), [exact, trained])
            failed.extend(g for g, e in zip(got, expected, strict=True) if not torch.allclose(g, e, rtol=1e-10))

    threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.parametrize("stage", STAGES)
def test_autocast_casts_x_once(stage):
    alone, model = model_of(torch.float32, group=False), settled(model_of(torch.float32), stage)
    results, casts = [], []
    for m in (alone, model):
        m.zero_grad()
        x = x_of(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = m(x)
        casts.append(count_nodes(y, "ToCopyBackward0"))
        y.float().square().sum().backward()
        results.append((y, x.grad, m.k.lora_A.grad, m.v.lora_B.grad))
    (y, dx, *grads), (same_y, other_dx, *same_grads) = results
    assert torch.equal(y, same_y) and all(map(torch.equal, grads, same_grads))
    assert (dx - other_dx).abs().max() <= 2**-6 * dx.abs().max()
    assert casts[1] < casts[0]


def test_inference_mode_and_no_grad():
    model = settled(model_of(), "together")
    x = x_of().detach()
    exact = formula_of(model)(x).detach()
    with torch.no_grad():
        y = model(x)
    with torch.inference_mode():
        other = model(x * 1)
    assert torch.equal(y, other) and torch.allclose(y, exact, rtol=1e-12) and y.grad_fn is None


def test_transforms_of_functions_make_no_groups():
    model = settled(model_of(), "together")
    x = x_of().detach()
    loss = lambda x: model(x).square().sum()
    got = torch.func.vmap(torch.func.grad(loss))(x)
    exact = x.clone().requires_grad_()
    formula_of(model)(exact).square().sum().backward()
    torch.testing.assert_close(got, exact.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stage", STAGES)
def test_peft_models_and_group_false(stage):
    import peft

    def build(**settings):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(D_OUT), init_lora_weights=False)
        model = peft.get_peft_model(Attention(), config)
        if settings:
            lf.fuse_(model, **settings)
        return model

    models = {"PEFT": build(), "alone": build(group=False), "groups": build(group=True)}
    for _ in STAGES[: 1 + (stage == "together")]:
        results = {name: gradients(model, RUNS["all_parts"], x_of()) for name, model in models.items()}
    for name, exact in results["PEFT"].items():
        torch.testing.assert_close(results["groups"][name], exact, rtol=1e-12, atol=1e-12)
    prefix = "base_model.model."
    assert lf.groups(models["groups"]).groups == [tuple(prefix + name for name in LAYERS)]
    assert not lf.groups(models["alone"]).groups
    assert set(lf.groups(models["PEFT"]).left.values()) == {"not fused"}
    lf.unfuse_(models["groups"])
    assert "siblings" not in models["groups"].base_model.model.q.__dict__
    report = lf.fuse_(models["groups"])
    assert len(report.changed) == 4 and not lf.groups(models["groups"]).groups


def test_the_report_has_every_layer():
    model = model_of()
    assert set(lf.groups(model).left.values()) == {"not called yet"}
    report = lf.groups(settled(model, "together"))
    assert report.changed == {"q": "with k, v", "k": "with q, v", "v": "with q, k"}
    assert report.left == {"o": "its input is no other layer's"} and report.note == "1 group of 3"
    assert str(report) == "grouped 3 layers; left 1: o (its input is no other layer's). 1 group of 3"
    with pytest.raises(lf.ArgumentError, match="group: expected"):
        lf.inject_(Attention(), lf.LoRAConfig(r=2), group="no")


def test_an_only_child_has_no_siblings():
    model = Attention()
    lf.inject_(model, lf.LoRAConfig(r=2, target_modules=["q"]))
    assert model.q.siblings is None and isinstance(model_of().q.siblings, Siblings)
    assert lf.groups(model).left == {"q": "group=False, or the only one of its parent"}


def test_a_scaling_that_changes_between_the_calls():
    model, x = settled(model_of(), "together"), x_of()
    model.q(x)
    model.k.scaling = 7.0
    torch.testing.assert_close(model.k(x), Formula(model.k)(x))


def test_a_failed_backward_adds_nothing_to_one_of_other_members():
    model, x = model_of(), x_of()
    q, k = model.q(x), model.k(x)
    handle = q.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        (q.sum() + k.square().sum()).backward(retain_graph=True)
    handle.remove()
    model.zero_grad()
    x.grad = None
    q.sum().backward()
    expected = x_of()
    Formula(model.q)(expected).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad, rtol=1e-12, atol=1e-12)
