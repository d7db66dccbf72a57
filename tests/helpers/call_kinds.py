"""Kinds of calls that a layer can meet, each as a function of a module and its input that returns tensors: outputs,
gradients, derivatives. ``tests/linear/test_call_kinds.py`` tries each on our layers and on PEFT's or a
plain formula."""

import io
import warnings

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

WIDTH = 6  # d_in of the layer


class Named(torch.Tensor):
    """A subclass without a __torch_function__ of its own, as fastai's or torchvision's."""


def trained(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def backward(module: nn.Module, y: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Returns y and the gradients of the inputs and of the trained parameters."""
    loss = y.sin().sum() if not y.is_nested else torch.cat([part.sin().flatten() for part in y.unbind()]).sum()
    return [y, *torch.autograd.grad(loss, [*inputs, *trained(module).values()])]


def plain(module, x):
    x = x.clone().requires_grad_()
    return backward(module, module(x), x)


def nested(layout):
    def run(module, x):
        parts = [part.clone() for part in (x[:2], x[2:])]
        return backward(module, module(torch.nested.nested_tensor(parts, layout=layout)))

    return run


def loss_of(module):
    return lambda params, x: functional_call(module, params, (x,)).sin().sum()


def detached(module):
    return {name: p.detach() for name, p in trained(module).items()}


def per_sample(module, x, **options):
    grads = vmap(grad(loss_of(module)), in_dims=(None, 0), **options)(detached(module), x[:, None])
    return list(grads.values())


def with_dropout(module, x):
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.5
        if hasattr(child, "dropout_p"):
            child.dropout_p = 0.5
    torch.manual_seed(3)
    different = per_sample(module.train(), x, randomness="different")
    return [*different, *per_sample(module, x, randomness="same")]


def all_parameters(module, x):
    """The frozen weight is an argument of the gradient, too."""
    return list(grad(loss_of(module))({n: p.detach() for n, p in module.named_parameters()}, x).values())


def dual_input(module, x):
    with forward_ad.dual_level():
        return list(forward_ad.unpack_dual(module(forward_ad.make_dual(x, x.cos()))))


def dual_parameters(module, x):
    with forward_ad.dual_level():
        params = {name: forward_ad.make_dual(p, p.cos()) for name, p in detached(module).items()}
        return list(forward_ad.unpack_dual(functional_call(module, params, (x,))))


def jvp_of_parameters(module, x):
    params = detached(module)
    tangents = {name: p.cos() for name, p in params.items()}
    return list(jvp(lambda p: functional_call(module, p, (x,)), (params,), (tangents,)))


def vjp_of_input(module, x):
    y, pull = vjp(module, x)
    return [y, *pull(y.cos())]


def ensemble(module, x):
    params, buffers = stack_module_state([module, module])
    call = lambda params, buffers: functional_call(module, (params, buffers), (x,))
    return [vmap(call)(params, buffers).detach()]


def traced(module, x):
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch 2.13 deprecates torch.jit
        torch.jit.save(torch.jit.trace(module.eval(), x), file)
        return [torch.jit.load(io.BytesIO(file.getvalue()))(torch.cat((x, x)))]


def exported(module, x):
    with torch.no_grad():
        program = torch.export.export(module.eval(), (x,))
    assert not any("lora_fast" in str(node.target) for node in program.graph.nodes)
    return [program.module()(x).detach()]


def fx_graph(module, x):
    params = detached(module)
    return [make_fx(lambda params, x: functional_call(module, params, (x,)))(params, x)(params, x.cos()).detach()]


def meta(module, x):
    y = module.to("meta")(x.to("meta"))
    y.sum().backward()
    return [torch.empty(y.shape, dtype=y.dtype).zero_(), *(torch.zeros(p.grad.shape) for p in trained(module).values())]


def sparse(layout):
    def run(module, x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CSR is in beta state
            x = (x * (x > 0)).to_sparse(layout=layout)
        return backward(module, module(x))

    return run


def subclass(module, x):
    y = module(x.as_subclass(Named))
    assert type(y) is Named
    return [part.as_subclass(torch.Tensor) for part in backward(module, y)]


def two_tensors(module, x):
    y = module(TwoTensor(x, x.cos()))
    return [y.a.detach(), y.b.detach()]


def fake(module, x):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = module(mode.from_tensor(x))
    return [torch.zeros(y.shape, dtype=y.dtype)]


def masked(module, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [module(torch.masked.masked_tensor(x, x > 0)).get_data()]


def penalty(module, x):
    """A gradient penalty, as of WGAN-GP: the gradient of the norm of the input's gradient."""
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
    return [dx, *torch.autograd.grad(dx.square().sum(), [x, *trained(module).values()])]


def second_of_parameters(module, x):
    params = list(trained(module).values())
    first = torch.autograd.grad(module(x).sin().sum(), params, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), params)]


