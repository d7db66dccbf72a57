"""Steps over 16-bit factors against the float64 transcription of the methods, with every rounding spelled out.

One step at a time: factors, moments and gradients as the optimizer has them are copied into float64, the transcription
does the step, and every stored number is the exact result rounded. Where float32's error of the formulas decides
between two neighbours, either is right; such entries are few. The factors that AdamW leaves to a method's correction
are read as the correction begins, so each of the two roundings is held by itself.
"""

import method_runs
import pytest
import roundings
import torch
import transcription as T
from method_runs import METHODS

import lora_fast as lf
from lora_fast import methods as M
from lora_fast.batches.stacked import StackedBatch

SHAPES = [(24, 40, 4), (24, 40, 4), (17, 33, 3), (9, 50, 1)]
CHECKED = 1, 2, 3, 5, 6, 11  # of the steps; ScaLoRA's intervals are 1, 4, 5 and 10
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}
EPS = torch.finfo(torch.float32).eps
# The largest share of entries that float32's error leaves open. float16's units are an eighth of bfloat16's. Of first
# moments, averages of two 16-bit numbers with the weights 0.9 and 0.1, one in 50 is an exact tie.
OPEN = {torch.bfloat16: 0.02, torch.float16: 0.06}
UNITS = 16  # float32's error of a change, in units in the last place: r × r algebra, then a square
FOLLOWERS = M.ILoRA, M.ScaleReg, M.BaLoRA
CASES = [
    (torch.bfloat16, "nearest", None),
    (torch.bfloat16, "stochastic", torch.float32),
    (torch.float16, "nearest", torch.float32),
    (torch.float16, "stochastic", None),
]


class Exact(T.Run):
    """The transcription, which takes ScaLoRA's scales as the optimizer chose them, after comparing them with its own,
    and rounds the scaled factors to nearest."""

    chosen = None  # [α; β] of each layer
    final = None  # the optimizer's stored tensors after the step
    kept = None  # the factors' dtype

    def scales(self, method, grads):
        exact = super().scales(method, grads)
        for got, want in zip(self.chosen, exact, strict=True):
            torch.testing.assert_close(got.double(), want.double(), rtol=2e-3, atol=0)
        return [scale.to(layer.a.dtype) for scale, layer in zip(self.chosen, self.layers, strict=True)]

    def stored(self, x):
        # The product in float32, as the step computes it, then rounded to 16 bits.
        return roundings.to_nearest(x.float().double(), self.kept).to(x.dtype)

    def momentum(self, layer):
        # LoRA-Muon's move reads the momentum as it is stored.
        stored = next(s for x, s in zip(self.layers, self.final, strict=True) if x is layer)
        return {name: stored[name]["exp_avg"].to(layer.a.dtype) for name in "ab"}


class Watched:
    """A step of the optimizer over layers, and what it had in between.

    Attributes:
        updated: a's and b's values and moments as a correction began, by the parameter.
        scales: ScaLoRA's [α; β], by the parameter a.
    """

    def __init__(self, work, monkeypatch):
        self.work, self.updated, self.scales = work, {}, {}
        for kind in FOLLOWERS:
            monkeypatch.setattr(kind, "after", self._recording(kind.after))
        batches = [StackedBatch]
        if lf.backend.chosen() == "triton":
            from lora_fast.batches.grouped import GroupedBatch

            batches.append(GroupedBatch)
        for kind in batches:
            monkeypatch.setattr(kind, "scale", self._recording_scales(kind.scale))

    def _recording(self, after):
        def record(method, batch):
            for i, pair in enumerate(batch.pairs):
                for p, name in ((pair.a, "a"), (pair.b, "b")):
                    self.updated[p] = self._stored(p)
                    if isinstance(batch, StackedBatch):  # which writes to the parameters as the step ends
                        self.updated[p]["value"] = getattr(batch, name).value[i].clone()
            after(method, batch)

        return record

    def _recording_scales(self, scale):
        def record(batch, factor_scales, gradient_scales):
            alpha, beta = factor_scales.chunk(2)
            for pair, *row in zip(batch.pairs, alpha, beta, strict=True):
                self.scales[pair.a] = torch.cat(row)
            scale(batch, factor_scales, gradient_scales)

        return record

    def _stored(self, p):
        moments = {k: v.detach().clone() for k, v in self.work.optimizer.state.get(p, {}).items() if k != "step"}
        return {"value": p.detach().clone(), **moments}

    def state(self):
        """Returns the stored tensors of each a and b."""
        return [{name: self._stored(getattr(layer, name)) for name in "ab"} for layer in self.work.layers]

    def layers(self, states, dtype):
        """Returns layers of the transcription with these values and moments."""
        copies = []
        for layer, stored in zip(self.work.layers, states, strict=True):
            copied = T.Layer(
                stored["a"]["value"].to(dtype), stored["b"]["value"].to(dtype), layer.s, layer.w.to(dtype, copy=True)
            )
            for name, tensors in stored.items():
                zero = torch.zeros_like(tensors["value"])
                copied.m[name] = tensors.get("exp_avg", zero).to(dtype)
                copied.v[name] = tensors.get("exp_avg_sq", zero).to(dtype)
                if "basis" in tensors:
                    copied.basis |= {
                        name: tensors["basis"].to(dtype),
                        name + "V": tensors["second_moment"].to(dtype),
                    }
            copies.append(copied)
        return copies


