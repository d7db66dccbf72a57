"""The process's defaults are the user's: everything gives the same bits whatever they are."""

import ast
import dataclasses
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_fast as lf
from lora_fast import methods as M

ROOT = Path(__file__).resolve().parents[1]
DTYPE = torch.float32
PLACE = {"device": torch.device("cpu"), "dtype": DTYPE}
METHODS = {
    "plain": [],
    "scale-reg lora+": [M.ScaleReg(lam=0.05), M.LoRAPlus(4.0)],
    "pilora": [M.PiLoRA()],
    "ilora": [M.ILoRA()],
    "scaled adamw": [M.ScaledAdamW()],
    "balora": [M.BaLoRA()],
    "balora signed": [M.BaLoRA(gauge="svd_signed")],
    "scalora": [M.ScaLoRA(interval=1, rounding="stochastic")],
    "scalora terms": [M.ScaLoRA(interval=1, kappa=0.7, rounding="compensated")],
    "lora-rite": [M.LoRARITE()],
    "lora-muon": [M.LoRAMuon()],
    "ref-lora": [M.RefLoRA()],
}


@contextmanager
def default_device():
    """ "meta" stands for "cuda": the host has no values of it either."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic():
    """Also fills everything that torch.empty returns with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


DEFAULTS = {
    "device": default_device,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
    "anomaly mode": torch.autograd.detect_anomaly,
}


def random(seed: int, *shape: int, dtype=DTYPE) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, **PLACE).to(dtype)


def model_of(config) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(12, 16, **PLACE), nn.Linear(16, 12, **PLACE))
    for i, p in enumerate(model.parameters()):
        p.data = random(i, *p.shape) / 4
    torch.manual_seed(0)
    lf.inject_(model, config)
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.data += random(10 + i, *p.shape) / 4
    return model


