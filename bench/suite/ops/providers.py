"""Providers of the layer: eager torch, torch.compile, PEFT, a hand-written autograd function, ours.

All of them share one frozen weight and start from the same a and b.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fast as lf
from suite.cases import Case
from suite.comparison import Provider, Setting, Unavailable, once


class InPlaceLoRA(torch.autograd.Function):
    """LoRA as the fastest public libraries write it by hand (the scheme of Unsloth's fast_lora).

    It uses cuBLAS and in-place ``addmm_``, recomputes x aᵀ in backward, and has neither dropout nor bias.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling):
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.scaling = scaling
        rows = x.view(-1, x.shape[-1])
        y = rows @ weight.t()
        y.addmm_(rows @ lora_A.to(x.dtype).t(), lora_B.to(x.dtype).t(), alpha=scaling)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        x, weight, lora_A, lora_B = ctx.saved_tensors
        a, b = lora_A.to(dy.dtype), lora_B.to(dy.dtype)
        rows, dy_rows = x.view(-1, x.shape[-1]), dy.view(-1, dy.shape[-1])
        ds = dy_rows @ b
        da, db = ds.t() @ rows, dy_rows.t() @ (rows @ a.t())
        dx = (dy_rows @ weight).addmm_(ds, a, alpha=ctx.scaling)
        return dx.view(x.shape), None, (da * ctx.scaling).to(lora_A.dtype), (db * ctx.scaling).to(lora_B.dtype), None


def eager(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float) -> Tensor:
    """Computes the formula line by line in x's dtype, as PEFT does under autocast."""
    dropped = F.dropout(x, dropout_p) if dropout_p else x
    return F.linear(x, weight) + scaling * F.linear(F.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype))