def functional_hessian(vectorize):
    return lambda module, x: [
        torch.autograd.functional.hessian(lambda x: module(x).sin().sum(), x[:1], vectorize=vectorize)
    ]


def batched_backward(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    inputs = [x, *trained(module).values()]
    directions = torch.eye(2, y.numel(), dtype=y.dtype).view(2, *y.shape)
    return list(torch.autograd.grad(y, inputs, directions, is_grads_batched=True))


def saved_on_cpu(module, x):
    with torch.autograd.graph.save_on_cpu():
        return plain(module, x)


def in_place(module, x):
    y = module(x.view(2, 2, WIDTH).clone().requires_grad_())
    y += 1
    return backward(module, torch.relu_(y))


def inference(module, x):
    with torch.inference_mode():
        y = module(x)
    return [y.clone()]


KINDS = {
    "plain": plain,
    "nested, strided": nested(torch.strided),
    "nested, jagged": nested(torch.jagged),
    "vmap": lambda module, x: [vmap(module)(x).detach()],
    "vmap of an ensemble": ensemble,
    "per-sample gradients": per_sample,
    "per-sample gradients, dropout": with_dropout,
    "grad of all parameters": all_parameters,
    "jvp of the input": lambda module, x: [t.detach() for t in jvp(module, (x,), (x.cos(),))],
    "jvp of the parameters": jvp_of_parameters,
    "vjp": vjp_of_input,
    "jacrev": lambda module, x: [jacrev(module)(x).detach()],
    "jacfwd": lambda module, x: [jacfwd(module)(x).detach()],
    "hessian": lambda module, x: [hessian(lambda x: module(x).sin().sum())(x[:1]).detach()],
    "dual input": dual_input,
    "dual parameters": dual_parameters,
    "torch.jit.trace": traced,
    "torch.export": exported,
    "make_fx": fx_graph,
    "meta": meta,
    "sparse COO": sparse(torch.sparse_coo),
    "sparse CSR": sparse(torch.sparse_csr),
    "subclass": subclass,
    "subclass with __torch_dispatch__": two_tensors,
    "fake tensor": fake,
    "masked tensor": masked,
    "int": lambda module, x: [module(x.to(torch.int64))],
    "bool": lambda module, x: [module(x > 0)],
    "complex": lambda module, x: [module(x.to(torch.complex64))],
    "another float": lambda module, x: [module(x.half())],
    "0-d": lambda module, x: [module(x[0, 0])],
    "1-d": lambda module, x: plain(module, x[0]),
    "no tokens": lambda module, x: plain(module, x[:0]),
    "another width": lambda module, x: [module(x[:, 1:])],
    "expanded": lambda module, x: backward(module, module(x[:1].expand(5, WIDTH))),
    "negative view": lambda module, x: backward(module, module(torch.complex(x, x).conj().imag)),
    "penalty": penalty,
    "second derivatives of the parameters": second_of_parameters,
    "autograd.functional.hessian": functional_hessian(False),
    "autograd.functional.hessian, vectorized": functional_hessian(True),
    "batched backward": batched_backward,
    "save_on_cpu": saved_on_cpu,
    "output changed in place": in_place,
    "inference mode": inference,
}