def run_of(methods, step, layers, watched, kept):
    """Returns a transcription over these layers that has taken the steps before this one."""
    run = Exact(layers, methods, **SETTINGS)
    run.t, run.kept, run.final = step - 1, kept, watched.state()
    run.chosen = [watched.scales.get(layer.a) for layer in watched.work.layers]
    return run


def float32_error(got, exact, old):
    """Returns a bound of float32's error of each entry: that of adding a change with an error of a few units to the old
    value, and eight times the largest error of the formulas in float32 beyond that, since another order of the sums has
    another error."""
    old = old.double()
    sums = EPS * (2 * old.abs() + 2 * exact.abs() + UNITS * (exact - old).abs())
    return sums + 8 * ((got.double() - exact).abs() - sums).clamp(min=0).max()


def check_float32(got, exact, in_float32):
    """Checks a tensor that is stored in float32: its L2 error against eight times that of the formulas in float32."""
    ours, formulas = ((x.double() - exact).norm() / exact.norm().clamp(min=1e-30) for x in (got, in_float32))
    assert ours <= 8 * formulas + method_runs.ULPS * EPS, f"{ours:.2e}, the formulas {formulas:.2e}"


class Comparison:
    """Compares the stored tensors of all layers with transcriptions in float64 and float32."""

    def __init__(self, rounding, step):
        self.rounding, self.step = rounding, step
        self.open, self.total = 0, 0

    def check(self, states, old, exact, in_float32, word3, is_flat=False):
        for i, stored in enumerate(states):
            for name in "ab":
                p, suffix = stored[name]["value"], "lora_A" if name == "a" else "lora_B"
                numbers = None
                if self.rounding == "stochastic":
                    key = f"model[{i}].{suffix}"
                    numbers = roundings.factor_noise(key, p.shape, self.step, word3, is_flat)
                self._entries(p, getattr(exact[i], name), getattr(in_float32[i], name), old[i][name]["value"], numbers)
                for moments, key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                    if key in stored[name]:
                        right, single = (getattr(layers[i], moments)[name] for layers in (exact, in_float32))
                        self._entries(stored[name][key], right, single, old[i][name].get(key, torch.zeros_like(p)))

    def _entries(self, got, exact, in_float32, old, numbers=None):
        if got.dtype == torch.float32:
            check_float32(got, exact, in_float32)
            return
        error = float32_error(in_float32, exact, old)
        undecided, total = roundings.check_rounded(got, exact, error, numbers)
        self.open, self.total = self.open + undecided, self.total + total


