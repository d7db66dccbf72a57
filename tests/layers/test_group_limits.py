"""What is not to be noticed of layers that are computed together: the same with ``group=False`` is the reference."""

import copy
import weakref

import peft
import pytest
import torch
import torch.nn.functional as F
from sibling_layers import LAYERS, D, model_of, settled, x_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_fast as lf
from lora_fast.layers import groups

DROPOUT = lf.LoRAConfig(r=3, alpha=6, dropout=0.4)


def both(config=None):
    """Returns a model that knows its groups, and one that makes none."""
    return settled(model_of(config=config), "together"), model_of(group=False, config=config)


def outcome(run, *arguments):
    """Returns the result of a call, or its error."""
    try:
        return run(*arguments)
    except Exception as error:
        return type(error), str(error)


class Rerun(torch.autograd.Function):
    """Runs a function again in backward, as libraries do that checkpoint by functions of their own."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run, ctx.state = run, torch.get_rng_state()
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.state)
            ctx.run(x).backward(dy)
        return None, x.grad


REGIONS = {
    "reentrant": lambda run, x: checkpoint(run, x, use_reentrant=True),
    "not reentrant": lambda run, x: checkpoint(run, x, use_reentrant=False),
    "function": Rerun.apply,
}


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
@pytest.mark.parametrize("before", ["training", "no grad"])
def test_regions_that_run_again_draw_the_same_masks(region, before):
    """Another mask is drawn between two calls, and v is not always used. Where gradients are on in the second run only,
    the masks are those of single layers."""

    def results(model):
        if before == "no grad":
            with torch.no_grad():
                model.eval()(x_of())
        model.train()
        seen, values = [], []

        def between(x):
            seen.append(model.q(x))
            seen.append(F.dropout(seen[-1], 0.5) * model.k(x).sum(-1, True))
            return model.o(seen[-1] + 0 * model.v(x).detach().sum())

        for step, run in enumerate((model, between, between)):
            del seen[:]
            torch.manual_seed(step)
            region(lambda x, run=run: run(x * 2), x_of()).square().sum().backward()
            half = len(seen) // 2
            assert all(map(torch.equal, seen[:half], seen[half:]))
            values += seen[:half]
        return values + [p.grad for p in model.parameters() if p.requires_grad]

    ours, alone = map(results, (model_of(config=DROPOUT), model_of(group=False, config=DROPOUT)))
    if region is not REGIONS["not reentrant"]:  # a group draws all masks at once there
        for result, expected in zip(ours, alone, strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_x_is_another_one_after_it_was_detached_in_place():
    for model in both():
        root = x_of()
        x = root * 1
        model.q(x)
        x.detach_().requires_grad_()
        model.k(x).sum().backward()
        assert x.grad is not None and root.grad is None


def test_x_is_another_one_with_other_memory_or_another_shape():
    ours, alone = both()
    for change in (lambda x: x.data.view(5, 2, D), lambda x: x.data + 1):
        results = []
        for model in (ours, alone):
            x = x_of()
            model.q(x)
            x.data = change(x)
            results.append(model.k(x))
        assert torch.equal(*results) and results[0].shape[:-1] == x.shape[:-1]


def test_a_layer_with_hooks_before_its_forward_is_not_computed_ahead():
    def double(layer, _):
        layer.weight.data.mul_(2)

    models = both()
    for model in models:
        model.k.register_forward_pre_hook(double)
    results = [(model.q(x), model.k(x))[1] for model, x in zip(models, (x_of(), x_of()), strict=True)]
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("name", LAYERS[:2])
def test_backward_hooks_of_the_old_kind_see_gradients_of_their_own_layer(name):
    for model in both():
        seen = []
        note = lambda _, __, outputs, seen=seen: seen.append([output.shape[-1] for output in outputs])
        getattr(model, name).register_backward_hook(note)
        for _ in range(2):
            model(x_of()).sum().backward()
        assert seen == [[getattr(model, name).out_features]] * 2


def test_a_layer_that_is_no_longer_fused_leaves_its_group():
    model = model_of(group=False)
    config = peft.LoraConfig(r=3, target_modules=list(LAYERS))
    plain = peft.get_peft_model(nn.ModuleDict({"net": lf_free(model)}), config)
    fused = copy.deepcopy(plain)
    lf.fuse_(fused)
    net = fused.base_model.model["net"]
    for _ in range(2):
        net(x_of()).sum().backward()
    lf.unfuse_(net.k)
    assert torch.allclose(net(x_of()), plain.base_model.model["net"](x_of()), rtol=1e-12)


def lf_free(model):
    """Returns the model with plain linear layers in place of ours."""
    for name, layer in list(model.named_children()):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=layer.weight.dtype)
        setattr(model, name, linear)
    return model


def of_a_leaf(model):
    x = x_of()
    q, k = model.q(x), model.k(x)
    q.sum().backward()
    k.sum().backward()
    return x.grad


def of_own_factors(model):
    x = x_of() * 2
    q, k, v = (getattr(model, name)(x) for name in LAYERS)
    return [torch.autograd.grad(y.sum(), [layer.lora_A, layer.lora_B]) for y, layer in ((q, model.q), (k, model.k))] + [
        torch.autograd.grad(v.sum(), model.v.lora_B)
    ]


def after_a_step_of_another(model):
    x = x_of() * 2
    q, k = model.q(x), model.k(x)
    q.sum().backward(retain_graph=True)
    with torch.no_grad():
        model.q.lora_A.add_(1)
    k.sum().backward()
    return model.k.lora_A.grad


@pytest.mark.parametrize("run", [of_a_leaf, of_own_factors, after_a_step_of_another])
def test_backwards_of_single_layers_after_a_joint_one(run):
    ours, alone = map(run, both())
    torch.testing.assert_close(ours, alone, rtol=1e-12, atol=1e-12)


def test_a_later_backward_of_a_single_layer_is_checked_like_the_first():
    """Its own tensors must not have been changed, and it cannot run twice."""
    for model in both():
        x = x_of()
        q, k, v = (getattr(model, name)(x) for name in LAYERS)
        q.sum().backward()
        v.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            v.sum().backward()
        with torch.no_grad():
            model.k.lora_A.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            k.sum().backward()


def test_results_that_wait_are_given_up_by_a_call_without_gradients():
    model, x = settled(model_of(), "together"), x_of()
    kept = weakref.ref(model.q(x).grad_fn)
    with torch.no_grad():
        model.o(x)
    assert kept() is None


def test_results_of_inference_mode_are_not_those_of_a_later_call():
    model, x = settled(model_of(), "together"), x_of()
    with torch.inference_mode():
        model.q(x)
    with torch.no_grad():
        assert not model.k(x).is_inference()


@pytest.mark.parametrize(
    "x", [None, [1.0], torch.zeros(2, D, dtype=torch.float64).to_sparse()], ids=["None", "list", "sparse"]
)
def test_a_wrong_x_while_a_result_waits(x):
    ours, alone = both()
    for model in (ours, alone):
        model.q(x_of())
    result, expected = outcome(ours.k, x), outcome(alone.k, x)
    assert torch.equal(result, expected) if isinstance(expected, torch.Tensor) else result == expected


def test_a_parameter_as_x_can_be_swapped():
    x, other = (nn.Parameter(x_of().detach()) for _ in range(2))
    for model in both():
        (model.q(x).sum() + model.k(x).sum()).backward()
        swapped = other.grad
        torch.utils.swap_tensors(x, other)
        assert x.grad is swapped


def test_a_checkpointed_region_that_ends_early_leaves_nothing():
    """The region's second run ends with the last tensor that is saved, before k's result is taken."""
    model = model_of()
    region = lambda x: (model.q(x).tanh(), model.k(x))
    for _ in range(4):
        q, k = checkpoint(region, x_of() * 1, use_reentrant=False)
        (q.sum() + k.sum()).backward()
        assert not groups._thread.met.waiting
    assert lf.groups(model).groups == [LAYERS[:2]]
