"""The optimizer's step on all adapter pairs of a model: LoRAAdamW and its methods against torch and PEFT.

Only the shapes of the model are used. Gradients are random and the same for every provider. Every run is the step after
the thousandth, since the first steps cost less (the powers of the betas are cheap). Every run starts from the same
state: before the clock starts, factors, gradients and the optimizer's state are written back in place, in that order.
(PEFT's Riemannian optimizer writes into the gradients and would diverge on its own results.) All providers do this
alike, before L2 is flushed; on a CPU, where nothing is flushed, each starts with the same kinds of bytes freshly
written. The weights that ScaLoRA merges into are not restored: their values make no difference to a step.

In the variants with ``MOVING``, gradients and learning rate change from run to run, as they do in training (zero_grad
sets gradients to None, a schedule sets the rate): each gradient is at an address that it did not have before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

import lora_fast as lf
from lora_fast import methods as M
from lora_fast.measure.ceilings import Cost
from suite.cases import Case, Scale
from suite.comparison import Comparison, Provider, Setting, Unavailable
from suite.ops.pair_operands import Pairs
from suite.ops.providers import backend

LR, LAM = 2e-4, 0.1
STEPS = 1000  # before the measured one
MOVING = ", moving gradients and rate"
PLACES = 512  # addresses of a moving gradient, until the first one is used again
METHODS: dict[str, tuple] = {
    "AdamW": (),
    "ILoRA": (M.ILoRA(lam=LAM),),
    "PiLoRA": (M.PiLoRA(),),
    "ScaleReg": (M.ScaleReg(),),
    "ScaLoRA, 10 steps": (M.ScaLoRA(interval=10),),
    "BaLoRA": (M.BaLoRA(),),
    "LoRARITE": (M.LoRARITE(),),
    "LoRAMuon": (M.LoRAMuon(),),
}


def cases(scale: Scale) -> list[Case]:
    """Returns a case for each method; ``Case.dtype`` is that of the weights that ScaLoRA merges into."""
    variants = *METHODS, *(f"{name}{MOVING}" for name in ("AdamW", "ILoRA", "PiLoRA"))
    return [replace(case, dtype=scale.dtypes[0]) for case in scale.steps("step", variants)]


def steps(variant: str) -> int:
    """Returns the steps of one run: ten where ScaLoRA merges in one of ten."""
    return 10 if "10 steps" in variant else 1


class Trained:
    """The pairs of a case as parameters with gradients.

    Args:
        weights: dtype of a weight for each pair, which ScaLoRA merges into; None for no weights.
        moves: whether gradients and learning rate change from run to run.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        weights: torch.dtype | None = None,
        moves: bool = False,
    ):
        pairs = Pairs.of(case, device)
        self.a, self.b = ([nn.Parameter(t.to(dtype)) for t in factors] for factors in (pairs.a, pairs.b))
        for p, g in zip(self.flat, pairs.da + pairs.db, strict=True):
            p.grad = g.to(dtype)
        weight = lambda d_in, d_out: torch.zeros(d_out, d_in, dtype=weights, device=device)
        frozen = [(weight(*shape),) if weights else () for shape in case.pairs]
        self.pairs = [(a, b, 2.0, *w) for a, b, w in zip(self.a, self.b, frozen, strict=True)]
        self._start = [t.clone() for t in self._moving]
        self._moves = _Moves(self.flat) if moves else None

    @property
    def flat(self) -> list[nn.Parameter]:
        return self.a + self.b

    @property
    def _moving(self) -> list[torch.Tensor]:
        return [p.data for p in self.flat] + [p.grad for p in self.flat]

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Writes back the state that every run starts from."""
        if self._moves:
            self._moves.move(optimizer)
        torch._foreach_copy_(self._moving, self._start)
        for p in self.flat:
            for name, state in optimizer.state.get(p, {}).items():
                state.fill_(STEPS) if name == "step" else state.zero_()

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes a first step, in which the optimizer creates its state, and restores the start."""
        optimizer.step()
        self.restore(optimizer)


