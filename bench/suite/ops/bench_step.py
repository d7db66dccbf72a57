"""The optimizer's step on all adapter pairs of a model: LoRAAdamW and its methods against what there is.

Only the shapes of the model are used; gradients are random and the same for every provider. Every run is the step after
the thousandth (a first step costs less: its powers of the betas are short) and begins where the others did: factors,
gradients (PEFT's Riemannian optimizer writes into them, and would diverge on its own results) and the optimizer's state
are written back, in place and in that order, before the clock starts. That is alike for all providers, and before L2 is
flushed; where it is not flushed, on a CPU, each of them starts with the same kinds of bytes freshly written. ScaLoRA's
weights are not restored: what they hold makes no difference to a step.

Of the variants that say so, gradients and learning rate move from run to run, as they do in training (zero_grad sets
gradients to None, a schedule sets the rate): each gradient is at an address that it never had before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

import lora_fast as lf
from lora_fast import methods as M
from suite.cases import Case, Scale
from suite.comparison import Comparison, Cost, Provider, Setting, Unavailable
from suite.ops.pair_operands import Pairs
from suite.ops.providers import backend

LR, LAM = 2e-4, 0.1
STEPS = 1000  # taken before
MOVING = ", moving gradients and rate"
PLACES = 512  # of moving gradients, until an address comes again
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
    """``dtype``: of the weights that ScaLoRA merges into."""
    variants = *METHODS, *(f"{name}{MOVING}" for name in ("AdamW", "ILoRA", "PiLoRA"))
    return [replace(case, dtype=scale.dtypes[0]) for case in scale.steps("step", variants)]


def steps(variant: str) -> int:
    """Of one run: ScaLoRA merges in one of ten."""
    return 10 if "10 steps" in variant else 1


class Trained:
    """Pairs as parameters with gradients; ``weights``: with a weight of that dtype each, for ScaLoRA to merge into;
    ``moves``: whether gradients and learning rate do."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        weights: torch.dtype | None = None,
        moves: bool = False,
    ):
        pairs = Pairs.of(case, device)
        self.a, self.b = ([nn.Parameter(t.to(dtype)) for t in some] for some in (pairs.a, pairs.b))
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
        """Back to where every run begins."""
        if self._moves:
            self._moves.move(optimizer)
        torch._foreach_copy_(self._moving, self._start)
        for p in self.flat:
            for name, state in optimizer.state.get(p, {}).items():
                state.fill_(STEPS) if name == "step" else state.zero_()

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer makes its state in a first step."""
        optimizer.step()
        self.restore(optimizer)


class _Moves:
    """Other places for the gradients of parameters, and another learning rate, at every call."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters, self.turn, self.step = parameters, 0, 512 // parameters[0].element_size()
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
    """iLoRA as one writes it from the paper: torch's AdamW, then a Python loop over the layers."""

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
    """PEFT's optimizer over a model that holds the pairs; named as PEFT's layers are."""
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
        def build_one() -> Provider:
            trained = Trained(case, setting.device, weights=weights, moves=moves)
            context = lambda: backend(name)
            with context():
                optimizer = make(trained)
                trained.begin(optimizer)

            def run():
                for _ in range(steps(case.variant)):
                    optimizer.step()

            named = lambda _: {str(i): p for i, p in enumerate(trained.flat)}
            prepare = lambda: trained.restore(optimizer)
            results = named if comparable and not moves else None  # another rate is another result
            return Provider(run, None, results, prepare, context, own=trained.flat)

        return build_one

    def exact() -> dict[str, torch.Tensor]:
        trained = Trained(case, setting.device, torch.float64, torch.float64 if merges else None)
        with backend("torch"):
            optimizer = lf.optim.LoRAAdamW(trained.pairs, lr=LR, methods=METHODS[method])
            trained.begin(optimizer)
            for _ in range(steps(case.variant)):
                optimizer.step()
        return {str(i): p.detach() for i, p in enumerate(trained.flat)}

    plain = lambda fused: lambda trained: torch.optim.AdamW(trained.flat, lr=LR, weight_decay=0.0, fused=fused or None)
    looped = lambda fused: lambda trained: LoopedILoRA(trained, fused)
    lora_adamw = lambda *methods: lambda trained: lf.optim.LoRAAdamW(trained.pairs, lr=LR, methods=methods)
    name = "triton" if setting.triton else "torch"
    mine = provider(lora_adamw(*METHODS[method]), name, weights=weights)
    if method == "AdamW":
        providers = {"torch's fused AdamW": provider(plain(True)), "torch's AdamW": provider(plain(False))}
        providers["ours"] = mine
    elif method == "ILoRA":
        loops = {f"loop on torch's {kind}AdamW": provider(looped(bool(kind))) for kind in ("", "fused ")}
        providers = loops | {"torch's fused AdamW alone": provider(plain(True), comparable=False), "ours": mine}
    elif method == "PiLoRA":
        providers = {"PEFT's Riemannian": provider(riemannian, comparable=False), "ours": mine}
    else:
        providers = {"ours without a method": provider(lora_adamw(), name, comparable=False), "ours": mine}
    numel = sum(p.numel() for p in Trained(case, setting.device).flat)
    runs = steps(case.variant)  # p, g, m, v read, p, m, v written, once a step; AdamW's dozen operations
    work = Cost(28 * numel * runs, 12 * numel * runs)
    known = not merges or setting.device.type == "cpu"  # float64 weights of a large model would not fit on a GPU
    return Comparison(providers, {"forward": work}, exact if known else None)
