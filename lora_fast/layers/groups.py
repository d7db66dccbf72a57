"""Groups: layers of one parent that are called with the same x, found when they are called.

The layers among the children of one module have one ``Siblings``, which knows which of them have been called with the
same tensor: the same object, with the same version, in the same state of autograd. At first each layer computes itself,
on an x that has entered (ops/linear_group.py), so that they share one dx. Once a backward has shown which layers take
part, the first one called computes all of them as one op, and each of the others returns its result if it has been
computed with what that layer has now. Otherwise the layer computes itself, and is no longer computed with the others.
The bits of all results are the same in all these cases, but for the rounding of dx in the last one.

Without gradients each layer computes itself: reading x once would save little beside the GEMMs, finding the group has a
cost of its own, and results would be in memory before they are used.

One node for several layers would be seen where a layer takes no part in a backward: in hooks of its factors, which get
None, and where two of its layers have backwards of their own. That is why a backward has to show that it does, why x
must have a gradient, and why factors with hooks keep nodes of their own.

What has been computed and not been taken yet is kept for its thread until the next call of a layer that is none of the
group, or the group's backward. No groups are made in traced code, while a mode of torch is to see the ops, and of
tensors that have no version (``torch.inference_mode``).
"""

from __future__ import annotations

import threading
from operator import is_
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd import Variable

from .. import backend, checks, regions
from ..functional.linear import casts, checked, in_autocast, run_op
from ..functional.linear_group import enter, run_group, run_joined
from ..kernels import device
from ..ops import composite
from ..ops.linear_group import MOST
from ..ops.observers import modes, not_compiled, sees_ops

Layer = Any  # an AdapterLinear or a FusedLoraLinear

_thread = threading.local()
_grad, _autocast, _top_hooks, _graph_task = (
    torch.is_grad_enabled,
    torch._C._is_any_autocast_enabled,
    torch._C._autograd._top_saved_tensors_default_hooks,
    torch._C._current_graph_task_id,
)


class Siblings:
    """The adapter layers among the children of one module, as far as their calls have shown. A copy knows nothing yet.

    Attributes:
        groups: for each layer that was the first one called with some x, by its id, this layer and those that were
            called with the same x, in this order.
        proven: for each of these first layers, the ids of those of its group that took part in its last backward.
        called: ids of the layers that have been called.
        unfit: ids of layers that were computed with others, but not called after that as expected.
    """

    def __init__(self) -> None:
        self.groups: dict[int, list[ref]] = {}
        self.proven: dict[int, frozenset[int]] = {}
        self.called: set[int] = set()
        self.unfit: set[int] = set()

    def __deepcopy__(self, memo: dict) -> Siblings:
        return Siblings()

    def __reduce__(self) -> tuple:
        return Siblings, ()

    def known_of(self, layer: Layer) -> tuple[int, tuple[ref, ...]]:
        """Returns how many layers have been called with the x of a call that this one was the first of, 0 if it has not
        been the first one yet, and those of them that took part in the last backward, if the layer itself did."""
        group = self.groups.get(id(layer), ())
        if not group or group[0]() is not layer:
            return 0, ()
        ids = self.proven.get(id(layer), ())
        return len(group), tuple([member for member in group if id(member()) in ids]) if id(layer) in ids else ()

    def begin(self, layer: Layer) -> None:
        """Notes that a layer was the first one called with some x."""
        group = self.groups.get(id(layer))
        if not group or group[0]() is not layer:
            self.groups[id(layer)] = [ref(layer)]

    def meet(self, first: Layer | None, layer: Layer) -> None:
        """Notes that a layer was called with the x of the first one."""
        group = self.groups.get(id(first), ())
        if (
            group
            and len(group) < MOST
            and id(layer) not in self.unfit
            and all(member() is not layer for member in group)
        ):
            group.append(ref(layer))

    def met_groups(self) -> list[list[Layer]]:
        """Returns the groups of more than one layer."""
        alive = [[layer for member in group if (layer := member()) is not None] for group in self.groups.values()]
        return [group for group in alive if len(group) > 1]

    def part(self, layer: Layer | None) -> None:
        """Notes that a layer is not to be computed with others."""
        self.unfit.add(id(layer))
        for group in self.groups.values():
            group[1:] = [member for member in group[1:] if member() not in (layer, None)]


