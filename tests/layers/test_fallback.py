"""fallback_reason of every adapter layer: written when a call runs plain torch ops, and cleared by the next one that
does not."""

import copy
import pickle

import peft
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import lora_fast as lf

CONFIGS = {
    "LoRALinear": lf.LoRAConfig(r=2),
    "NBLoRALinear": lf.NBLoRAConfig(r=2),
    "SingLoRALinear": lf.SingLoRAConfig(r=2),
}
KINDS = pytest.mark.parametrize("kind", ["fused PEFT", *CONFIGS])


def model_of(kind: str) -> tuple[nn.Module, nn.Module]:
    """Returns a model and its adapter layer."""
    model = nn.Sequential(nn.Linear(6, 5))
    if kind in CONFIGS:
        lf.inject_(model, CONFIGS[kind], progress=False)
        return model.eval(), model[0]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    lf.fuse_(model)
    return model.eval(), model.base_model.model[0]


class Named(torch.Tensor):
    pass


def dual(model, x):
    with forward_ad.dual_level():
        model(x)


REASONS = {
    "nested x": lambda model, x: model(torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.strided)),
    "x of type NestedTensor": lambda model, x: model(torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)),
    "x of type Named": lambda model, x: model(x.as_subclass(Named)),
    "x of layout torch.sparse_coo": lambda model, x: model(x.to_sparse()),
    "torch.func transform (vmap, grad, jvp, …)": lambda model, x: torch.func.vmap(model)(x),
    "forward-mode differentiation": dual,
    "torch.jit.trace": lambda model, x: torch.jit.trace(model, x, check_trace=False),
    "x on the meta device": lambda model, x: model.to("meta")(x.to("meta")),
}


@pytest.mark.filterwarnings("ignore")  # of torch.nested (a prototype) and torch.jit (deprecated)
@pytest.mark.parametrize("reason", REASONS)
@KINDS
def test_layer_says_why_plain_ops_ran(kind, reason):
    model, layer = model_of(kind)
    assert "fallback_reason" not in layer.__dict__
    x = torch.randn(4, 6)
    copies = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        REASONS[reason](other, x)
        reasons = {module.fallback_reason for module in other.modules() if hasattr(module, "fallback_reason")}
        assert reasons == {reason}
        other.to_empty(device="cpu")(x)
        assert {m.fallback_reason for m in other.modules() if hasattr(m, "fallback_reason")} == {None}


@KINDS
def test_compiled_and_exported_calls_write_nothing(kind):
    model, layer = model_of(kind)
    torch._dynamo.reset()
    torch.compile(model, backend="eager", fullgraph=True)(torch.randn(4, 6))
    torch.export.export(model, (torch.randn(4, 6),))
    assert "fallback_reason" not in layer.__dict__


@KINDS
def test_compiled_transforms_run_plain_ops(kind):
    """The registered ops have no rules for them."""
    model, _ = model_of(kind)
    x = torch.randn(4, 6)
    torch._dynamo.reset()
    jacobian = torch.compile(
        lambda x: torch.func.vmap(torch.func.jacrev(lambda row: model(row).sin()))(x), backend="eager"
    )
    torch.testing.assert_close(jacobian(x), torch.func.vmap(torch.func.jacrev(lambda row: model(row).sin()))(x))


def test_expanded_weights_give_gradients_of_each_sample():
    """Opacus's ``grad_sample_mode="ew"``: every read of such a weight's attributes but a few is an error of torch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    lf.inject_(model, lf.LoRAConfig(r=2))
    nn.init.normal_(model[0].lora_B)
    x = torch.randn(4, 6)
    call_for_per_sample_grads(model)(x).sum().backward()
    samples = model[0].lora_A.grad_sample
    assert "ExpandedWeight" in model[0].fallback_reason and len(samples) == 4
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(samples.sum(0), model[0].lora_A.grad)