class _Moves:
    """Gives the gradients of some parameters other addresses, and the optimizer another rate, at every call."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters, self.turn, self.step = parameters, 0, 512 // parameters[0].element_size()  # 512 bytes
        self.numels = [-(-p.numel() // self.step) * self.step for p in parameters]
        self.pool = parameters[0].new_empty(sum(self.numels) + PLACES * self.step)

    def move(self, optimizer: torch.optim.Optimizer) -> None:
        self.turn += 1
        place = self.turn % PLACES * self.step
        for p, numel in zip(self.parameters, self.numels, strict=True):
            p.grad = self.pool[place : place + p.numel()].view_as(p)
            place += numel
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 + self.turn % 7 / 1000)


class LoopedILoRA:
    """iLoRA as written straight from the paper: torch's AdamW, then a Python loop over the layers."""

    def __init__(self, trained: Trained, fused: bool):
        self.pairs = trained.pairs
        self.adamw = torch.optim.AdamW(trained.flat, lr=LR, weight_decay=0.0, fused=fused or None)
        self.state, self.param_groups = self.adamw.state, self.adamw.param_groups

    @torch.no_grad()
    def step(self) -> None:
        self.adamw.step()
        for a, b, *_ in self.pairs:
            rho = a.shape[0] / b.shape[0]
            d = a @ a.T - rho * b.T @ b
            change = LR * LAM * d @ a
            b.add_(b @ d, alpha=LR * LAM * rho)
            a.sub_(change)


def riemannian(trained: Trained):
    """Returns PEFT's Riemannian optimizer over a model that holds the pairs under the names of PEFT's layers."""
    try:
        from peft.optimizers import create_riemannian_optimizer
    except ImportError as error:
        raise Unavailable(f"PEFT's Riemannian optimizer cannot be imported: {error}") from error
    model = nn.Module()
    for i, (a, b) in enumerate(zip(trained.a, trained.b, strict=True)):
        layer = nn.Module()
        layer.lora_A, layer.lora_B = nn.ModuleDict({"default": nn.Module()}), nn.ModuleDict({"default": nn.Module()})
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
        model.add_module(f"layer{i}", layer)
    return create_riemannian_optimizer(model, torch.optim.AdamW, lr=LR, weight_decay=0.0)


def build(case: Case, setting: Setting) -> Comparison:
    method, moves = case.variant.removesuffix(MOVING), case.variant.endswith(MOVING)
    merges = "ScaLoRA" in method
    weights = getattr(torch, case.dtype) if merges else None

    def provider(
        make: Callable, name: str = "auto", comparable: bool = True, weights: torch.dtype | None = None
    ) -> Callable[[], Provider]:
        def build_provider() -> Provider:
            trained = Trained(case, setting.device, weights=weights, moves=moves)
            context = lambda: backend(name)
            with context():
                optimizer = make(trained)
                trained.begin(optimizer)

            def run():
                for _ in range(steps(case.variant)):
                    optimizer.step()

            def results(_):
                return {str(i): p for i, p in enumerate(trained.flat)}

            def prepare():
                trained.restore(optimizer)

            judged = results if comparable and not moves else None  # another rate gives another result
            return Provider(run, None, judged, prepare, context, excluded=trained.flat)

        return build_provider

    def exact() -> dict[str, torch.Tensor]:
        trained = Trained(case, setting.device, torch.float64, torch.float64 if merges else None)
        with backend("torch"):
            optimizer = lf.optim.LoRAAdamW(trained.pairs, lr=LR, methods=METHODS[method])
            trained.begin(optimizer)
            for _ in range(steps(case.variant)):
                optimizer.step()
        return {str(i): p.detach() for i, p in enumerate(trained.flat)}

    def plain(fused: bool) -> Callable:
        return lambda trained: torch.optim.AdamW(trained.flat, lr=LR, weight_decay=0.0, fused=fused or None)

    def looped(fused: bool) -> Callable:
        return lambda trained: LoopedILoRA(trained, fused)

    def lora_adamw(*methods) -> Callable:
        return lambda trained: lf.optim.LoRAAdamW(trained.pairs, lr=LR, methods=methods)

    name = "triton" if setting.triton else "torch"
    ours = provider(lora_adamw(*METHODS[method]), name, weights=weights)
    if method == "AdamW":
        providers = {"torch's fused AdamW": provider(plain(True)), "torch's AdamW": provider(plain(False))}
        providers["ours"] = ours
    elif method == "ILoRA":
        loops = {f"loop on torch's {kind}AdamW": provider(looped(bool(kind))) for kind in ("", "fused ")}
        providers = loops | {"torch's fused AdamW alone": provider(plain(True), comparable=False), "ours": ours}
    elif method == "PiLoRA":
        providers = {"PEFT's Riemannian": provider(riemannian, comparable=False), "ours": ours}
    else:
        providers = {"ours without a method": provider(lora_adamw(), name, comparable=False), "ours": ours}
    numel = sum(p.numel() for p in Trained(case, setting.device).flat)
    # a step reads p, g, m, v and writes p, m, v, 4 bytes each; AdamW computes about a dozen operations an element
    cost = Cost(28 * numel * steps(case.variant), 12 * numel * steps(case.variant))
    known = not merges or setting.device.type == "cpu"  # float64 weights of a large model would not fit on a GPU
    return Comparison(providers, {"forward": cost}, exact if known else None)
