"""LoRAAdamW: torch's AdamW for adapters, with the methods of ``lf.methods``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from . import backend, checks
from .batches import group_settings, pairs, param_groups, partition, saved_state
from .batches.batch import MOMENTS, NO_STATE, Batch, PairInGroups, Shapes
from .batches.group_settings import NUMBERS, SETTINGS
from .batches.pairs import Pair
from .batches.trained import trained_parameters, warn_of_adapters_without_effect
from .batches.unpaired import UnpairedParameters
from .layers.find import bare_name
from .layers.sing_lora import count_steps_
from .methods import LoRAPlus, compose
from .methods.method import Method

__all__ = ["LoRAAdamW"]

NO_ENTRIES: tuple = ((), (), ())


class LoRAAdamW(torch.optim.Optimizer):
    """AdamW for the adapters of a model, with methods that use both factors of a pair. Without methods it is torch's
    fused AdamW, bit for bit on the torch backend.

    A step has three parts: the methods' changes of the gradients (ScaleReg, ScaLoRA's scaling and merge, the
    preconditioners); AdamW with decoupled weight decay, or the update that replaces it (LoRA-RITE, LoRA-Muon); and the
    methods' changes of the factors (iLoRA, decoupled ScaleReg, BaLoRA). Gradient clipping precedes the step, so it acts
    on raw gradients.

    On the Triton backend, each operation is one launch for all pairs of one rank, however many layers there are.
    Nothing waits for the device, so a step can be captured in a CUDA graph after one step has been run on the same
    tensors (not verified on a GPU). On the torch backend, a method that uses both factors works on stacks of factors of
    equal shape: a step copies the factors into stacks and the results back. On both backends a parameter keeps its own
    memory and its strides, so that views of it stay tied to it. State is per parameter as in torch's AdamW, and
    ``state_dict`` does not depend on stacks or backends.

    PEFT keeps the factors of many experts in one pair of parameters (``target_parameters``). Every method then treats
    each expert as an adapter of its own, of rank r. These parameters and their state keep the shapes that PEFT gives
    them.

    Args:
        model: a model with a trained adapter in at least one of its layers, ours or PEFT's (of any tuner, the active
            adapters), or (lora_A, lora_B[, scaling[, weight]]) pairs. A model's other trainable parameters
            (``modules_to_save``, norms, DoRA's magnitudes, …) are trained by plain AdamW in a parameter group of their
            own, the last, unless ``groups`` says otherwise.
        lr: the learning rate. With LoRAPlus it is that of lora_A, and lora_B has a group of its own.
        betas, eps, weight_decay: as in torch.optim.AdamW, except that the default of weight_decay is 0. These numbers,
            and those that are later written into a group, may be numpy's or tensors of one element. A tensor is read
            once, except for that of a learning rate, which may change in place.
        methods: instances from ``lf.methods``.
        rounding: how a step rounds new parameters of 16 bits. "nearest" is torch's rounding; it loses changes below
            half a unit in the last place, which those of most methods are. "stochastic" rounds up or down with the
            probability that makes the mean exact; the noise depends on names, steps and elements alone. "auto" is
            stochastic for the factors that a method works on and nearest for all other parameters.
        state_dtype: the dtype of AdamW's moments: None for the parameters' own, as in torch, or torch.float32, also
            over parameters of 16 bits. Second moments in bfloat16 hardly fall, and those in float16 underflow, of which
            the optimizer warns.
        groups: torch's parameter groups, dicts of params and settings, which together contain each trained parameter of
            the model once, and may contain others. Settings may then differ between parameters. With the groups of
            torch's AdamW, each of both optimizers loads the other's ``state_dict``.

    Raises:
        ArgumentError: a model without trained adapters, whose own weights would be trained in their place; parameters
            in place of the model; groups that lack a trained parameter or have others; pairs that do not fit, share a
            tensor or are frozen; a frozen factor with a method that needs both; methods that have no meaning together
            or no pair to work on; values out of range; ScaLoRA with weights that it cannot change. At a step and in
            ``load_state_dict`` also a variant of AdamW in a group (maximize, amsgrad, differentiable, or
            decoupled_weight_decay=False).
    """

    _methods: tuple[Method, ...]
    _rounding: str
    _state_dtype: torch.dtype | None
    _warned: bool  # of second moments in float16
    _known: list[Pair]  # all pairs that were added
    _pairs: list[PairInGroups]  # those whose factors are in the parameter groups
    _batches: list[Batch]
    _unpaired: list[UnpairedParameters]
    _built_for: tuple[str, list[int]] | None  # the backend, the identities of the parameters' states
    _parameters: list[Tensor]  # of all groups
    _members: list[bool]  # which of them have a place in a batch
    _has_grad: list[bool]  # which of them had a gradient at the last step
    _sizes: list[int]  # of the groups
    _settings: list  # the values of all groups that were checked last
    _entries: tuple  # of the layers' dictionaries that hold the pairs' factors: dictionaries, keys, what they held

    def __init__(
        self,
        model: nn.Module | Iterable,
        lr: float | Tensor = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        methods: object = (),
        rounding: str = "auto",
        state_dtype: torch.dtype | None = None,
        groups: Iterable[dict] | None = None,
    ):
        # ``fused`` has no effect here. With it in a saved state, torch's AdamW goes on with the same kernel.
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        group_settings.check(defaults)
        self._methods = check_options(methods, rounding, state_dtype)
        self._rounding, self._state_dtype, self._warned = rounding, state_dtype, False
        self._known, self._pairs = [], []
        self._forget_batches()
        if isinstance(model, nn.Module):
            added, adapters, others = trained_parameters(model, as_pairs=bool(self._methods))
            warn_of_adapters_without_effect(model)
        elif not (added := pairs.make_pairs(model)):
            raise checks.ArgumentError("model", "a torch.nn.Module or at least one pair", "none")
        if self._methods and not added:
            expected = "none for a model without trained LoRA factors (NB-LoRA's free parameters take plain AdamW)"
            raise checks.ArgumentError("methods", expected, ", ".join(map(repr, self._methods)))
        self._check_pairs(added, set())
        if not isinstance(model, nn.Module):
            adapters, others = [entry for pair in added for entry in pair.trained_factors], []
        if groups is None:
            chosen: list[dict[str, Any]] = [{"params": params} for params in (adapters, others) if params]
        else:
            every = model.named_parameters() if isinstance(model, nn.Module) else ()
            frozen = ((bare_name(name), p) for name, p in every if not p.requires_grad)
            chosen = param_groups.named_groups(groups, [*adapters, *others], frozen)
        for group in chosen:
            group_settings.check(group)
        super().__init__([_Checked(part) for group in chosen for part in self._split(group, added, lr)], defaults)
        self._register(added)
        if isinstance(model, nn.Module):
            count_steps_(model, self)

    def add_param_group(self, param_group: dict) -> None:
        """Adds pairs, in the forms that the constructor takes, or other parameters, which plain AdamW trains. The other
        keys are settings of the group. With LoRAPlus, pairs become two groups.

        Raises:
            ArgumentError: as in the constructor, or an empty group.
        """
        if isinstance(param_group, _Checked):
            super().add_param_group(dict(param_group))
            return
        if not isinstance(param_group, dict):
            raise checks.ArgumentError("param_group", "a dict with the key params", checks.shown(param_group))
        group = dict(param_group)
        group_settings.check(group)
        entries = group.pop("params", None)
        if not isinstance(entries, (Tensor, Iterable, type(None))) or isinstance(entries, (str, bytes, dict)):
            raise checks.ArgumentError("params", "pairs or parameters", checks.shown(entries))
        entries = [entries] if isinstance(entries, Tensor) else list(() if entries is None else entries)
        if not entries:
            raise checks.ArgumentError("params", "at least one pair or parameter", "none")
        argument = f"params[{len(self.param_groups)}]"
        trained = {id(p) for other in self.param_groups for p in other["params"]}
        if not any(param_groups.is_pair(entry) for entry in entries):
            named = [p if isinstance(p, tuple) else (f"{argument}.{i}", p) for i, p in enumerate(entries)]
            param_groups.check_parameters(named, argument, trained)
            super().add_param_group({"params": named, **group, "methods": []})
            return
        added = pairs.make_pairs(entries, argument)
        self._check_pairs(added, trained)
        group["params"] = [entry for pair in added for entry in pair.trained_factors]
        for part in self._split(group, added, self.defaults["lr"]):
            super().add_param_group(part)
        self._register(added)

    def _check_pairs(self, added: list[Pair], trained: set[int]) -> None:
        """Raises ArgumentError unless pairs can be added. ``trained`` are the ids of the parameters of all groups."""
        pairs.check(added, trained, whole=bool(self._pairing))
        pairs.check_memory([*self._known, *added])
        for pair in added:
            if not pair.trained_factors:
                raise checks.ArgumentError(pair.name, "a pair with a trained factor", "requires_grad=False of both")
        self._check_methods(added)

    def _split(self, group: dict, added: list[Pair], lr: float | Tensor) -> list[dict]:
        plus = next((method.ratio for method in self._methods if type(method) is LoRAPlus), None)
        return param_groups.split_for_lora_plus(group, added, lr, plus)

    def _register(self, added: list[Pair]) -> None:
        """Takes pairs whose trained factors are in the parameter groups as pairs of the optimizer."""
        groups = self._groups_of_parameters()
        placed = [_placed(pair, groups) for pair in added]
        self._known += added
        self._pairs += [pair for pair in placed if pair is not None]
        for i in {i for pair in placed if pair is not None for i in pair[1:]}:
            self.param_groups[i]["methods"] = [repr(method) for method in self._methods]
        self._forget_batches()

    def _groups_of_parameters(self) -> dict[int, int]:
        """Returns the id of each parameter → the index of its group."""
        return {id(p): i for i, group in enumerate(self.param_groups) for p in group["params"]}

    def _check_methods(self, added: list[Pair]) -> None:
        for method in self._methods:
            for pair in added:
                for name, factor in (("lora_A", pair.a), ("lora_B", pair.b)):
                    if method.uses_both_factors and not factor.requires_grad:
                        expected = f"a trained factor ({type(method).__name__} uses both)"
                        raise checks.ArgumentError(f"{pair.name}.{name}", expected, "requires_grad=False")
            method.check([*self._known, *added])

    @torch._disable_dynamo  # as torch's optimizers have it: torch.compiler.disable, imported at the first call
    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Performs one step. Parameters without a gradient are not changed, as in torch. Under torch.compile the step
        runs eagerly.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned.

        Raises:
            ArgumentError: only one factor of a pair has a gradient, and a method uses both; a method cannot train the
                pairs on the current backend; or ScaLoRA, and a pair that is merged into its weight. No parameter and no
                state is then changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(method.changes_weights for method in self._methods):
            pairs.check_unmerged(pair for pair, *_ in self._pairs)
        self._update()
        if batches := [batch for batch in self._batches if False in batch.rests]:
            self._step_pairs(batches)
        for parameters in self._unpaired:
            parameters.step(self.param_groups[parameters.group])
        return loss

    def _step_pairs(self, batches: list[Batch]) -> None:
        # ``memory`` is stored in the parameter group of the first pair's a, because state_dict saves groups.
        memory = self.param_groups[self._pairs[0][1]].setdefault("method_state", {})
        for batch in batches:
            batch.begin(self.param_groups)
        for method in self._methods:
            method.before_all(batches, memory)
        replacement = next((method for method in self._methods if method.replaces_adamw), None)
        followers = [method for method in self._methods if method.has_after]
        for batch in batches:
            for method in self._methods:
                method.before(batch)
            if replacement is None:
                batch.adamw(grams=bool(followers))
            else:
                replacement.update(batch)
            for method in followers:
                method.after(batch)
            batch.end()

    def _update(self) -> None:
        """Brings pairs and batches up to date with the parameters, their gradients and their state, any of which a user
        or a wrapper may replace. Runs at every step, so it compares lists, the fastest comparison in Python."""
        settings = [group.get(name) for group in self.param_groups for name in SETTINGS]
        if len(settings) != len(self._settings) or not all(map(is_, settings, self._settings)):
            self._convert_settings()
        parameters = [p for group in self.param_groups for p in group["params"]]
        sizes = [len(group["params"]) for group in self.param_groups]
        same_groups = sizes == self._sizes and all(map(is_, parameters, self._parameters))
        holders, keys, held = self._entries
        if not (same_groups and all(map(is_, map(dict.get, holders, keys), held))):
            self._find_pairs_anew()
            self._batches, self._unpaired, self._built_for = [], [], None
            self._parameters, self._sizes = parameters, sizes
        has_grad = [p.grad is not None for p in parameters]
        parts: list[Batch | UnpairedParameters] = [*self._batches, *self._unpaired]
        built_for = backend.chosen(), list(map(id, self.state.values()))
        if built_for != self._built_for or not all([part.intact() for part in parts]):
            self._build()
        elif has_grad != self._has_grad:
            if any(new and not member for new, member in zip(has_grad, self._members, strict=True)):
                self._build()
            else:
                self._check_gradients()
                for part in parts:
                    part.find_resting()
        self._has_grad = has_grad

    def _convert_settings(self) -> None:
        """Converts numbers that a user or a scheduler has written into the groups to numbers of Python. As in torch,
        their range is not checked.

        Raises:
            ArgumentError: a value that is no number, or a variant of AdamW that the optimizer does not have. Nothing
                has changed then.
        """
        for group in self.param_groups:
            group_settings.check_variants(group)
        converted = [
            {name: group_settings.converted(name, group[name]) for name in NUMBERS & group.keys()}
            for group in self.param_groups
        ]
        for group, numbers in zip(self.param_groups, converted, strict=True):
            group |= numbers
        self._settings = [group.get(name) for group in self.param_groups for name in SETTINGS]

    def _find_pairs_anew(self) -> None:
        """Finds the pairs again after parameters were replaced, in the groups or in the layers, as accelerate does for
        FSDP2 and DeepSpeed for its flat partitions.

        Raises:
            ArgumentError: a parameter of a group with methods belongs to no pair, or the layers train parameters that
                the optimizer does not have. Nothing has changed then.
        """
        groups = self._groups_of_parameters()
        known: list[Pair] = []
        placed: list[PairInGroups] = []
        for pair in self._known:
            current = pair.found_anew() or pair
            for name, factor, old in (("lora_A", current.a, pair.a), ("lora_B", current.b, pair.b)):
                is_new = factor is not old and id(factor) not in groups
                if is_new and factor.requires_grad and factor.grad is not None:
                    expected = "the layer's parameter in a parameter group: a new optimizer for the changed model"
                    raise checks.ArgumentError(f"{pair.name}.{name}", expected, "a parameter that the layer replaced")
            known.append(current)
            for candidate in (current, pair):
                if (member := _placed(candidate, groups)) is not None:
                    placed.append(member)
                    known[-1] = candidate
                    break
        factors = {id(p) for pair, *_ in placed for p in (pair.a, pair.b)}
        names_of_factors = {name for pair in self._known for name, _ in pair.named_factors}
        for i, group in enumerate(self.param_groups):
            # Beside factors a group may have other parameters, which have other names.
            names = group.get("param_names", [])
            is_named = len(names) == len(group["params"])
            for j, p in enumerate(group["params"]):
                is_factor = not is_named or names[j] in names_of_factors
                if self._pairing and group.get("methods") and is_factor and id(p) not in factors:
                    methods = ", ".join(type(method).__name__ for method in self._pairing)
                    expected = (
                        f"a lora_A or lora_B of the model's layers, since {methods} trains both factors of a pair"
                    )
                    got = f"{type(p).__name__} {tuple(p.shape)}, which belongs to no pair"
                    raise checks.ArgumentError(f"param_groups[{i}]['params'][{j}]", expected, got)
        if self._pairing:
            pairs.check([pair for pair, *_ in placed], set(), whole=True)
        self._known, self._pairs = known, placed
        entries = [entry for pair, *_ in placed for entry in pair.entries]
        self._entries = tuple(map(list, zip(*entries, strict=True))) if entries else NO_ENTRIES

    def _check_gradients(self) -> None:
        """Raises ArgumentError if a method uses both factors of a pair and one of them has no gradient."""
        for pair, *_ in self._pairs if self._pairing else ():
            if (pair.a.grad is None) != (pair.b.grad is None):
                factor = "lora_A" if pair.a.grad is None else "lora_B"
                methods = ", ".join(type(method).__name__ for method in self._pairing)
                raise checks.ArgumentError(f"{pair.name}.{factor}.grad", f"a gradient ({methods}: both)", "None")

    def _build(self) -> None:
        """Puts each parameter that has a gradient, or state since it had one, into a batch or, where plain AdamW on a
        list of tensors does the same, into an UnpairedParameters."""
        self._check_gradients()
        members = [p.grad is not None or "step" in self.state.get(p, NO_STATE) for p in self._parameters]
        chosen_backend = backend.chosen()  # read first: if another thread sets it now, the next step builds again
        stacked = any(method.needs_stacks for method in self._methods)
        chosen = {id(p) for p, member in zip(self._parameters, members, strict=True) if member}
        active: list[PairInGroups] = []
        for pair, group_a, group_b in self._pairs:
            is_batched = self._pairing or (not stacked and pair.is_whole and partition.runs_on_triton(pair))
            if id(pair.a) in chosen and id(pair.b) in chosen and is_batched:
                active.append((pair if self._pairing else pair.whole(), group_a, group_b))
        if self._pairing:
            pairs.check([pair for pair, *_ in active], set(), whole=True)
        for method in self._methods:
            method.check([pair for pair, *_ in active])
        stochastic = self._rounding == "stochastic" or (self._rounding == "auto" and bool(self._pairing))
        self._batches = partition.build(active, self.state, self._layout, stacked, stochastic)
        batched = {id(p) for pair, *_ in active for p in (pair.a, pair.b)}
        self._unpaired = []
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names", [])
            if len(names) != len(group["params"]):  # the group was changed by hand
                names = [f"{i}.{j}" for j in range(len(group["params"]))]
            named = zip(names, group["params"], strict=True)
            entries = [(name, p) for name, p in named if id(p) in chosen and id(p) not in batched]
            is_stochastic = self._rounding == "stochastic"
            self._unpaired += UnpairedParameters.build(entries, i, self.state, self._state_dtype, is_stochastic)
        self._warn_of_float16()
        self._members = members
        self._built_for = chosen_backend, list(map(id, self.state.values()))  # building adds state

    def _forget_batches(self) -> None:
        """Makes the next step find parameters and build batches anew."""
        self._batches, self._unpaired, self._built_for = [], [], None
        self._parameters, self._sizes, self._entries = [], [], NO_ENTRIES
        self._members, self._has_grad, self._settings = [], [], []

    @property
    def _pairing(self) -> list[Method]:
        """Returns the methods that work on pairs."""
        return [method for method in self._methods if method.uses_both_factors]

    def _warn_of_float16(self) -> None:
        """Warns once of second moments in float16, where 0.001 g² is 0 for gradients below about 0.005."""
        moments = (state.get("exp_avg_sq") for state in self.state.values())
        if not self._warned and any(v is not None and v.dtype is torch.float16 for v in moments):
            self._warned = True
            warnings.warn(
                "LoRAAdamW: the moments of float16 parameters are float16, in which squares of small gradients become "
                "0 and steps far too large; state_dtype=torch.float32 avoids this",
                stacklevel=2,
            )

    def _layout(self, pair: Pair) -> tuple[Shapes, Shapes]:
        """Returns the shapes and dtypes of a's and b's state, with moments of at least ``state_dtype``."""
        # Methods with a layout of their own exclude each other, so there is at most one.
        layout = next((m.layout for m in self._methods if type(m).layout is not Method.layout), Method().layout)
        shapes_a, shapes_b = layout(pair)
        if self._state_dtype is not None:
            for shapes in (shapes_a, shapes_b):
                for name in shapes.keys() & MOMENTS:
                    shape, dtype = shapes[name]
                    shapes[name] = shape, torch.promote_types(dtype, self._state_dtype)
        return shapes_a, shapes_b

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads the ``state_dict`` of an optimizer with the same model, methods, groups and order of parameters. The
        next steps then give the same bits as those of the saved optimizer. Either model may be in a wrapper
        (torch.compile, DataParallel, DistributedDataParallel, FSDP2, checkpoint_wrapper); FSDP1's shards first go
        through its own ``optim_state_dict``.

        The state may also be that of AdamW, torch's or this one without methods. Its moments are taken over and the
        methods begin, of which a warning tells.

        Raises:
            ArgumentError: the state belongs to other parameters, another order of them, other methods, or a variant of
                AdamW that the optimizer does not have; or it is incomplete, has entries of another optimizer, or
                moments of other shapes. Nothing has changed then.
        """
        loaded: list[dict] = []
        notes: list[str] = []

        def check(optimizer: torch.optim.Optimizer, state: dict) -> dict:
            saved_state.check_form(state)
            layouts = [(pair, *self._layout(pair)) for pair in self._known] if self._pairing else []
            shapes = {id(p): x for pair, *both in layouts for p, x in zip((pair.a, pair.b), both, strict=True)}
            if saved_state.is_of_adamw(state["param_groups"]):
                restarts = any(method.replaces_adamw for method in self._methods)
                state, note = saved_state.taken_over(self.param_groups, state, shapes, restarts)
                notes.append(note)
            saved_state.check(self.param_groups, state, shapes)
            loaded.append(state)
            return state

        saved_state.check_form(state_dict)  # torch copies it before hooks change it

        # Registered last, so that it gets what a user's hooks have made of the state.
        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        if any(notes):
            warnings.warn("".join(notes), stacklevel=2)
        (state,) = loaded
        indices = (i for group in state["param_groups"] for i in group["params"])
        order = (p for group in self.param_groups for p in group["params"])
        for i, p in zip(indices, order, strict=True):
            for name, value in state["state"].get(i, {}).items():
                if not isinstance(value, Tensor):  # a step count, as older versions of torch saved it
                    value = torch.tensor(value, dtype=torch.float32, device=p.device)
                # torch's method casts state to p's dtype, which would round float32 state of 16-bit parameters.
                self.state[p][name] = saved_state.placed_as(value.detach(), p).to(p.device, copy=True)
        self._forget_batches()

    def __getstate__(self) -> dict:
        """Adds methods and pairs to torch's state. The batches of a copy are empty: its first step builds them."""
        names = "_methods", "_known", "_pairs", "_rounding", "_state_dtype", "_warned"
        attributes = {name: getattr(self, name) for name in names}
        empty: dict[str, Any] = {"_batches": [], "_unpaired": [], "_built_for": None}
        empty |= {name: [] for name in ("_parameters", "_sizes", "_settings", "_members", "_has_grad")}
        empty |= {"_entries": NO_ENTRIES}
        return super().__getstate__() | attributes | empty


def check_options(methods: object, rounding: str, state_dtype: torch.dtype | None) -> tuple[Method, ...]:
    """Returns the methods in the order in which a step runs them; raises ArgumentError for options of LoRAAdamW that it
    does not have."""
    checks.choice(rounding, "rounding", ("auto", "nearest", "stochastic"))
    if state_dtype is not None and state_dtype is not torch.float32:
        raise checks.ArgumentError("state_dtype", "None or torch.float32", checks.shown(state_dtype))
    return compose(methods)


class _Checked(dict):
    """A parameter group of the constructor, whose parameters are named and checked. It may be empty, as in torch."""


def _placed(pair: Pair, groups: dict[int, int]) -> PairInGroups | None:
    """Returns the pair with the groups of its factors, or None where trained ones are in none. A frozen factor may be
    in no group; the settings of the other one then count for both."""
    a, b = id(pair.a), id(pair.b)
    if not (a in groups or b in groups) or not all(id(p) in groups for _, p in pair.trained_factors):
        return None
    return pair, groups[a if a in groups else b], groups[b if b in groups else a]