class _Met:
    """The x that a thread's last group was called with.

    Attributes:
        x: a reference to it.
        state: ``_state`` of the call.
        in_backward: whether a backward made this call, as one that runs a checkpointed region again.
        called: ids of the layers that have been called with it. A second call with the same x begins anew.
        waiting: results that were computed and not taken yet, each with the layer, its arguments and their versions.
        entered: the x that has entered, and its entry, as long as x is alive.
    """

    __slots__ = (
        "__weakref__", "autocast", "called", "entered", "first", "in_backward", "siblings", "state", "waiting", "x"
    )  # fmt: skip

    def __init__(self, siblings: Siblings, first: Layer, x: Tensor, state: tuple, autocast: bool):
        this = ref(self)
        self.siblings = ref(siblings, lambda _: _forget(this()))  # with them the model is gone
        self.first, self.state, self.autocast = ref(first), state, autocast
        self.in_backward = _graph_task() != -1
        self.entered: tuple | None = None
        self.called = {id(first)}
        self.waiting: dict[int, tuple] = {}
        self.x = ref(x)

    def is_of(self, siblings: Siblings, x: Tensor, state: tuple | None = None) -> bool:
        """Returns whether a layer with these siblings is called with this x in the same state. ``state``: that of the
        call, if it is known."""
        return self.siblings() is siblings and self.x() is x and self.state == (state or _state(x))

    def fits(self, x: Tensor, arguments: tuple) -> bool:
        """Returns whether autocast does to a layer what it does to the others, which quantised weights change."""
        return not _autocast() or casts(x, arguments[0]) is self.autocast

    def enter(self, x: Tensor, siblings: Siblings, first: Layer) -> None:
        """Makes x enter. A backward tells the siblings which layers took part."""
        order: list[int] = []
        this, key = ref(self), id(first)
        known = ref(siblings)  # a graph, which waiting results keep alive, is not to keep them alive
        ran = lambda indices: _prove(known(), key, [order[i] for i in indices])
        self.entered = *enter(x, self.autocast, ran), order
        self.x = ref(x, lambda _: _leave(this()))

    def run(self, layer: Layer, x: Tensor, arguments: tuple) -> Tensor:
        """Computes one layer by itself."""
        if self.entered is None:
            return run_op(x, *arguments)
        entered, entry, order = self.entered
        call = checked(x, self.autocast, *arguments)
        order.append(id(layer))
        return run_joined(entered, entry, call, self.autocast)

    def part(self) -> None:
        """Gives up the results that have not been taken. Activation checkpointing stops a region's second run as soon
        as it can, so there they tell nothing."""
        siblings = self.siblings()
        if siblings is not None and not self.in_backward:
            for layer, *_ in self.waiting.values():
                siblings.part(layer())
        self.waiting.clear()


def _leave(met: _Met | None) -> None:
    if met is not None:
        met.entered = None


@not_compiled
def taken(layer: Layer, x: Tensor, arguments: tuple) -> Tensor | None:
    """Returns the layer's result if its group has computed it with this x and these arguments, else None."""
    met = getattr(_thread, "met", None)
    if met is None or id(layer) not in met.waiting or not met.is_of(layer.siblings, x):
        return None
    met.called.add(id(layer))
    _, kept, versions, y = met.waiting.pop(id(layer))
    if versions is None or versions != _versions(*arguments) or not _are_same(kept, arguments):
        layer.siblings.part(layer)
        met.called.remove(id(layer))
        return None
    return y


@not_compiled
def run(layer: Layer, x: Tensor, arguments: tuple) -> Tensor:
    """Computes a layer that the op can serve, and whose result is not there yet, alone or with its siblings.
    ``arguments``: those of ``functional.lora_linear`` after x."""
    siblings = layer.siblings
    if id(layer) in siblings.called and not _grad():
        _give_up()
        return run_op(x, *arguments)
    siblings.called.add(id(layer))
    state = None if layer._backward_hooks else _state(x)  # they are to see gradients of this layer alone
    if state is None:
        return run_op(x, *arguments)
    met = getattr(_thread, "met", None)
    if met is None or not met.is_of(siblings, x, state) or not met.fits(x, arguments) or id(layer) in met.called:
        return _first(layer, siblings, x, state, arguments)
    met.called.add(id(layer))
    siblings.meet(met.first(), layer)
    return met.run(layer, x, arguments)


def _first(layer: Layer, siblings: Siblings, x: Tensor, state: tuple, arguments: tuple) -> Tensor:
    """Computes a layer that is called with another x than the one before, and the layers of its group."""
    _give_up()
    decide = lambda: _decision(siblings, layer)
    # A checkpointed region saves the same tensors and draws the same seeds when it runs again.
    decision = regions.same_again("groups", decide) if regions.inside() else decide()
    if decision is None:
        return run_op(x, *arguments)
    count, proven = decision
    met, has_node = _Met(siblings, layer, x, state, casts(x, arguments[0])), _grad() and x.requires_grad
    y = _together(met, siblings, x, layer, arguments, proven) if has_node and len(proven) > 1 else None
    if y is None:
        siblings.begin(layer)
        if has_node and count != 1:
            met.enter(x, siblings, layer)
        y = met.run(layer, x, arguments)
    _thread.met = met
    return y


def _give_up() -> None:
    """Gives up what this thread has computed for a call before and not taken."""
    if (before := getattr(_thread, "met", None)) is not None:
        _thread.met = None
        before.part()


def _decision(siblings: Siblings, layer: Layer) -> tuple | None:
    """Returns ``siblings.known_of(layer)``, or None if x is not even to enter. In a function that backward runs again,
    gradients are on the second time only. Both times have to draw the same seeds, so each layer computes itself."""
    if modes() > 0 and sees_ops():
        return None
    return (0, ()) if regions.in_function() else siblings.known_of(layer)


