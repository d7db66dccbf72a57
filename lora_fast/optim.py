"""LoRAAdamW: torch's AdamW for adapters, with the methods of ``lf.methods``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from . import backend, checks
from .batches import pairs, partition
from .batches.batch import Batch, PairInGroups
from .batches.pairs import Pair
from .batches.unpaired import UnpairedParameters
from .layers.find import bare_name
from .layers.sing_lora import count_steps_
from .methods import LoRAPlus, compose
from .methods.method import Method

__all__ = ["LoRAAdamW"]


class LoRAAdamW(torch.optim.Optimizer):
    """AdamW for the adapters of a model, with methods that use both factors of a pair; without any it is torch's fused
    AdamW, on the torch backend bit for bit.

    A step: the methods' changes of the gradients (ScaleReg; ScaLoRA's scaling and merge; preconditioners), AdamW with
    decoupled weight decay or the update that replaces it (LoRA-RITE, LoRA-Muon), the methods' changes of the factors
    (iLoRA, decoupled ScaleReg, BaLoRA). Clipping comes before the step, so it acts on raw gradients.

    On the Triton backend all pairs of one rank take each of these in one launch, however many layers there are, and
    nothing waits for the device: a step can be captured in a CUDA graph, once one has been run on the tensors to be
    captured (not verified on a GPU). On the torch backend, with a method that uses both factors, factors of equal shape
    are kept in one stack: at a step each parameter's ``data`` becomes a slice of it (checked at every step; a parameter
    that was moved is stacked anew). State is per parameter as in torch's AdamW, so ``state_dict`` does not depend on
    any of that.

    Where PEFT keeps the factors of many experts in one pair of parameters (``target_parameters``), every method treats
    each expert as an adapter of its own, of rank r. Those parameters and their state stay whole, as PEFT has them.

    Args:
        model: a model with LoRALinear or PEFT layers (their active adapters), or (lora_A, lora_B[, scaling[, weight]])
            pairs. A model's other trainable parameters (``modules_to_save``, norms, DoRA's magnitudes, …) are trained
            by plain AdamW in a parameter group of their own, the last.
        lr: learning rate, of lora_A where LoRAPlus gives lora_B a group of its own.
        betas, eps, weight_decay: as torch.optim.AdamW, but for the default of weight_decay.
        methods: instances from ``lf.methods``.

    Raises:
        ArgumentError: nothing to train, pairs that do not fit or share a tensor, a frozen factor whose method needs
            both, methods without a meaning together or without a pair to work on, values out of range, ScaLoRA on
            weights it cannot change.
    """

    def __init__(
        self,
        model: nn.Module | Iterable,
        lr: float | Tensor = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        methods: object = (),
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        _check_settings(defaults)
        self._methods = compose(methods)
        self._pairs: list[PairInGroups] = []
        self._forget_batches()
        found = pairs.find_pairs(model) if isinstance(model, nn.Module) else pairs.make_pairs(model)
        groups = [{"params": found}] if found else []
        if isinstance(model, nn.Module):
            ours = {id(factor) for pair in found for factor in (pair.a, pair.b)}
            rest = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
            groups += [{"params": rest}] if rest else []
        if not groups:
            raise checks.ArgumentError("model", "adapters, or anything else to train", "no trainable parameter")
        if self._methods and not found:
            expected = "none for a model without trained LoRA factors (NB-LoRA's free parameters take plain AdamW)"
            raise checks.ArgumentError("methods", expected, ", ".join(map(repr, self._methods)))
        super().__init__(groups, defaults)
        if isinstance(model, nn.Module):
            count_steps_(model, self)

    def add_param_group(self, param_group: dict) -> None:
        """Add pairs (as the constructor takes them), or plain parameters, which plain AdamW trains. Other keys are the
        group's own settings; with LoRAPlus, pairs become two groups."""
        group = dict(param_group)
        _check_settings({name: group[name] for name in ("lr", "betas", "eps", "weight_decay") if name in group})
        entries = group.pop("params", None)
        entries = [entries] if isinstance(entries, Tensor) else list(entries or ())
        if not entries:
            raise checks.ArgumentError("params", "at least one pair or parameter", "none")
        if not any(_is_pair(entry) for entry in entries):
            place = f"params[{len(self.param_groups)}]"
            named = [p if isinstance(p, tuple) else (f"{place}.{i}", p) for i, p in enumerate(entries)]
            super().add_param_group({"params": named, **group, "methods": []})
            return
        added = pairs.make_pairs(entries, f"params[{len(self.param_groups)}]")
        pairs.check(added, {id(p) for other in self.param_groups for p in other["params"]})
        self._check_methods(added)
        self._add_pairs(added, group)

    def _add_pairs(self, added: list[Pair], group: dict) -> None:
        plus = next((method for method in self._methods if type(method) is LoRAPlus), None)
        group["methods"] = [repr(method) for method in self._methods]
        first = len(self.param_groups)
        named = [[(f"{p.name}.lora_A", p.a), (f"{p.name}.lora_B", p.b)] for p in added]
        trained = [[entry for entry in pair if entry[1].requires_grad] for pair in named]
        if plus is None:
            super().add_param_group({"params": [entry for pair in trained for entry in pair], **group})
        else:
            lr = group.pop("lr", self.defaults["lr"])
            for factor, rate in (("lora_A", lr), ("lora_B", lr * plus.ratio)):
                entries = [entry for pair in trained for entry in pair if entry[0].endswith(factor)]
                if entries:
                    super().add_param_group({"params": entries, **group, "lr": rate})
        self._pairs += [(pair, first, first if plus is None else first + 1) for pair in added]
        self._forget_batches()

    def _check_methods(self, added: list[Pair]) -> None:
        for method in self._methods:
            for pair in added:
                for name, factor in (("lora_A", pair.a), ("lora_B", pair.b)):
                    if method.uses_both_factors and not factor.requires_grad:
                        expected = f"a trained factor ({type(method).__name__} uses both)"
                        raise checks.ArgumentError(f"{pair.name}.{name}", expected, "requires_grad=False")
            method.check([pair for pair, *_ in self._pairs] + added)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step on the gradients that are there; parameters without one are left alone, as in torch.

        Raises:
            ArgumentError: a gradient for one factor of a pair only, with a method that uses both; pairs that a method
            cannot train on this backend. Nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        current = self._current_batches()
        if current:
            self._step_pairs(current)
        for plain in self._plain:
            plain.step(self.param_groups[plain.group])
        return loss

    def _step_pairs(self, current: list[Batch]) -> None:
        memory = self.param_groups[self._pairs[0][1]].setdefault("method_state", {})
        for batch in current:
            batch.begin(self.param_groups)
        for method in self._methods:
            method.before_all(current, memory)
        replacement = next((method for method in self._methods if method.replaces_adamw), None)
        followers = [method for method in self._methods if method.has_after]
        for batch in current:
            for method in self._methods:
                method.before(batch)
            if replacement is None:
                batch.adamw(grams=bool(followers))
            else:
                replacement.update(batch)
            for method in followers:
                method.after(batch)

    def _current_batches(self) -> list[Batch]:
        """Batches of all pairs that have gradients, built anew if that set, the backend or a parameter's place has
        changed; none where plain AdamW on a list of tensors serves as well. Asked at every step: lists are compared."""
        owned = self._owned()
        if self._built_for is None or owned != self._built_for[2]:
            self._parameters = self._all_parameters()
        trained = [p.grad is not None for p in self._parameters]
        parts = *self._batches, *self._plain
        if (backend.chosen(), trained, owned) != self._built_for or not all([part.intact() for part in parts]):
            self._build(trained)
            self._built_for = backend.chosen(), trained, self._owned()
        return self._batches

    def _all_parameters(self) -> list[Tensor]:
        """Each pair's a and b, then all others."""
        factors = [p for pair, *_ in self._pairs for p in (pair.a, pair.b)]
        known = set(map(id, factors))
        return factors + [p for group in self.param_groups for p in group["params"] if id(p) not in known]

    def _owned(self) -> tuple:
        """Returns the identities of each parameter's state and of the lists of parameters, which a user may replace."""
        lists = [(id(group["params"]), len(group["params"])) for group in self.param_groups]
        return list(map(id, self.state.values())), lists

    def _build(self, trained: list[bool]) -> None:
        """Batches, and what plain AdamW trains: each parameter that has a gradient now is in one of them."""
        stacked = any(method.needs_stacks for method in self._methods)
        pairing = [method for method in self._methods if method.uses_both_factors]
        triton = not stacked and partition.runs_on_triton([pair for pair, *_ in self._pairs])
        active = []
        for (pair, *groups), of_a, of_b in zip(self._pairs, trained[::2], trained[1::2], strict=False):
            if of_a != of_b and pairing:
                factor = "lora_B" if of_a else "lora_A"
                methods = ", ".join(type(method).__name__ for method in pairing)
                raise checks.ArgumentError(f"{pair.name}.{factor}.grad", f"a gradient ({methods}: both)", "None")
            if of_a and of_b and (pairing or triton):
                active.append((pair if pairing else pair.whole(), *groups))
        for method in self._methods:
            method.check([pair for pair, *_ in active])
        layout = next((m.layout for m in self._methods if type(m).layout is not Method.layout), Method().layout)
        self._batches = partition.build(active, self.state, layout, triton)
        batched = {id(p) for pair, *_ in active for p in (pair.a, pair.b)}
        self._plain = []
        for i, group in enumerate(self.param_groups):
            plain = [p for p in group["params"] if p.grad is not None and id(p) not in batched]
            self._plain += UnpairedParameters.of(plain, i, self.state)

    def _forget_batches(self) -> None:
        self._batches: list[Batch] = []
        self._plain: list[UnpairedParameters] = []
        self._parameters: list[Tensor] = []
        self._built_for: tuple | None = None  # the backend, which parameters have gradients, what is ``_owned``

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from a ``state_dict`` of the same model, methods and order; the next steps are the same bits.

        Raises:
            ArgumentError: it is of other parameters, another order of them, or other methods. Nothing has changed.
        """
        saved = state_dict["param_groups"]
        _check_saved(self.param_groups, saved, state_dict["state"])
        super().load_state_dict(state_dict)
        order = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip((i for group in saved for i in group["params"]), order, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():  # torch has cast it to p's dtype
                self.state[p][name] = value.detach().to(p.device, copy=True)
        self._forget_batches()

    def __getstate__(self) -> dict:
        own = {"_methods": self._methods, "_pairs": self._pairs}
        rebuilt = {"_parameters": [], "_batches": [], "_plain": [], "_built_for": None}
        return super().__getstate__() | own | rebuilt


def _is_pair(entry: object) -> bool:
    return isinstance(entry, Pair) or (isinstance(entry, (tuple, list)) and not (entry and isinstance(entry[0], str)))


def _check_settings(settings: dict) -> None:
    for name, value in settings.items():
        if name == "betas":
            checks.betas(value)
        elif not isinstance(value, Tensor):
            checks.nonnegative(value, name)


def _check_saved(groups: list[dict], saved: list[dict], state: dict) -> None:
    """Raises ArgumentError unless the saved groups have these parameters, in this order, and these methods."""
    sizes, saved_sizes = ([len(group["params"]) for group in some] for some in (groups, saved))
    if sizes != saved_sizes:
        raise checks.ArgumentError("state_dict", f"groups of {sizes} parameters", saved_sizes)
    for group, other in zip(groups, saved, strict=True):
        ours, theirs = group.get("methods", []), other.get("methods", [])
        if ours != theirs:
            raise checks.ArgumentError("state_dict", f"methods {ours}", theirs)
        names = other.get("param_names", group.get("param_names", []))
        for name, theirs in zip(group.get("param_names", []), names, strict=True):
            if bare_name(name) != bare_name(theirs):
                raise checks.ArgumentError("state_dict", f"parameter {name} in this place", theirs)
        for p, i in zip(group["params"], other["params"], strict=True):
            moment = state.get(i, {}).get("exp_avg")
            if moment is not None and moment.shape != p.shape:
                raise checks.ArgumentError("state_dict", f"moments of shape {tuple(p.shape)}", tuple(moment.shape))
