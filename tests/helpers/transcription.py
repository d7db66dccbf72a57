"""The methods' formulas, transcribed layer by layer without regard to speed. Tests of the adapter step compare with
them in float64 (the exact result) and in float32 (the error of the formulas themselves)."""

import math
from dataclasses import dataclass, field

import torch

from lora_fast import methods as M


@dataclass
class Layer:
    a: torch.Tensor
    b: torch.Tensor
    s: float
    w: torch.Tensor
    m: dict = field(default_factory=dict)
    v: dict = field(default_factory=dict)
    basis: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in "ab":
            p = getattr(self, name)
            self.m[name], self.v[name] = torch.zeros_like(p), torch.zeros_like(p)

    @property
    def effective(self):
        return self.w + self.s * self.b @ self.a


def gradients(layer, g):
    """Returns da = s bᵀG and db = s G aᵀ, computed in float64 and rounded to the layer's dtype."""
    a, b = layer.a.double(), layer.b.double()
    return (layer.s * b.T @ g).to(layer.a.dtype), (layer.s * g @ a.T).to(layer.b.dtype)


class Run:
    """Runs methods on a list of layers. ``step`` takes a (d_out, d_in) gradient of each effective weight."""

    def __init__(self, layers, methods, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.layers, self.lr, self.betas, self.eps, self.weight_decay = layers, lr, betas, eps, weight_decay
        self.by_kind = {type(method): method for method in methods}
        self.t, self.kappa = 0, None

    def get(self, *kinds):
        return next((self.by_kind[kind] for kind in kinds if kind in self.by_kind), None)

    @property
    def rates(self):
        plus = self.get(M.LoRAPlus)
        return {"a": self.lr, "b": self.lr * (plus.ratio if plus else 1.0)}

    def step(self, gs):
        self.update([gradients(layer, g) for layer, g in zip(self.layers, gs, strict=True)])
        self.after()

    def update(self, grads):
        """Runs AdamW, or the update that replaces it, and what comes before, with the gradients (da, db) of each
        layer."""
        self.t += 1
        lr, reg = self.rates, self.get(M.ScaleReg)
        if M.LoRARITE in self.by_kind:
            lora_rite(self, grads)
        if M.LoRAMuon in self.by_kind:
            for layer, grad in zip(self.layers, grads, strict=True):
                lora_muon(self, layer, *grad)
        if self.get(M.LoRARITE, M.LoRAMuon):
            return
        if reg and not reg.decoupled:
            grads = [
                (da + ca, db + cb)
                for (da, db), (ca, cb) in zip(grads, (scale_reg(x, reg) for x in self.layers), strict=True)
            ]
        scalora = self.get(M.ScaLoRA)
        if scalora and (self.t - 1) % scalora.interval == 0:
            grads = scale(self, self.scales(scalora, grads), grads)
        for layer, (da, db) in zip(self.layers, grads, strict=True):
            scaled = self.get(M.ScaledAdamW, M.PiLoRA)
            if scaled:
                eye = scaled.damping * torch.eye(len(layer.a), dtype=layer.a.dtype)
                da, db = (
                    torch.linalg.inv(layer.b.T @ layer.b + eye) @ da,
                    db @ torch.linalg.inv(layer.a @ layer.a.T + eye),
                )
            if M.RefLoRA in self.by_kind:
                s = refactoring(layer)
                da, db = s @ da, db @ torch.linalg.inv(s)
            adamw(self, layer, "a", da, lr["a"])
            adamw(self, layer, "b", db, lr["b"])

    def after(self):
        """Runs what changes the factors after the update."""
        reg, balora, lr = self.get(M.ScaleReg), self.get(M.BaLoRA), self.rates
        for layer in self.layers:
            if self.get(M.ILoRA, M.PiLoRA):
                imbalance(layer, self.get(M.ILoRA, M.PiLoRA), lr)
            if reg and reg.decoupled:
                ca, cb = scale_reg(layer, reg)
                layer.a, layer.b = layer.a - lr["a"] * ca, layer.b - lr["b"] * cb
            if balora and self.t % balora.every == 0:
                balance(layer, balora)

    def scales(self, method, grads):
        """Returns ScaLoRA's [α; β] of each layer."""
        solved = [scalora_x(layer, *grad, method.solver) for layer, grad in zip(self.layers, grads, strict=True)]
        if self.kappa is None:
            beta2 = torch.cat([x[len(x) // 2 :][active[len(x) // 2 :]] for x, active in solved])
            self.kappa = method.kappa or math.exp(beta2[beta2 > 0].log().mean().item())
        clamped = [((x / self.kappa).sqrt().clamp(1 / method.limit, method.limit), active) for x, active in solved]
        return [torch.where(active, scale, 1.0) for scale, active in clamped]

    def stored(self, x):
        """Returns what the dtype of the factors keeps of a scaled factor."""
        return x

    def momentum(self, layer):
        """Returns LoRA-Muon's momentum of both factors as its move reads it."""
        return layer.m


def adamw(run, layer, name, g, lr):
    beta1, beta2 = run.betas
    p = getattr(layer, name) * (1 - lr * run.weight_decay)
    layer.m[name] = beta1 * layer.m[name] + (1 - beta1) * g
    layer.v[name] = beta2 * layer.v[name] + (1 - beta2) * g * g
    root = layer.v[name].sqrt() / math.sqrt(1 - beta2**run.t) + run.eps
    setattr(layer, name, p - lr / (1 - beta1**run.t) * layer.m[name] / root)


def imbalance(layer, method, lr):
    a, b = layer.a, layer.b
    r, d_out = len(a), len(b)
    rho = r / d_out
    if isinstance(method, M.ILoRA):
        rho = method.rho if method.rho is not None else method.rho_scale * rho**method.rho_exponent
    ka, kb = a @ a.T, b.T @ b
    d = ka - rho * kb
    limit = 1 / ((1 + rho) * max(ka.abs().sum(1).max().item(), rho * kb.abs().sum(1).max().item()))
    layer.a = a - min(lr["a"] * method.lam, limit) * d @ a
    layer.b = b + min(lr["b"] * method.lam, limit) * rho * b @ d


def scale_reg(layer, method):
    a2, b2 = layer.a.square().sum(), layer.b.square().sum()
    tilt = torch.log(a2 / layer.a.numel()) - torch.log(b2 / layer.b.numel() + method.eps)
    scale = 4 * method.lam * tilt
    return scale * layer.a / a2, -scale * layer.b / (b2 + method.eps * layer.b.numel())


def balance(layer, method):
    a, b = layer.a, layer.b
    kb = b.T @ b
    if torch.trace(kb) == 0:
        return
    lower = torch.linalg.cholesky(a @ a.T)
    _, v = torch.linalg.eigh(lower.T @ kb @ lower)
    v = v.flip(1)
    sigma = (b @ lower @ v).norm(dim=0)
    sigma = sigma.clamp(min=1e-6 * sigma.max().item())
    t = lower @ v / sigma.sqrt()
    if method.gauge == "svd_signed":
        t = t * torch.where(t.gather(0, t.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    if method.gauge == "symmetric":
        values, q = torch.linalg.eigh(t @ t.T)
        t = q @ torch.diag(values.sqrt()) @ q.T
    t_inverse = torch.linalg.inv(t)
    layer.a, layer.b = t_inverse @ a, b @ t
    if method.transport in ("m", "mv"):
        layer.m = {"a": t.T @ layer.m["a"], "b": layer.m["b"] @ t_inverse.T}
    if method.transport == "mv":
        layer.v = {"a": (t.T**2) @ layer.v["a"], "b": layer.v["b"] @ (t_inverse.T**2)}


def system(layer, da, db):
    """Returns M, λ and which coordinates are active, for gradients divided by one power of two."""
    unit = 2.0 ** -round(math.log2(max(da.norm().item(), db.norm().item(), 1e-300)))
    p, q, a, b = unit * da, unit * db, layer.a, layer.b
    k2 = (p @ a.T).square()
    m = torch.cat([torch.cat([(b.T @ b) * (p @ p.T), k2], 1), torch.cat([k2.T, (q.T @ q) * (a @ a.T)], 1)])
    lam = torch.cat([p.square().sum(1), q.square().sum(0)])
    r = len(a)
    active = [m[i, i] > 1e-12 * m.diagonal()[i // r * r : i // r * r + r].max() for i in range(2 * r)]
    return m, lam, torch.tensor(active)


def nnls(m, lam):
    """Minimises ½xᵀMx − λᵀx over x ≥ 0 for a positive definite M, by Lawson and Hanson's active set."""
    n = len(lam)
    free, x = torch.zeros(n, dtype=torch.bool), torch.zeros_like(lam)
    tolerance = 100 * torch.finfo(lam.dtype).eps * lam.abs().max()
    for _ in range(10 * n):
        slope = lam - m @ x
        slope[free] = -math.inf
        if free.all() or slope.max() <= tolerance:
            break
        free[slope.argmax()] = True
        while True:
            z = torch.zeros_like(x)
            z[free] = torch.linalg.solve(m[free][:, free], lam[free])
            if (z[free] > 0).all():
                x = z
                break
            negative = free & (z <= 0)
            ratio = (x[negative] / (x[negative] - z[negative])).min()
            x = x + ratio * (z - x)
            free = free & (x > 1e-14 * x.max())
            x[~free] = 0
    return x


def scalora_x(layer, da, db, solver="nnls"):
    """Returns x for κ = 1, and which entries are active."""
    m, lam, active = system(layer, da, db)
    d = m.diagonal()[active].rsqrt()
    unit = d[:, None] * m[active][:, active] * d + 1e-7 * torch.eye(len(d), dtype=m.dtype)
    z = torch.linalg.solve(unit, d * lam[active])
    valid = bool((z >= 0).all())
    if solver == "scalar" or (solver == "paper" and not valid):
        return scalora_scalar(m, lam), active
    if solver == "nnls" and not valid:
        z = nnls(unit, d * lam[active])
    x = torch.zeros_like(lam)
    x[active] = d * z
    return x, active & (valid or solver != "column")


def scalora_scalar(m, lam):
    """Solves Theorem 3: one α², one β²."""
    r = len(lam) // 2
    pa, pb = lam[:r].sum().item(), lam[r:].sum().item()
    maa, mbb, c = m[:r, :r].sum().item(), m[r:, r:].sum().item(), m[:r, r:].sum().item()
    ca, cb, det = pa * mbb - pb * c, pb * maa - pa * c, maa * mbb - c * c
    if ca > 0 >= cb:
        alpha, beta = pa / maa, 0.0
    elif cb > 0 >= ca:
        alpha, beta = 0.0, pb / mbb
    elif min(ca, cb) >= 0 and det > 1e-6 * maa * mbb:
        alpha, beta = ca / det, cb / det
    else:
        alpha, beta = (pa / maa, 0.0) if maa > 0 else (0.0, pb / mbb)
    return torch.tensor([alpha] * r + [beta] * r, dtype=lam.dtype)


def scale(run, scales, grads):
    """Merges what the scaled factors lose into the weights, and returns the scaled gradients."""
    scaled_grads = []
    for layer, both, (da, db) in zip(run.layers, scales, grads, strict=True):
        alpha, beta = both.chunk(2)
        exact_b, exact_a = layer.b * alpha, beta[:, None] * layer.a
        b, a = run.stored(exact_b), run.stored(exact_a)
        layer.w = layer.w + layer.s * layer.b @ torch.diag(1 - alpha * beta) @ layer.a
        layer.w = layer.w + layer.s * ((exact_b - b) @ exact_a + b @ (exact_a - a))  # 0 unless they are rounded
        layer.b, layer.a = b, a
        layer.m = {"a": alpha[:, None] * layer.m["a"], "b": layer.m["b"] * beta}
        layer.v = {"a": alpha[:, None] ** 2 * layer.v["a"], "b": layer.v["b"] * beta**2}
        scaled_grads.append((alpha[:, None] * da, db * beta))
    return scaled_grads


def lora_rite(run, grads):
    method, work = run.by_kind[M.LoRARITE], []
    for layer, (da, db) in zip(run.layers, grads, strict=True):
        for name, g, other in (("a", da, layer.b), ("b", db.T, layer.a.T)):
            u, upper = torch.linalg.qr(other)
            inverse = torch.linalg.pinv(upper)
            work.append((layer, name, inverse.T @ g, u, inverse))
    norm = math.sqrt(sum(g.square().sum().item() for _, _, g, _, _ in work))
    beta1, beta2 = (beta * (1 - beta ** (run.t - 1)) / (1 - beta**run.t) for beta in run.betas)
    for layer, name, g, u, inverse in work:
        g = g * min(1.0, method.clip / norm) if norm else g
        k = len(g)  # the smaller of r and the other factor's width
        old = layer.basis.get(name)
        moment = layer.m[name] if name == "a" else layer.m[name].T
        carry = u.T @ old if old is not None else torch.zeros(k, len(moment), dtype=g.dtype)
        second = layer.basis.get(name + "V", torch.zeros(k, k, dtype=g.dtype))
        if old is not None:
            second = beta2 * carry @ second @ carry.T
        second = second + (1 - beta2) * g @ g.T / g.shape[1]
        values, q = torch.linalg.eigh(second)
        white = q @ torch.diag(1 / (values.clamp(min=0).sqrt() + method.eps)) @ q.T @ g
        moment = beta1 * carry @ moment + (1 - beta1) * white
        layer.m[name] = moment if name == "a" else moment.T
        layer.basis |= {name: u, name + "V": second}
        p = getattr(layer, name)
        p = p if name == "a" else p.T
        p = p - run.lr * (inverse @ moment + run.weight_decay * p)
        setattr(layer, name, p if name == "a" else p.T)


def power(matrix, exponent):
    """Returns a power of a symmetric positive definite matrix."""
    values, q = torch.linalg.eigh(matrix)
    return q @ torch.diag(values**exponent) @ q.T


def refactoring(layer):
    """Returns RefLoRA's S, by the definition of the geometric mean; I where b = 0 or a does not have full rank."""
    ka, kb = layer.a @ layer.a.T, layer.b.T @ layer.b
    if torch.trace(kb) == 0 or torch.linalg.matrix_rank(layer.a) < len(layer.a):
        return torch.eye(len(layer.a), dtype=ka.dtype)
    root = power(kb, 0.5)
    return torch.linalg.inv(root) @ power(root @ ka @ root, 0.5) @ torch.linalg.inv(root)


def msign(x):
    """Returns U Vᵀ of the singular value decomposition."""
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    return u @ vt


def damped(x, damping):
    """Appends r rows √(damping) ‖x‖ I to x (d, r), which add damping · tr to the diagonal of its Gram."""
    return torch.cat([x, math.sqrt(damping) * x.norm() * torch.eye(x.shape[1], dtype=x.dtype)])


def muon_move(moment, other, damping):
    """Returns −U Vᵀ R, with damped moment · R = U Σ Vᵀ and R = (otherᵀ other)^-½: moment (d, r), other (d', r)."""
    other = damped(other, damping)
    root = power(other.T @ other, -0.5)
    return -msign(damped(moment, damping) @ root)[: len(moment)] @ root


def lora_muon(run, layer, da, db):
    """Steps a layer; a does not change while b = 0."""
    beta, damping = run.by_kind[M.LoRAMuon].beta, run.by_kind[M.LoRAMuon].damping
    layer.m = {"a": beta * layer.m["a"] + (1 - beta) * da, "b": beta * layer.m["b"] + (1 - beta) * db}
    a, b, m, decay_factor = layer.a, layer.b, run.momentum(layer), 1 - run.lr * run.weight_decay
    layer.b = decay_factor * b + run.lr / 2 * muon_move(m["b"], a.T, damping)
    layer.a = decay_factor * a
    if b.norm() > 0:
        layer.a = layer.a + run.lr / 2 * muon_move(m["a"].T, b, damping).T