def _together(
    met: _Met, siblings: Siblings, x: Tensor, layer: Layer, arguments: tuple, group: tuple
) -> Tensor | None:  # fmt: skip
    """Computes a group, whose first layer this is, and returns this one's result; those of the others wait to be taken.
    Returns None if a layer keeps a node of its own, or if no other one would be served."""
    calls, others = [(*checked(x, met.autocast, *arguments), None)], []
    if _has_hooks(arguments):
        return None
    for member in group[1:]:
        sibling = member()
        theirs = sibling.call_arguments(x) if _may_be_ahead(sibling, siblings) else None
        if theirs is None or not met.fits(x, theirs):
            continue
        versions = _versions(*theirs)
        if versions is None or _has_hooks(theirs):
            return None
        try:
            calls.append((*checked(x, met.autocast, *theirs), None))
        except checks.ArgumentError:  # the sibling's own call says so
            continue
        others.append((member, theirs, versions))
    if not others:
        return None
    this, known, ids = ref(met), ref(siblings), [id(layer), *(id(member()) for member, *_ in others)]

    def at_backward(used: list[int]) -> None:
        _forget(this())
        _prove(known(), ids[0], [ids[i] for i in used])

    if met.in_backward:  # a checkpointed region may end before all results are taken
        Variable._execution_engine.queue_callback(lambda: _forget(this()))
    y, *results = run_group(x, calls, met.autocast, at_backward)
    for other, result in zip(others, results, strict=True):
        met.waiting[id(other[0]())] = *other, result
    return y


def _may_be_ahead(sibling: Any, siblings: Siblings) -> bool:
    """Returns whether a layer, or None, may be computed before it is called: it is one of the siblings, and has no
    hooks that may change it before its forward, or that are to see gradients of this layer alone."""
    return getattr(sibling, "siblings", None) is siblings and not (
        sibling._forward_pre_hooks or sibling._backward_hooks
    )  # fmt: skip


def _has_hooks(arguments: tuple) -> bool:
    """Returns whether hooks wait for the gradients of a layer's factors. One node for several layers would call them
    for a layer that takes no part in a backward, too."""
    _, _, a, b, *_ = arguments
    return bool(
        a._backward_hooks or b._backward_hooks or a._post_accumulate_grad_hooks or b._post_accumulate_grad_hooks
    )


def _prove(siblings: Siblings | None, first: int, ids: list[int]) -> None:
    """Notes which layers of the first one's group took part in a backward."""
    if siblings is not None:
        siblings.proven[first] = frozenset(ids)


def _forget(met: _Met | None) -> None:
    """Gives up results whose backward has run without them."""
    if met is not None:
        met.waiting.clear()


def _state(x: Tensor) -> tuple | None:
    """Returns what must be the same for layers of one x, or None if there can be no groups now, or none with this x:
    there are references to it, with which a Parameter could not be swapped (``torch.utils.swap_tensors``)."""
    if type(x) is not Tensor or x.is_inference() or composite.transform() is not None:
        return None
    hooks = _top_hooks(False)
    return (
        x._version,
        x.data_ptr(),
        x.shape,
        x.stride(),
        x.requires_grad,
        x.is_leaf,
        _grad(),
        torch.get_autocast_dtype(x.device.type) if _autocast() and in_autocast(x) else None,
        hooks and _reference(hooks),
        _graph_task(),
        modes() > 0 and sees_ops(),
        device.stream_on(x.device) if x.is_cuda else None,
        backend.chosen(),
    )


def _reference(hooks: tuple) -> object:
    """Returns what identifies hooks for saved tensors, without keeping them alive, and with them a checkpointed region.
    Hooks of which there are no references are never the same."""
    try:
        return ref(hooks[0])
    except TypeError:
        return object()


def _versions(weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling, dropout_p) -> tuple | None:
    """Returns what tells whether a layer's arguments have been changed in place; None if nothing does."""
    try:
        others = None if bias is None else (bias._version, bias.requires_grad)
        scale = scaling._version if isinstance(scaling, Tensor) else None
        addresses = weight.data_ptr(), a.data_ptr(), b.data_ptr()
        return addresses, weight._version, a._version, b._version, a.requires_grad, b.requires_grad, others, scale
    except RuntimeError:  # made under inference_mode
        return None


def _are_same(kept: tuple, arguments: tuple) -> bool:
    """Returns whether a layer's arguments are those that were kept, or equal them."""
    return all(map(is_, kept, arguments)) or all(
        [old is new or _are_equal(old, new) for old, new in zip(kept, arguments, strict=True)]
    )


def _are_equal(old: Any, new: Any) -> bool:
    """Returns whether two numbers are equal, or two tensors views of the same memory, as a Conv1D's are."""
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return old is not None and new is not None and bool(old == new)
    layout = lambda tensor: (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
    return layout(old) == layout(new)