def trained(layer_config, methods, steps=2) -> list[torch.Tensor]:
    model = model_of(layer_config)
    optimizer = lf.optim.LoRAAdamW(model, lr=1e-2, weight_decay=0.1, methods=methods)
    for i in range(steps):
        x = random(i, 5, 12)
        (model(x) if i else checkpoint(model, x, use_reentrant=False)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = [v for s in optimizer.state_dict()["state"].values() for v in s.values() if isinstance(v, torch.Tensor)]
    return [*model.state_dict().values(), *state]


def stored(folder: Path) -> list[torch.Tensor]:
    """Merges, unmerges, saves, loads and measures an adapter."""
    config = lf.NBLoRAConfig(r=3, bound=2.0)
    model, other = model_of(config), model_of(config)
    with torch.no_grad():
        for p in (p for p in other.parameters() if p.requires_grad):
            p.zero_()
    lf.save_adapter(model, folder)
    lf.load_adapter(other, folder)
    before, x = model[0].weight.clone(), random(3, 5, 12)
    with torch.no_grad():
        unmerged, stats = model(x), lf.metrics.adapter_stats(model)
        lf.metrics.bound_stats(model)
        lf.merge_(model)
        merged = model(x)
        lf.unmerge_(model)
    torch.manual_seed(1)
    weight = random(5, 8, 6, dtype=torch.bfloat16)
    lf.functional.add_low_rank_(weight, random(6, 2, 6), random(7, 8, 2), 0.5, rounding="stochastic")
    assert torch.equal(model[0].weight, before)
    rows = [torch.tensor(dataclasses.astuple(row), dtype=torch.float64, device="cpu") for row in stats.values()]
    return [*other.state_dict().values(), unmerged, merged, weight, *rows]


def same(these: list[torch.Tensor], those: list[torch.Tensor]) -> bool:
    pairs = list(zip(these, those, strict=True))
    return all(
        x.dtype == y.dtype and x.device == y.device and torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in pairs
    )


CONFIGS = {
    "LoRA": lambda: lf.LoRAConfig(r=3, alpha=6, dropout=0.3),
    "NB-LoRA": lambda: lf.NBLoRAConfig(r=3, bound=2.0, dropout=0.3),
    "SingLoRA": lambda: lf.SingLoRAConfig(r=3, alpha=6, ramp_steps=0, dropout=0.3),
}


WITH_WARM_UP = CONFIGS | {"SingLoRA warm-up": lambda: lf.SingLoRAConfig(r=3, alpha=6, ramp_steps=3, dropout=0.3)}


@pytest.mark.parametrize("config", WITH_WARM_UP.values(), ids=WITH_WARM_UP)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_layers_train_to_the_same_bits(backend, config):
    with lf.set_backend(backend):
        expected = trained(config(), [])
        for default in DEFAULTS.values():
            with default():
                assert same(trained(config(), []), expected)


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
def test_every_method_steps_to_the_same_bits(methods):
    with lf.set_backend("torch"):
        expected = trained(CONFIGS["LoRA"](), methods)
        for default in DEFAULTS.values():
            with default():
                assert same(trained(CONFIGS["LoRA"](), methods), expected)


@pytest.mark.parametrize("name", ["pilora", "scalora", "lora-muon"])
def test_methods_on_the_kernels_step_to_the_same_bits(name):
    with lf.set_backend("triton"):
        expected = trained(CONFIGS["LoRA"](), METHODS[name])
        for default in DEFAULTS.values():
            with default():
                assert same(trained(CONFIGS["LoRA"](), METHODS[name]), expected)


@pytest.mark.parametrize("default", DEFAULTS.values(), ids=DEFAULTS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_merging_files_and_statistics_give_the_same_bits(backend, default, tmp_path):
    with lf.set_backend(backend):
        expected = stored(tmp_path / "expected")
        with default():
            assert same(stored(tmp_path / "got"), expected)


# ── inference mode ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_evaluation_in_inference_mode_changes_no_training(backend, config):
    def trained(evaluate: bool) -> list[torch.Tensor]:
        model, x = model_of(config()), random(3, 5, 12)
        with torch.inference_mode(evaluate):
            optimizer = lf.optim.LoRAAdamW(model, lr=1e-2)
        for _ in range(2):
            with torch.inference_mode(evaluate):
                model.eval()(x), lf.metrics.adapter_stats(model), lf.merge_(model), lf.unmerge_(model)
            model.train()(x).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(model.state_dict().values())

    with lf.set_backend(backend):
        assert same(trained(True), trained(False))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layers_made_in_inference_mode_cannot_be_trained_as_nn_linear_cannot(config):
    linear, x = lambda model: nn.Sequential(*(nn.Linear(12, 12, **PLACE) for _ in range(2))), random(3, 5, 12)
    for make in (linear, model_of):
        with torch.inference_mode():
            model = make(config())
            y = model(x)
        with torch.no_grad():
            assert torch.equal(model.eval()(x), y) or make is model_of  # dropout
        with pytest.raises(RuntimeError, match="nference tensors"):
            model.train()(x.clone().requires_grad_())


def test_optimizer_state_made_in_inference_mode_is_torchs_error():
    for make in (lambda p: torch.optim.AdamW([p]), lambda p: lf.optim.LoRAAdamW([(p, random(1, 4, 2))])):
        p = nn.Parameter(random(0, 2, 4))
        p.grad = random(2, 2, 4)
        optimizer = make(p)
        with torch.inference_mode():
            optimizer.step()
        with pytest.raises(RuntimeError, match="inference tensor"):
            optimizer.step()


# ── the rule ─────────────────────────────────────────────────────────────────────────────────────────────────────────

FACTORIES = {"arange", "as_tensor", "asarray", "bartlett_window", "empty", "empty_permuted", "empty_strided", "eye"}
FACTORIES |= {"frombuffer", "full", "linspace", "logspace", "normal", "ones", "rand", "randint", "randn", "randperm"}
FACTORIES |= {"range", "scalar_tensor", "sparse_coo_tensor", "tensor", "tril_indices", "triu_indices", "zeros"}
LEGACY = {"Tensor", "FloatTensor", "DoubleTensor", "LongTensor", "IntTensor", "BoolTensor"}
EXCEPTIONS = (  # these run in a process of their own, which ``lora-fast`` starts
    "lora_fast/kernels/inspection/catalogue.py",
    "lora_fast/cli/reproduce/experiments/",
)
SOURCES = sorted((ROOT / "lora_fast").rglob("*.py"))


def unnamed(tree: ast.Module) -> list[tuple[int, str]]:
    """Returns line and name of each call that takes a dtype or a device from the process's defaults."""
    calls = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called, keywords = node.func, {keyword.arg for keyword in node.keywords}
        if not isinstance(called.value, ast.Name) or called.value.id != "torch":
            continue
        named = {"dtype", "device"} <= keywords or None in keywords  # None: **keywords
        numbers = called.attr == "where" and all(map(is_number, node.args[1:]))  # the result has the default dtype
        generator = called.attr == "Generator" and not node.args and "device" not in keywords
        if (called.attr in FACTORIES and not named) or numbers or generator or called.attr in LEGACY:
            calls.append((node.lineno, called.attr))
    return calls


def is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) or (isinstance(node, ast.UnaryOp) and is_number(node.operand))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_factory_calls_name_dtype_and_device(path):
    name = path.relative_to(ROOT).as_posix()
    if not name.startswith(EXCEPTIONS):
        assert unnamed(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code, is_allowed",
    [
        ("torch.empty(3)", False),
        ("torch.zeros((), dtype=d)", False),
        ("torch.tensor(x, dtype=d, device=e)", True),
        ("torch.full((), 1.0, **place)", True),
        ("torch.where(c, -1.0, 1.0)", False),
        ("torch.where(c, x, 1.0)", True),
        ("torch.Generator()", False),
        ("torch.Generator(e)", True),
        ("torch.empty_like(x)", True),
        ("torch.FloatTensor(3)", False),
    ],
)
def test_rule_finds_what_depends_on_the_defaults(code, is_allowed):
    assert (unnamed(ast.parse(code)) == []) == is_allowed
