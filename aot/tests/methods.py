# SPDX-License-Identifier: Apache-2.0
"""The check ``methods``: steps of each method of docs/engine.md, called in C in the order of its table, have the bits
of LoRAAdamW's. Factors are float32; ScaLoRA merges into bfloat16 weights."""

from collections.abc import Callable
from ctypes import c_int64, c_void_p

import torch
from interpreter import Interpreter
from library import Factor, Library, StepWork, Stub

from lora_fast.backend import set_backend
from lora_fast.kernels import limits, tiles
from lora_fast.layers.lora import LoRALinear
from lora_fast.methods import ILoRA, PiLoRA, ScaledAdamW, ScaleReg, ScaLoRA
from lora_fast.optim import LoRAAdamW

R, STEPS, PAIRS = 16, 2, ((64, 96), (528, 48))  # (d_in, d_out)
LR, BETAS, EPS, DECAY = 0.01, (0.9, 0.999), 1e-8, 0.01
LAM, REG_EPS, DAMPING, KAPPA, LOW, HIGH = 0.1, 1e-6, 0.1, 2.5, 0.25, 4.0
GRAM, STEP, TRANSFORM, MERGE = range(4)  # lora_fast_op
OPS = {"gram", "adamw_step", "transform", "imbalance", "scale_reg", "spd_inverse", "scalora", "merge"}


def is_built(library: Library) -> bool:
    """Returns whether the library has the methods' kernels."""
    words = [kernel.key.decode().split() for kernel in library.kernels]
    float32 = {op for _, op, dtype, r, *_ in words if dtype == "float32" and r in (f"r{R}", "r8")}
    merges = {op for _, op, dtype, r, *_ in words if (dtype, r) == ("bfloat16", f"r{R}")}
    return float32 | (merges & {"merge"}) >= OPS


def pairs() -> torch.nn.ModuleList:
    """Returns the layers, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    numbers = lambda *shape: torch.randn(*shape, generator=generator)
    layers = torch.nn.ModuleList()
    for d_in, d_out in PAIRS:
        layer = LoRALinear(d_in, d_out, r=R, alpha=2 * R, bias=False, device="cpu", dtype=torch.bfloat16)
        with torch.no_grad():
            layer.weight.copy_(numbers(d_out, d_in))
        layer.lora_A.data, layer.lora_B.data = numbers(R, d_in), numbers(d_out, R)
        layers.append(layer)
    return layers


def set_gradients(layers: torch.nn.ModuleList, step: int) -> None:
    generator = torch.Generator().manual_seed(1 + step)
    for layer in layers:
        for factor in (layer.lora_A, layer.lora_B):
            factor.grad = torch.randn(factor.shape, generator=generator)


class Engine:
    """The state of an optimizer in C: factors are numbered with those of b first."""

    def __init__(self, library: Library, layers: torch.nn.ModuleList):
        self.library, self.layers, self.n = library, layers, len(layers)
        self.factors = [layer.lora_B for layer in layers] + [layer.lora_A for layer in layers]
        self.moments = [(torch.zeros(p.shape), torch.zeros(p.shape)) for p in self.factors]
        self.steps = torch.zeros(2 * self.n)
        self.hyper = torch.tensor([[LR, *BETAS, EPS, DECAY]], dtype=torch.float64)
        self.tables: list[torch.Tensor] = []  # which launches read

    def group(self, op: int, rows: list[Factor], n_rows: int, dtype: torch.dtype = torch.float32, flat: bool = False):
        group, table = self.library.group(op, dtype, R, n_rows, rows, flat)
        self.tables.append(table)
        group.device = table.data_ptr()
        return group

    def on_factors(self, op: int, flat: bool = False):
        rows, n_rows = [], self.n if op == GRAM else 2 * self.n
        for i, p in enumerate(self.factors):
            tensors = (p, p.grad, *self.moments[i])[: {GRAM: 2, STEP: 4, TRANSFORM: 1}[op]]
            is_a = i >= self.n
            d = p.shape[1] if is_a else p.shape[0]
            rows.append(Factor(_addresses(tensors), d, 0, is_a, i % n_rows))
        return self.group(op, rows, n_rows, flat=flat)

    def gram(self) -> torch.Tensor:
        group, grams = self.on_factors(GRAM), torch.empty(5, self.n, R, R)
        self.library("gram", group, grams, self._workspace("gram_", group))
        return grams

    def step(self, grams: bool = False, **work: torch.Tensor) -> torch.Tensor:
        """Steps and returns the Grams of the new factors, of Ka and Kb in this order."""
        flat = not (grams or work.keys() - {"additive"})
        group, result = self.on_factors(STEP, flat), torch.empty(2, self.n, R, R)
        extra = {name: tensor.data_ptr() for name, tensor in work.items()}
        extra |= {"grams": result.data_ptr()} if grams else {}
        workspace = self._workspace("gram_", group) if grams else None
        self.library("adamw_step", group, self.hyper, 1, self.steps, StepWork(**extra), workspace)
        return result.flip(0).contiguous()

    def add(self, matrices: torch.Tensor) -> None:
        self.library("transform", self.on_factors(TRANSFORM), matrices, 1, None, None)

    def inverses(self, grams: torch.Tensor) -> torch.Tensor:
        n, inverses, info = 2 * self.n, torch.empty(2 * self.n, R, R), torch.empty(2 * self.n, dtype=torch.int32)
        self.library("spd_inverse", n, R, grams, DAMPING, inverses, info, self._workspace("small_", n, R))
        return inverses

    def coefficients(self, grams: torch.Tensor) -> torch.Tensor:
        entries = [torch.tensor([float(R * layer.weight.shape[side]) for layer in self.layers]) for side in (1, 0)]
        result = torch.empty(2 * self.n)
        self.library("scale_reg", self.n, R, grams[0], grams[1], *entries, LAM, REG_EPS, result)
        return result

    def imbalance(self, grams: torch.Tensor, lam: float) -> torch.Tensor:
        rho, matrices = torch.tensor([R / len(layer.weight) for layer in self.layers]), torch.empty(2 * self.n, R, R)
        self.library("imbalance", self.n, R, grams[0], grams[1], rho, self.hyper, self.hyper, lam, matrices)
        return matrices

    def scales(self) -> list[torch.Tensor]:
        """Returns ScaLoRA's scale_p, scale_g and residual_scale."""
        n, grams, solver = self.n, self.gram(), limits.SOLVERS.index("nnls")
        x, active = torch.empty(n, 2 * R), torch.empty(n, 2 * R, dtype=torch.uint8)
        info, workspace = torch.empty(n, dtype=torch.int32), self._workspace("scalora_", n, R)
        self.library("scalora_solve", n, R, grams, solver, x, active, info, workspace)
        kappa, scaling = torch.tensor([KAPPA], dtype=torch.float64), torch.full((n,), 2.0)
        results = [torch.empty(2 * n, R), torch.empty(2 * n, R), torch.empty(n, R)]
        self.library("scalora_scales", n, R, x, active, kappa, scaling, LOW, HIGH, *results)
        return results

    def merge(self, scale: torch.Tensor) -> None:
        rows = [
            Factor(_addresses((layer.weight, layer.weight, layer.lora_A, layer.lora_B)), *layer.weight.shape, 0, i)
            for i, layer in enumerate(self.layers)
        ]
        group = self.group(MERGE, rows, self.n, torch.bfloat16)
        self.library("merge", group, scale, limits.ROUNDINGS.index("nearest"), c_int64(0), None)

    def _workspace(self, name: str, *arguments) -> torch.Tensor:
        return torch.empty(max(16, self.library.workspace(name, *arguments)), dtype=torch.uint8)


