"""Valid calls of the public functions, whose arguments tests/test_public_api.py replaces, and what is right."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
from hostile_calls import Row
from torch import Tensor, nn
from torch.nn import functional as F

import lora_fast as lf
from lora_fast import functional as LF

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def plain(value):
    """Returns a number of numpy or a tensor of one element as a number of Python."""
    size = value.numel() if isinstance(value, Tensor) and not value.is_meta else getattr(value, "size", None)
    return value.item() if size == 1 and hasattr(value, "item") else value


def number(low=-math.inf, high=math.inf, *, or_none=False):
    """Returns a predicate: a number of Python, numpy or torch within the limits."""

    def is_number(value):
        value = plain(value)
        return (value is None and or_none) or (isinstance(value, numbers.Real) and low <= value <= high)

    return is_number


def integer(low=-math.inf, high=math.inf, *, or_none=False):
    is_number = number(low, high, or_none=or_none)
    return lambda value: is_number(value) and (plain(value) is None or isinstance(plain(value), numbers.Integral))


def flag(value):
    return isinstance(plain(value), bool)


def one_of(*options):
    return lambda value: isinstance(value, (str, type(None))) and value in options


def kind(*classes):
    return lambda value: isinstance(value, classes)


def module_or_pairs(value):
    return isinstance(value, nn.Module)


EXACT = {"rtol": 0.02, "atol": 0.02}


def close(got, wanted) -> bool:
    """Returns whether two results are equal up to the rounding of 16 bits. Where float32 overflows, both may be
    infinite or NaN."""
    if got.shape != wanted.shape:
        return False
    if got.is_meta or wanted.is_meta:
        return True
    got, wanted = got.detach().double(), wanted.detach().double()
    lost = ~got.isfinite()
    return torch.allclose(got[~lost], wanted[~lost], **EXACT) and bool(
        (~wanted[lost].isfinite() | (wanted[lost].abs() > 1e30)).all()
    )


def wide(x):
    return x.double() if isinstance(x, Tensor) else x


def tensor(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


# ── functions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def linear():
    factors = {"lora_A": tensor(4, 6), "lora_B": tensor(5, 4)}
    settings = {"scaling": 0.5, "dropout_p": 0.0, "seed": None}
    return LF.lora_linear, {"x": tensor(3, 6), "weight": tensor(5, 6), "bias": tensor(5)} | factors | settings


def linear_judge(kwargs, y):
    x, weight, bias, a, b = (wide(kwargs[name]) for name in ("x", "weight", "bias", "lora_A", "lora_B"))
    if float(plain(kwargs["dropout_p"])) > 0:
        return y.shape == (*x.shape[:-1], len(weight))
    wanted = F.linear(x, weight, bias) + float(plain(kwargs["scaling"])) * (x @ a.T @ b.T)
    return close(y, wanted) and y.dtype == kwargs["x"].dtype


def linear_group():
    members = [(tensor(d_out, 6), tensor(d_out), tensor(r, 6), tensor(d_out, r), 0.5) for d_out, r in ((5, 4), (3, 2))]
    return LF.lora_linear_group, {"x": tensor(3, 6), "members": members}


def linear_group_judge(kwargs, ys):
    x, members = wide(kwargs["x"]), [[wide(value) for value in member] for member in kwargs["members"]]
    wanted = [F.linear(x, w, bias) + float(s) * (x @ a.T @ b.T) for w, bias, a, b, s, *_ in members]
    return len(ys) == len(wanted) and all(map(close, ys, wanted))


def grouped_linear():
    factors = {"lora_A": tensor(2, 4, 6), "lora_B": tensor(2, 5, 4)}
    offsets = torch.tensor([1, 3], dtype=torch.int32)
    weights = {"weight": tensor(2, 5, 6), "bias": tensor(2, 5)}
    return LF.lora_grouped_linear, {"x": tensor(3, 6)} | weights | factors | {"scaling": 0.5, "offsets": offsets}


OFFSETS_NEVER = frozenset(("offsets", name) for name in ("NaN", "infinite", "huge", "trained"))  # integers are none


def grouped_linear_judge(kwargs, y):
    x, weight, bias, a, b = (wide(kwargs[name]) for name in ("x", "weight", "bias", "lora_A", "lora_B"))
    scaling = float(plain(kwargs["scaling"]))
    if y.is_meta:
        return y.shape == (len(x), weight.shape[1])
    wanted, start = y.new_zeros(y.shape, dtype=torch.float64), 0
    for e, end in enumerate(kwargs["offsets"].tolist()):
        rows = x[start:end]
        wanted[start:end] = F.linear(rows, weight[e], None if bias is None else bias[e]) + scaling * (
            rows @ a[e].T @ b[e].T
        )
        start = end
    return close(y, wanted) and y.dtype == kwargs["x"].dtype


def linear_batched():
    factors = {"lora_A": [tensor(4, 6), tensor(2, 6)], "lora_B": [tensor(5, 4), tensor(5, 2)], "scaling": [0.5, 2.0]}
    base = {"x": tensor(3, 2, 6), "weight": tensor(5, 6), "bias": tensor(5)}
    return LF.lora_linear_batched, base | factors | {"adapter_indices": torch.tensor([1, -1, 0])}


INDICES_NEVER = frozenset(("adapter_indices", name) for name in ("NaN", "infinite", "huge", "trained"))


def linear_batched_judge(kwargs, y):
    x, weight, bias = (wide(kwargs[name]) for name in ("x", "weight", "bias"))
    wanted, indices = F.linear(x, weight, bias), kwargs["adapter_indices"]
    if y.is_meta:
        return y.shape == wanted.shape
    for i, (a, b, scale) in enumerate(zip(kwargs["lora_A"], kwargs["lora_B"], kwargs["scaling"], strict=True)):
        wanted[indices == i] += float(plain(scale)) * (x[indices == i] @ wide(a).T @ wide(b).T)
    return close(y, wanted) and y.dtype == kwargs["x"].dtype


def dora():
    return LF.dora_linear, linear()[1] | {"magnitude": tensor(5).abs() + 1}


def dora_judge(kwargs, y):
    x, weight, bias, a, b = (wide(kwargs[name]) for name in ("x", "weight", "bias", "lora_A", "lora_B"))
    if float(plain(kwargs["dropout_p"])) > 0:
        return y.shape == (*x.shape[:-1], len(weight))
    total = weight + float(plain(kwargs["scaling"])) * b @ a
    if not total.is_meta and not total.abs().max() < 1e18:  # whose squares overflow in float32, as PEFT's
        return y.shape == (*x.shape[:-1], len(weight))
    scale = wide(kwargs["magnitude"]) / total.norm(dim=1)
    wanted = scale * (x @ total.T)
    return close(y, wanted if bias is None else wanted + bias) and y.dtype == kwargs["x"].dtype


def gram():
    return LF.gram, {"tensors": [tensor(4, 6), tensor(3, 5)], "dim": 1}


def gram_judge(kwargs, grams):
    xs = [wide(x) for x in kwargs["tensors"]]
    return all(close(g, x @ x.T if kwargs["dim"] == 1 else x.T @ x) for g, x in zip(grams, xs, strict=True))


def spd(r=4):
    x = tensor(2, r, r)
    return x @ x.mT + torch.eye(r)


def solve():
    return LF.spd_solve, {"matrices": spd(), "rhs": tensor(2, 4, 3), "damping": 0.1}


def solve_judge(kwargs, result):
    matrices, (x, info) = wide(kwargs["matrices"]), result
    damped = matrices + float(plain(kwargs["damping"])) * torch.eye(matrices.shape[-1], dtype=torch.float64)
    right = True if x.is_meta else x[info > 0].isnan().all()
    solved = torch.ones_like(info, dtype=torch.bool) if info.is_meta else info == 0
    return bool(right) and (x.is_meta or close((damped @ wide(x))[solved], wide(kwargs["rhs"])[solved]))


def inverse():
    return LF.small_inverse, {"matrices": spd()}


def inverse_judge(kwargs, result):
    matrices = wide(kwargs["matrices"])
    if result.is_meta or not matrices.numel():
        return result.shape == matrices.shape
    symmetric = (matrices + matrices.mT) / 2
    if not symmetric.isfinite().all() or torch.linalg.eigvalsh(symmetric).min() < 1 - 1e-3:
        return True  # not what the function promises to invert
    return close(result, torch.linalg.inv(matrices))


def scaling():
    a, b, gradient = tensor(4, 6), tensor(5, 4), tensor(5, 6)
    pair = {"a": a, "b": b, "da": b.T @ gradient, "db": gradient @ a.T}
    return LF.scalora_scaling, pair | {"scaling": 2.0, "kappa": 1.0, "solver": "nnls"}


def scaling_of_lists():
    function, kwargs = scaling()
    return function, {name: [value] if isinstance(value, Tensor) else value for name, value in kwargs.items()}


def scaling_judge(kwargs, result):
    """The scales of tensors of other forms are those of contiguous float64 ones."""
    alpha, beta, _ = result
    if isinstance(alpha, list):
        return all(scaling_judge(_entry(kwargs, i), [x[i] for x in result]) for i in range(len(alpha)))
    kwargs = {name: wide(value).contiguous() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    a, b, da, db = (kwargs[name] for name in ("a", "b", "da", "db"))
    if alpha.is_meta or not close(a @ da.T, db.T @ b):  # not the gradients of one product: the optimum is not unique
        return alpha.shape == beta.shape == a.shape[:1]
    if max(x.abs().max() for x in (a, b, da, db)) > 1e15:  # their Grams overflow in float32
        return bool(alpha.isnan().all() and beta.isnan().all())
    with lf.set_backend("torch"):
        wanted = LF.scalora_scaling(**kwargs)
    return close(alpha, wanted[0]) and close(beta, wanted[1])


def _entry(kwargs, i):
    return {name: value[i] if isinstance(value, (list, tuple)) else value for name, value in kwargs.items()}


def balance():
    return LF.hyperbalance, {"a": tensor(4, 6), "b": tensor(5, 4), "gauge": "symmetric"}


def balance_of_lists():
    return LF.hyperbalance, {"a": [tensor(4, 6)], "b": [tensor(5, 4)], "gauge": "svd"}


def balance_judge(kwargs, result):
    a, b = result
    if isinstance(a, (list, tuple)):
        return all(balance_judge(_entry(kwargs, i), (a[i], b[i])) for i in range(len(a)))
    return close(wide(b) @ wide(a), wide(kwargs["b"]) @ wide(kwargs["a"]))


def add():
    kwargs = {"weight": tensor(5, 6), "a": tensor(4, 6), "b": tensor(5, 4), "scale": 0.5}
    return LF.add_low_rank_, kwargs | {"rounding": "nearest", "seed": None}


def add_judge(kwargs, weight):
    scale = kwargs["scale"]
    scale = wide(scale) if isinstance(scale, Tensor) and scale.dim() else float(plain(scale))
    return close(weight, wide(kwargs["weight"]) + (wide(kwargs["b"]) * scale) @ wide(kwargs["a"]))


def step():
    factors = [tuple(tensor(4, 6, seed=i).abs() for i in range(4)), tuple(tensor(5, 4, seed=i).abs() for i in range(4))]
    hyper = torch.tensor([[0.1, 0.9, 0.99, 1e-8, 0.0]] * 2, dtype=torch.float64)
    kwargs = {"factors": factors, "is_a": [True, False], "hyper": hyper, "steps": torch.ones(2), "work": None}

    def call(**kwargs):
        grams = LF.adapter_step_(**kwargs)
        return grams, [p for p, *_ in kwargs["factors"]]

    return call, kwargs


def step_judge(kwargs, result):
    _, new = result
    if kwargs["work"] is not None:
        return False
    for (p, g, m, v), row, count, q in zip(kwargs["factors"], kwargs["hyper"], kwargs["steps"], new, strict=True):
        lr, beta1, beta2, eps, decay = row.tolist()
        if p.is_meta or count > 2**31:  # beyond what counts as a number of steps
            continue
        p, g, m, v = map(wide, (p, g, m, v))
        n = count.item() + 1
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        denominator = (v / (1 - beta2**n)).sqrt() + eps if n > 0 else v
        wanted = p * (1 - lr * decay) - lr * m / (1 - beta1**n) / denominator if n > 0 else q.double()
        if not close(q, wanted):
            return False
    return True


def cayley():
    return LF.cayley, {"free_a": tensor(4, 6), "free_b": tensor(5, 4)}


def cayley_of_lists():
    return LF.cayley, {"free_a": [tensor(4, 6), tensor(2, 3)], "free_b": [tensor(5, 4), tensor(7, 2)]}


def cayley_judge(kwargs, result):
    a, b = result
    if isinstance(a, list):
        return len(a) > 0 and all(
            cayley_judge(_entry(kwargs, i), pair) for i, pair in enumerate(zip(a, b, strict=True))
        )
    if not a.is_meta and not all(x.isfinite().all() for x in kwargs.values()):
        return bool(a.isnan().all() and b.isnan().all())
    identity = torch.eye(len(a), dtype=torch.float64)
    return a.is_meta or close(wide(a @ a.mT) + wide(b.mT @ b), identity)


# ── layers, configs, methods ─────────────────────────────────────────────────────────────────────────────────────────

RANK = integer(1, 256)
PROBABILITY = number(0, 1)
NAMES = kind(str, list, tuple, set, frozenset)
SIZES = {
    "in_features": integer(1, 2**40),
    "out_features": integer(1, 2**40),
    "r": RANK,
    "dropout": PROBABILITY,
    "bias": flag,
}
PLACE = {"device": kind(str, torch.device, int, type(None)), "dtype": lambda value: value in (None, *FLOATS)}
LORA = {"alpha": number(), "use_rslora": flag, "init": one_of("kaiming", "gaussian")}
BOUNDED = {"norm": one_of("spectral", "frobenius", "nuclear"), "bound": number(0, or_none=True), "learn_scale": flag}
SINGLE = {"alpha": number(), "ramp_steps": integer(0)}


def layer(cls, **settings):
    sizes = {"in_features": 6, "out_features": 5, "r": 4, "dropout": 0.0, "bias": True, "device": "cpu", "dtype": None}
    return lambda: (cls, sizes | settings)


def from_linear(cls, **settings):
    return lambda: (cls.from_linear, {"linear": nn.Linear(6, 5), "r": 4, "dropout": 0.0} | settings)


def forward(config):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5))
        lf.inject_(model, config, progress=False)
        return model, {"input": tensor(3, 6)}

    return build


def forward_judge(config):
    def judge(kwargs, y):
        model = forward(config)()[0][0]
        a, b = (wide(getattr(model, name).detach()) for name in ("lora_A", "lora_B"))
        x = wide(kwargs["input"])
        wanted = F.linear(x, wide(model.weight), wide(model.bias)) + float(model.scaling) * (x @ a.T @ b.T)
        return close(y, wanted)

    return judge


CONFIGS = {
    lf.LoRAConfig: ({"r": 4, "alpha": 8, "dropout": 0.0, "use_rslora": False, "init": "kaiming"}, LORA),
    lf.NBLoRAConfig: (
        {"r": 4, "norm": "nuclear", "bound": 1.0, "bound_ratio": None, "learn_scale": True, "dropout": 0.0},
        BOUNDED | {"bound_ratio": number(0, or_none=True)},
    ),
    lf.SingLoRAConfig: ({"r": 4, "alpha": 8, "ramp_steps": 10, "dropout": 0.0}, SINGLE),
}
METHODS = {
    lf.methods.BaLoRA: {
        "every": integer(1),
        "gauge": one_of("symmetric", "svd", "svd_signed"),
        "transport": one_of("none", "m", "mv"),
    },
    lf.methods.ILoRA: {
        "lam": number(0),
        "rho": number(0, or_none=True),
        "rho_scale": number(0),
        "rho_exponent": number(),
    },
    lf.methods.LoRAMuon: {"beta": number(0, 1), "damping": number(0)},
    lf.methods.LoRAPlus: {"ratio": number(0)},
    lf.methods.LoRARITE: {"eps": number(0), "clip": number(0)},
    lf.methods.PiLoRA: {"lam": number(0), "damping": number(0)},
    lf.methods.ScaLoRA: {
        "kappa": number(0, or_none=True),
        "interval": integer(1),
        "solver": one_of("nnls", "paper", "column", "scalar"),
        "rounding": one_of("nearest", "stochastic", "compensated"),
        "limit": number(1, or_none=True),
        "seed": integer(0),
        "keep": one_of("weights", "terms"),
    },
    lf.methods.ScaleReg: {"lam": number(0), "eps": number(0), "decoupled": flag},
    lf.methods.ScaledAdamW: {"damping": number(0)},
}


def method(cls):
    defaults = {name: f.default for name, f in cls.__dataclass_fields__.items()}
    return lambda: (cls, dict(defaults))


def config(cls):
    return lambda: (cls, CONFIGS[cls][0] | {"target_modules": ["0"]})


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def injected():
    model = net()
    lf.inject_(model, lf.LoRAConfig(r=2), progress=False)
    return model


def with_peft():
    return peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["0", "2"]))


def fused():
    model = with_peft()
    lf.fuse_(model)
    return model


def merged():
    model = injected()
    lf.merge_(model)
    return model


MODULE = kind(nn.Module)


def disabled(model: object) -> object:
    with lf.disable_adapters(model) as report:
        return report


def optimizer():
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "methods": [lf.methods.ILoRA()]}
    return lf.optim.LoRAAdamW, {
        "model": injected(),
        **settings,
        "rounding": "auto",
        "state_dtype": None,
        "groups": None,
    }


def add_group():
    a, b = nn.Parameter(tensor(2, 6)), nn.Parameter(tensor(5, 2))
    made = lf.optim.LoRAAdamW(injected())
    return lambda params, **settings: made.add_param_group({"params": params, **settings}), {
        "params": [(a, b, 1.0)],
        "lr": 0.1,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "maximize": False,
    }


def load_state():
    model = injected()
    made = lf.optim.LoRAAdamW(model)
    model(tensor(3, 6)).sum().backward()
    made.step()
    saved = made.state_dict()
    return lambda state, param_groups, whole: made.load_state_dict(
        {"state": state, "param_groups": param_groups} if whole is None else whole
    ), {"state": saved["state"], "param_groups": saved["param_groups"], "whole": None}


def group_setting():
    """A step after a setting of a group was replaced by hand. As in torch, its range is not checked."""

    def call(**settings):
        model = injected()
        made = lf.optim.LoRAAdamW(model)
        made.param_groups[0].update(settings)
        model(tensor(3, 6)).sum().backward()
        made.step()

    return call, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}


def betas(value):
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(number(0, 1)(beta) for beta in value)


SETTINGS = {"lr": number(0), "betas": betas, "eps": number(0), "weight_decay": number(0)}


def saving(folder):
    return lambda: (lf.save_adapter, {"model": injected(), "path": str(folder / "saved"), "exact": False})


def loading(folder):
    def build():
        if not (folder / "there").exists():
            lf.save_adapter(injected(), folder / "there")
        return lf.load_adapter, {"model": injected(), "path": str(folder / "there"), "any_quantization": False}

    return build


PATH = lambda value: isinstance(value, (str, os.PathLike))


def stats():
    return lf.metrics.adapter_stats(injected())


def trainer_arguments():
    names = ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
    args = SimpleNamespace(**dict(zip(names, (0.1, 0.9, 0.99, 1e-8, 0.0), strict=True)))
    kwargs = {"model": injected(), "args": args, "methods": [], "rounding": "auto", "state_dtype": None}
    return lf.hf.optimizer_cls_and_kwargs, kwargs


def backend_by_name(backend):
    def call(name):
        with lf.set_backend(name):
            pass

    return lambda: (call, {"name": backend})


METHOD_LIST = lambda value: isinstance(value, (list, tuple)) and all(type(x) in METHODS for x in value)


def rows(folder: Path, backend: str) -> list[Row]:
    """Returns the rows of all public functions. ``folder`` is for their files."""
    functions = [
        Row("lora_linear", linear, {}, linear_judge),
        Row("lora_linear_group", linear_group, {}, linear_group_judge),
        Row("lora_grouped_linear", grouped_linear, {}, grouped_linear_judge, OFFSETS_NEVER),
        Row("lora_linear_batched", linear_batched, {}, linear_batched_judge, INDICES_NEVER),
        Row("dora_linear", dora, {}, dora_judge),
        Row("gram", gram, {}, gram_judge),
        Row("spd_solve", solve, {}, solve_judge),
        Row("small_inverse", inverse, {}, inverse_judge),
        Row("scalora_scaling", scaling, {}, scaling_judge),
        Row("scalora_scaling of lists", scaling_of_lists, {}, scaling_judge),
        Row("hyperbalance", balance, {}, balance_judge),
        Row("hyperbalance of lists", balance_of_lists, {}, balance_judge),
        Row("add_low_rank_", add, {}, add_judge),
        Row("adapter_step_", step, {}, step_judge),
        Row("cayley", cayley, {}, cayley_judge),
        Row("cayley of lists", cayley_of_lists, {}, cayley_judge),
        Row("LoRALinear", layer(lf.LoRALinear, alpha=8, use_rslora=False, init="kaiming"), SIZES | PLACE | LORA),
        Row("DoRALinear", layer(lf.DoRALinear, alpha=8, use_rslora=False, init="kaiming"), SIZES | PLACE | LORA),
        Row(
            "NBLoRALinear", layer(lf.NBLoRALinear, norm="nuclear", bound=1.0, learn_scale=True), SIZES | PLACE | BOUNDED
        ),
        Row("SingLoRALinear", layer(lf.SingLoRALinear, alpha=8, ramp_steps=0), SIZES | PLACE | SINGLE),
    ]
    linears = kind(nn.Linear)
    functions += [
        Row(f"{cls.__name__}.from_linear", from_linear(cls, **settings), SIZES | legit | {"linear": linears})
        for cls, settings, legit in (
            (lf.LoRALinear, {"alpha": 8}, LORA),
            (lf.DoRALinear, {"alpha": 8}, LORA),
            (
                lf.NBLoRALinear,
                {"norm": "spectral", "bound": None, "bound_ratio": 0.1},
                BOUNDED | {"bound_ratio": number(0, or_none=True)},
            ),
            (lf.SingLoRALinear, {"alpha": 8, "ramp_steps": 0}, SINGLE),
        )
    ]
    for cls in CONFIGS:
        functions.append(Row(cls.__name__, config(cls), SIZES | CONFIGS[cls][1] | {"target_modules": NAMES}))
        ramp = {"ramp_steps": 0} if cls is lf.SingLoRAConfig else {}
        setting = cls(r=4, **ramp)
        functions.append(Row(f"forward of {cls.__name__}", forward(setting), {}, forward_judge(setting)))
    functions += [Row(cls.__name__, method(cls), legit) for cls, legit in METHODS.items()]
    configs = kind(*CONFIGS, peft.LoraConfig)
    methods = {"methods": METHOD_LIST, "rounding": one_of("auto", "nearest", "stochastic")}
    dtypes = {"state_dtype": lambda value: value in (None, torch.float32)}
    functions += [
        Row(
            "inject_",
            lambda: (
                lf.inject_,
                {"model": net(), "config": lf.LoRAConfig(r=2), "allow_empty": False, "progress": False},
            ),
            {"model": MODULE, "config": configs},
        ),
        Row(
            "fuse_",
            lambda: (
                lf.fuse_,
                {"peft_model": with_peft(), "filter_fn": None, "strict": False, "allow_empty": False, "group": True},
            ),
            {"peft_model": MODULE, "filter_fn": lambda value: value is None or callable(value)},
            skip=frozenset({("filter_fn", "class"), ("filter_fn", "module")}),
        ),
        Row("unfuse_", lambda: (lf.unfuse_, {"peft_model": fused(), "allow_empty": False}), {"peft_model": MODULE}),
        Row(
            "merge_",
            lambda: (lf.merge_, {"model": injected(), "keep_originals": "host", "allow_empty": False}),
            {"model": MODULE, "keep_originals": one_of("host", "device")},
        ),
        Row("unload_", lambda: (lf.unload_, {"model": injected(), "merge": True}), {"model": MODULE, "merge": flag}),
        Row(
            "dequantize_",
            lambda: (lf.dequantize_, {"model": net(), "dtype": None, "allow_empty": True}),
            {"model": MODULE, "dtype": PLACE["dtype"], "allow_empty": flag},
        ),
        Row("disable_adapters", lambda: (disabled, {"model": injected()}), {"model": MODULE}),
        Row("groups", lambda: (lf.groups, {"model": fused()}), {"model": MODULE}),
        Row("unmerge_", lambda: (lf.unmerge_, {"model": merged(), "allow_empty": False}), {"model": MODULE}),
        Row(
            "count_steps_",
            lambda: (lf.count_steps_, {"model": net(), "optimizer": torch.optim.SGD(net().parameters())}),
            {"model": MODULE, "optimizer": kind(torch.optim.Optimizer)},
        ),
        Row("set_backend", backend_by_name(backend), {"name": one_of("auto", "torch", "triton")}),
        Row("save_adapter", saving(folder), {"model": MODULE, "path": PATH}),
        Row("load_adapter", loading(folder), {"model": MODULE, "path": PATH}),
        Row(
            "LoRAAdamW",
            optimizer,
            SETTINGS | methods | dtypes | {"model": MODULE, "groups": lambda value: value is None},
        ),
        Row(
            "add_param_group",
            add_group,
            SETTINGS | {"params": kind(Tensor, list, tuple, Generator), "maximize": lambda value: not value},
        ),
        Row(
            "load_state_dict",
            load_state,
            {
                "state": lambda value: value == {},
                "param_groups": kind(list),
                "whole": lambda value: value is None,
            },
        ),
        Row(
            "step",
            group_setting,
            {name: lambda value: isinstance(plain(value), numbers.Real) for name in ("lr", "eps", "weight_decay")}
            | {"betas": kind(tuple, list), "amsgrad": lambda value: not value},
        ),
        Row("adapter_stats", lambda: (lf.metrics.adapter_stats, {"model": injected()}), {"model": MODULE}),
        Row(
            "bound_stats",
            lambda: (lf.metrics.bound_stats, {"model": injected(), "stats": stats()}),
            {"model": MODULE, "stats": lambda value: value in (None, {})},
        ),
        Row("not_finite", lambda: (lf.metrics.not_finite, {"stats": stats()}), {"stats": lambda value: value == {}}),
        Row(
            "optimizer_cls_and_kwargs",
            trainer_arguments,
            methods
            | dtypes
            | {"model": lambda value: value is None or MODULE(value), "args": lambda value: value is None},
        ),
        Row(
            "AdapterStatsCallback",
            lambda: (lf.hf.AdapterStatsCallback, {"trainer": None, "every": 10}),
            {"every": integer(1)},
        ),
        Row(
            "summary",
            lambda: (lf.hf.summary, {"stats": stats(), "bounds": {}}),
            {"stats": lambda value: value == {}, "bounds": lambda value: value in (None, {})},
        ),
    ]
    return functions