def check_steps(name, dtype, rounding, state_dtype, zero_b, monkeypatch, shapes=SHAPES, checked=CHECKED):
    """Trains layers, and compares every stored number after each of the checked steps."""
    methods = METHODS[name]
    layers = method_runs.layers(dtype, shapes=shapes, zero_b=zero_b)
    for layer in layers:
        layer.w = layer.w.float()
    work = method_runs.Ours(layers, methods, rounding=rounding, state_dtype=state_dtype, **SETTINGS)
    watched, stream = Watched(work, monkeypatch), method_runs.gradient_stream(shapes)
    undecided = total = 0
    for step in range(1, max(checked) + 1):
        old = watched.state()
        sources = [watched.layers(old, kind) for kind in (torch.float64, torch.float32)]
        watched.updated.clear(), watched.scales.clear()
        work.step(next(stream))
        if step not in checked:
            continue
        kappa = work.optimizer.param_groups[0].get("method_state", {}).get("kappa")
        runs = [run_of(methods, step, copies, watched, dtype) for copies in sources]
        for run in runs:
            run.kappa = None if kappa is None or step == 1 else kappa.item()
            run.update(
                [(x.a.grad.to(y.a.dtype), x.b.grad.to(y.b.dtype)) for x, y in zip(layers, run.layers, strict=True)]
            )
        final, updated = watched.state(), [{n: watched.updated.get(getattr(x, n)) for n in "ab"} for x in layers]
        exact, flat = [run.layers for run in runs], is_flat(methods, watched)
        comparison = Comparison(rounding, step)
        if updated[0]["a"] is None:
            comparison.check(final, old, *exact, roundings.UPDATE, flat)
        else:
            comparison.check(updated, old, *exact, roundings.UPDATE, flat)
            corrections = [
                run_of(methods, step + 1, watched.layers(updated, kind), watched, dtype)
                for kind in (torch.float64, torch.float32)
            ]
            for run in corrections:
                run.after()
            # BaLoRA multiplies the factors, which is rounded to nearest.
            multiplies = any(type(method) is M.BaLoRA for method in methods)
            corrected = Comparison("nearest", step) if multiplies else comparison
            corrected.check(final, updated, *(run.layers for run in corrections), roundings.CORRECTION)
            if corrected is not comparison:
                undecided, total = undecided + corrected.open, total + corrected.total
        for layer, right, single in zip(layers, *exact, strict=True):
            check_float32(layer.w, right.w, single.w)
        undecided, total = undecided + comparison.open, total + comparison.total
    assert undecided <= OPEN[dtype] * total


def is_flat(methods, watched):
    """Returns whether AdamW numbers a factor as one row: nothing has changed the gradients, and no Grams follow."""
    kinds = {type(method) for method in methods}
    changes = kinds & {M.ScaledAdamW, M.PiLoRA, M.RefLoRA, M.LoRARITE, M.LoRAMuon, M.ScaleReg, M.ILoRA, M.BaLoRA}
    return not changes and not watched.scales


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
@pytest.mark.parametrize("name", METHODS)
def test_16_bit_step_is_the_float64_transcription_rounded(name, case, monkeypatch):
    dtype, rounding, state_dtype = CASES[case]
    zero_b = (case + list(METHODS).index(name)) % 2 == 0
    check_steps(name, dtype, rounding, state_dtype, zero_b, monkeypatch)


ON_TRITON = {  # one kernel each: a step by rows of numbers, by rows of a factor with matrices, Grams or scales, a move
    "lora+": 1,
    "ilora": 3,
    "pilora": 1,
    "scalora kappa": 3,
    "lora-muon": 0,
    "balora mv, lora+": 3,
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_TRITON)
def test_16_bit_step_of_the_kernels_is_the_float64_transcription_rounded(name, monkeypatch):
    dtype, rounding, state_dtype = CASES[ON_TRITON[name]]
    shapes = [(9, 14, 3), (12, 8, 3), (5, 18, 1)]
    with lf.set_backend("triton"):
        zero_b = list(ON_TRITON).index(name) % 2 == 0
        check_steps(name, dtype, rounding, state_dtype, zero_b, monkeypatch, shapes, checked=(1, 2))


@pytest.mark.parametrize("lam", [0.1, 10.0])
def test_pull_of_ilora_survives_in_bfloat16(lam):
    """What iLoRA takes from the imbalance in 100 steps from b = 0, against the same run at λ = 0, is what it takes in
    float64. Rounded to nearest, less than 1 % of it survived."""

    def imbalance(work):
        pairs = [(x.a.detach().double(), x.b.detach().double()) for x in work.layers]
        return sum((a @ a.T - len(a) / len(b) * b.T @ b).norm().item() for a, b in pairs)

    def pull(kind, dtype):
        methods = [M.ILoRA(lam=0.0)], [M.ILoRA(lam=lam)]
        without, with_pull = (
            method_runs.run(kind, dtype, method, steps=100, zero_b=True, lr=1e-4, weight_decay=0.0)
            for method in methods
        )
        return imbalance(without) - imbalance(with_pull)

    assert pull(method_runs.Ours, torch.bfloat16) == pytest.approx(pull(T.Run, torch.float64), rel=0.05)