def _addresses(tensors) -> object:
    return (c_void_p * 4)(*[tensor.data_ptr() for tensor in tensors])


def decoupled(engine: Engine) -> None:
    change = engine.coefficients(engine.step(grams=True)) * -LR
    engine.add(torch.diag_embed(change[:, None].expand(-1, R)).contiguous())


def scale_reg_and_matrices(engine: Engine) -> None:
    grams = engine.gram()
    engine.step(additive=engine.coefficients(grams), matrices=engine.inverses(grams))


def pilora(engine: Engine) -> None:
    grams = engine.step(grams=True, matrices=engine.inverses(engine.gram()))
    engine.add(engine.imbalance(grams, 1.0))


def scalora(engine: Engine) -> None:
    scale_p, scale_g, residual_scale = engine.scales()
    engine.merge(residual_scale)
    engine.step(scale_p=scale_p, scale_g=scale_g)


METHODS: dict[str, tuple[list, Callable[[Engine], object]]] = {
    "AdamW": ([], lambda engine: engine.step()),
    "ScaleReg": (
        [ScaleReg(LAM, REG_EPS)],
        lambda engine: engine.step(additive=engine.coefficients(engine.gram())),
    ),
    "ScaleReg, decoupled": ([ScaleReg(LAM, REG_EPS, decoupled=True)], decoupled),
    "ScaledAdamW": (
        [ScaledAdamW(DAMPING)],
        lambda engine: engine.step(matrices=engine.inverses(engine.gram())),
    ),
    "ScaleReg, ScaledAdamW": ([ScaleReg(LAM, REG_EPS), ScaledAdamW(DAMPING)], scale_reg_and_matrices),
    "ILoRA": ([ILoRA(LAM)], lambda engine: engine.add(engine.imbalance(engine.step(grams=True), LAM))),
    "PiLoRA": ([PiLoRA(damping=DAMPING)], pilora),
    "ScaLoRA": ([ScaLoRA(kappa=KAPPA, interval=1, solver="nnls", rounding="nearest")], scalora),
}


def compare(library: Library, stub: Stub, arch: int) -> str:
    """Compares factors and weights after some steps of each method."""
    stub.set("arch", arch), stub.set("noting", 0)
    interpreter = Interpreter(library, stub)
    for name, (methods, run) in METHODS.items():
        ours, theirs = pairs(), pairs()
        with set_backend("triton"), tiles.assume(arch=arch):
            optimizer = LoRAAdamW(theirs, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, methods=methods)
            for step in range(STEPS):
                set_gradients(theirs, step)
                optimizer.step()
        engine = Engine(library, ours)
        for step in range(STEPS):
            set_gradients(ours, step)
            run(engine)
            interpreter.check()
        for mine, expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(mine[1], expected), f"{name}: {mine[0]} differs from LoRAAdamW's"
    return f"sm_{arch}: {len(METHODS)} methods with the bits of LoRAAdamW"