@dataclass
class Operands:
    """Random operands of a case; x, lora_A and lora_B require a gradient."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor
    scaling: float = 2.0

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Operands:
        d_in, d_out = case.shape
        dtype = getattr(torch, case.dtype)
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape, dtype=dtype):
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        wide = torch.promote_types(dtype, torch.float32)
        a, b = draw(case.r, d_in, dtype=wide) / d_in**0.5, draw(d_out, case.r, dtype=wide) / case.r**0.5
        x, weight = draw(case.n_tokens, d_in), draw(d_out, d_in) / d_in**0.5
        return cls(x.requires_grad_(), weight, a.requires_grad_(), b.requires_grad_(), draw(case.n_tokens, d_out))

    def results(self, y: Tensor, lora_A: Tensor | None = None, lora_B: Tensor | None = None) -> dict[str, Tensor]:
        a, b = self.lora_A if lora_A is None else lora_A, self.lora_B if lora_B is None else lora_B
        return {"y": y, "dx": self.x.grad, "da": a.grad, "db": b.grad}

    def exact(self) -> dict[str, Tensor]:
        """Computes the results in float64 from the same values."""
        names = ("x", "weight", "lora_A", "lora_B", "dy")
        x, weight, a, b, dy = (getattr(self, name).detach().double() for name in names)
        s, ds = x @ a.T, self.scaling * (dy @ b)
        y = x @ weight.T + self.scaling * (s @ b.T)
        return {"y": y, "dx": dy @ weight + ds @ a, "da": ds.T @ x, "db": self.scaling * (dy.T @ s)}


def provider(
    op: Operands,
    forward: Callable[[], Tensor],
    context: Callable = contextlib.nullcontext,
    trained: tuple[Tensor, Tensor] | None = None,
    compiled: bool = False,
) -> Provider:
    """Returns a provider of the layer; ``trained``: a and b, where they are not those of ``op``."""
    a, b = trained or (op.lora_A, op.lora_B)

    def prepare():
        for t in (op.x, a, b):
            t.grad = None

    def backward(y):
        y.backward(op.dy)

    results = lambda y: op.results(y, a, b)
    return Provider(forward, backward, results, prepare, context, (op.weight, a, b), compiled)


@contextlib.contextmanager
def backend(name: str, strategy: str | None = None):
    """Sets the backend, and with Triton the GEMM strategy (None: the one that the table picks)."""
    with lf.set_backend(name), contextlib.ExitStack() as stack:
        if strategy is not None:
            from lora_fast.kernels import tiles

            stack.enter_context(tiles.assume(strategy=strategy))
        yield


def ours(case: Case, setting: Setting) -> dict[str, Callable]:
    """Returns name → context of each of our variants."""
    if not setting.triton:
        return {"ours": lambda: backend("torch")}
    from lora_fast.kernels import tiles

    widths = [width for pair in case.pairs for width in pair]
    names = tiles.strategies(setting.device, getattr(torch, case.dtype), *widths)
    by_strategy = {f"ours, {name}": lambda name=name: backend("triton", name) for name in names}
    return {"ours": lambda: backend("triton")} | by_strategy


def layer(case: Case, setting: Setting) -> tuple[Operands, dict[str, Callable[[], Provider]]]:
    """Returns the operands and every provider of the whole layer."""
    op = Operands.of(case, setting.device)
    call = (op.x, op.weight, op.lora_A, op.lora_B, op.scaling, case.dropout)
    providers: dict[str, Callable[[], Provider]] = {"torch": lambda: provider(op, lambda: eager(*call))}
    providers["torch.compile"] = lambda: compiled(lambda run: provider(op, lambda: run(*call), compiled=True), eager)
    providers["PEFT"] = lambda: peft(op, case, torch.float32)
    if case.dtype != "float32":
        providers[f"PEFT, {case.dtype} adapters"] = lambda: peft(op, case, getattr(torch, case.dtype))
        providers["PEFT, autocast"] = lambda: peft(op, case, torch.float32, autocast=True)
    if not case.dropout:
        providers["addmm_"] = lambda: provider(op, lambda: InPlaceLoRA.apply(*call[:5]))

    def run():
        return lf.functional.lora_linear(op.x, op.weight, None, *call[2:])

    for name, context in ours(case, setting).items():
        providers[name] = lambda context=context: provider(op, run, context)
    providers["frozen linear"] = lambda: frozen(op)
    return op, providers


def frozen(op: Operands) -> Provider:
    """Returns a provider of the linear layer without an adapter: forward and dx."""

    def prepare():
        op.x.grad = None

    return Provider(
        lambda: F.linear(op.x, op.weight), lambda y: y.backward(op.dy), None, prepare, excluded=(op.weight,)
    )


def peft(
    op: Operands,
    case: Case,
    adapter: torch.dtype,
    autocast: bool = False,
    magnitude: nn.Parameter | None = None,
) -> Provider:
    """Returns a provider of PEFT's layer over the same frozen weight, with copies of a and b in dtype ``adapter``, and
    DoRA's magnitude if there is one."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Unavailable(f"peft cannot be imported: {error}") from error
    d_in, d_out = case.shape
    base = nn.Linear(d_in, d_out, bias=False, device="meta")
    base.weight = nn.Parameter(op.weight, requires_grad=False)
    options = {"lora_dropout": case.dropout, "target_modules": ["base"], "use_dora": magnitude is not None}
    config = LoraConfig(r=case.r, lora_alpha=op.scaling * case.r, **options)
    module = inject_adapter_in_model(config, nn.ModuleDict({"base": base}))["base"].train()
    trained = []
    for factor, value in ((module.lora_A, op.lora_A), (module.lora_B, op.lora_B)):
        factor["default"].weight = nn.Parameter(value.detach().to(adapter, copy=True))
        trained.append(factor["default"].weight)
    if magnitude is not None:
        module.lora_magnitude_vector["default"].weight = magnitude
    context = lambda: torch.autocast(op.x.device.type, op.x.dtype, enabled=autocast)
    return provider(op, lambda: module(op.x), context, tuple(trained))


def compiled(build: Callable[[Callable], Provider], function: Callable, reset: bool = True) -> Provider:
    """Returns ``build`` of the compiled function, after one run that compiles it.

    Args:
        reset: whether to discard earlier compilations, so that each case is compiled for its own sizes.
    """
    if reset:
        torch._dynamo.reset()
    provider = build(torch.compile(function))
    try:
        once(provider)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise Unavailable(f"torch.compile: {str(error).splitlines()[0]}") from error
    return provider
