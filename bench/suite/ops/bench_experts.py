"""The linear layers of all experts, forward and backward: y_e = x_e W_eᵀ + s x_e a_eᵀ b_eᵀ for the rows x_e that are
routed to expert e; dx, da, db."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fast as lf
from suite.cases import Case, Scale
from suite.comparison import Comparison, Provider, Setting, Unavailable
from suite.ops import bench_layer
from suite.ops.providers import Operands, ours, provider

EXPERTS = 16


def cases(scale: Scale) -> list[Case]:
    """Returns the cases of the first linear layer, since each has the weights of ``EXPERTS`` layers."""
    first = next(iter(scale.linears))
    variant = f"{EXPERTS} experts"
    return [replace(case, variant=variant) for case in scale.layers("experts") if case.shape == first]


@dataclass
class Stacked(Operands):
    """Random operands of all experts; ``offsets``: the end of each expert's rows."""

    offsets: Tensor = field(kw_only=True)

    @classmethod
    def of(cls, case: Case, device: torch.device) -> "Stacked":
        (d_in, d_out), r, n, dtype = case.shape, case.r, case.n_tokens, getattr(torch, case.dtype)
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)
        x, dy = draw(n, d_in).to(dtype).requires_grad_(), draw(n, d_out).to(dtype)
        weight = (draw(EXPERTS, d_out, d_in) / d_in**0.5).to(dtype)
        a, b = draw(EXPERTS, r, d_in) / d_in**0.5, draw(EXPERTS, d_out, r) / r**0.5
        experts = torch.randint(EXPERTS, (n,), generator=generator, device=device).sort().values
        ends = torch.searchsorted(experts, torch.arange(EXPERTS, device=device), right=True, out_int32=True)
        return cls(x, weight, a.requires_grad_(), b.requires_grad_(), dy, offsets=ends)

    def exact(self) -> dict[str, Tensor]:
        """Computes the results in float64 from the same values, expert by expert."""
        x, dy = self.x.detach().double(), self.dy.double()
        y, dx = torch.zeros_like(dy), torch.zeros_like(x)
        da, db = (torch.zeros_like(t, dtype=torch.float64) for t in (self.lora_A, self.lora_B))
        start = 0
        for e, end in enumerate(self.offsets.tolist()):
            w, a, b = (t[e].detach().double() for t in (self.weight, self.lora_A, self.lora_B))
            rows, total = slice(start, end), w + self.scaling * b @ a
            y[rows], dx[rows] = x[rows] @ total.T, dy[rows] @ total
            da[e] = self.scaling * (dy[rows] @ b).T @ x[rows]
            db[e] = self.scaling * dy[rows].T @ (x[rows] @ a.T)
            start = end
        return {"y": y, "dx": dx, "da": da, "db": db}


def build(case: Case, setting: Setting) -> Comparison:
    op = Stacked.of(case, setting.device)
    providers = {"PEFT": lambda: by_peft(op, case)}

    def run() -> Tensor:
        return lf.functional.lora_grouped_linear(op.x, op.weight, None, op.lora_A, op.lora_B, op.scaling, op.offsets)

    context = ours(case, setting)["ours"]
    providers["ours"] = lambda: provider(op, run, context)
    return Comparison(providers, bench_layer.costs(op, case), op.exact)


class Experts(nn.Module):
    """The frozen layers as transformers' experts compute them, by torch's grouped product."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return F.grouped_mm(x, self.weight.mT, offs=offsets)


def by_peft(op: Stacked, case: Case) -> Provider:
    """Returns a provider of PEFT's ``target_parameters`` over the same frozen weights, with copies of a and b."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Unavailable(f"peft cannot be imported: {error}") from error
    if not hasattr(F, "grouped_mm"):
        raise Unavailable("torch has no grouped_mm")
    options = {"target_modules": [], "target_parameters": ["experts.weight"]}
    config = LoraConfig(r=case.r, lora_alpha=op.scaling * case.r, **options)
    module = inject_adapter_in_model(config, nn.ModuleDict({"experts": Experts(op.weight)}))["experts"].train()
    a = op.lora_A.detach().flatten(0, 1)
    b = op.lora_B.detach().permute(1, 2, 0).flatten(1)  # (d_out, r · E), the experts last
    trained = []
    for factor, value in ((module.lora_A, a), (module.lora_B, b)):
        factor["default"].weight = nn.Parameter(value.to(torch.float32, copy=True))
        trained.append(factor["default"].weight)
    layer = provider(op, lambda: module(op.x, op.offsets), trained=tuple(trained))

    def results(y: Tensor) -> dict[str, Tensor]:
        da, db = (factor.grad for factor in trained)
        stacked = {"da": da.view_as(op.lora_A), "db": db.view(len(db), case.r, EXPERTS).permute(2, 0, 1)}
        return {"y": y, "dx": op.x.grad} | stacked

    return replace(layer, results=results)
