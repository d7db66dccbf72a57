"""Tells whether a call of a module runs more than its class's forward, and carries accelerate's hooks to new layers.

``accelerate.dispatch_model`` (``device_map="auto"``) replaces the forward of every module by a wrapper. The wrapper
calls the module's hook, which moves the input to the module's device, and then the module's own forward. A layer of
ours does the same, so such a hook is no reason against it. Hooks that change parameters (offloading, casting) and the
hooks of other libraries are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, update_wrapper
from types import MethodType
from typing import Any

from torch import Tensor, nn

ACCELERATE = "accelerate.hooks"  # imported where a module has its wrapper
FORWARD, HOOK = "forward", "_hf_hook"  # where accelerate puts its wrapper and its hook, in the module's __dict__


def is_hooked(module: nn.Module) -> bool:
    """Returns whether a call of the module runs hooks or a replaced forward instead of its class's forward alone.
    Hooks of accelerate that only move the input to the module's device do not count."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or (FORWARD in state and not (is_own(state[FORWARD], module) or (is_wrapped(module) and _only_aligns(module))))
    )


def is_own(forward: Any, module: nn.Module) -> bool:
    """Returns whether it is the module's bound forward of its class, which accelerate leaves in the instance where it
    has removed its hook."""
    return type(forward) is MethodType and forward.__self__ is module and forward.__func__ is type(module).forward


def is_wrapped(module: nn.Module) -> bool:
    """Returns whether the instance's forward is accelerate's wrapper around the forward of the module's class."""
    state = module.__dict__
    wrapper = state.get(FORWARD)
    return (
        type(wrapper) is partial
        and getattr(wrapper.func, "__module__", None) == ACCELERATE
        and wrapper.args[:1] == (module,)
        and HOOK in state
        and is_own(state.get("_old_forward"), module)
    )


def returns_to_input(module: nn.Module) -> bool:
    """Returns whether the module's aligning hook moves the output to the input's device."""
    return any(hook.io_same_device for hook in _parts(module.__dict__[HOOK]))


def offloads(module: nn.Module) -> bool:
    """Returns whether a hook of accelerate loads the module's tensors before its forward and drops them after it."""
    hook = module.__dict__.get(HOOK)
    return hook is not None and any(getattr(part, "offload", False) for part in _parts(hook))


def is_offloaded(module: nn.Module) -> bool:
    """Returns whether all that a call of the module runs besides its forward is to load its tensors and drop them, so
    that ``loaded`` can do it."""
    return offloads(module) and is_wrapped(module) and _only_aligns(module, and_offloads=True)


@contextmanager
def loaded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Loads the tensors of offloaded modules, as accelerate does around their forwards. In the context the modules have
    no wrapper. Where gradients are enabled, backward keeps what it needs."""
    with ExitStack() as stack:
        for module in modules:
            state = module.__dict__
            state[HOOK].pre_forward(module)
            stack.callback(state[HOOK].post_forward, module, None)
            stack.callback(state.__setitem__, FORWARD, state.pop(FORWARD))
        yield


def carry_hook(source: nn.Module, target: nn.Module) -> None:
    """Gives the target the source's hook of accelerate if that only moves the input. The hook is not initialised again:
    the target's tensors are on the source's device already, and the hook's table of tied weights has addresses of
    tensors that may be gone."""
    if is_wrapped(source) and _only_aligns(source):
        _wrap(target, source.__dict__[FORWARD].func, source.__dict__[HOOK])


def change_class_(module: nn.Module, kind: type[nn.Module]) -> None:
    """Changes the class of a module whose instance has no forward, its own one, or accelerate's wrapper around that.
    The object stays the same, and so do its hooks, parameters and names."""
    state, wrapped = module.__dict__, is_wrapped(module)
    module.__class__ = kind
    if wrapped:
        _wrap(module, state[FORWARD].func, state[HOOK])
    else:
        state.pop(FORWARD, None)


def has_replaced_forward(module: nn.Module) -> bool:
    """Returns whether the instance has a forward that is neither its class's nor accelerate's wrapper around that."""
    state = module.__dict__
    return FORWARD in state and not (is_own(state[FORWARD], module) or is_wrapped(module))


def stored_tensor(module: nn.Module, name: str, writable: bool = False) -> Tensor:
    """Returns a parameter or buffer of the module. Where accelerate has offloaded it, which leaves a tensor of the meta
    device in the module, that is the tensor in the CPU's memory, or a copy of what is on the disk.

    Args:
        writable: return what the module has instead of a copy, whose change would be lost.
    """
    tensor = getattr(module, name)
    for hook in _parts(module.__dict__[HOOK]) if tensor.is_meta and HOOK in module.__dict__ else ():
        if getattr(hook, "offload", False) and hook.weights_map is not None:
            stored = hook.weights_map.get(name)
            if stored is not None and not (writable and hook.weights_map.get(name) is not stored):
                return stored
    return tensor


def _wrap(module: nn.Module, wrapper: Callable, hook: Any) -> None:
    """Does what accelerate's add_hook_to_module does, without initialising the hook."""
    state = module.__dict__  # nn.Module.__setattr__ has nothing to register
    forward = MethodType(type(module).forward, module)
    state[HOOK], state["_old_forward"] = hook, forward
    state[FORWARD] = update_wrapper(partial(wrapper, module), forward)


def _only_aligns(module: nn.Module, and_offloads: bool = False) -> bool:
    """Returns whether all hooks of a wrapped module only move the input to the module's device, and perhaps the output
    to the input's; with ``and_offloads``, also those that offload its tensors."""
    hook, aligning = module.__dict__[HOOK], sys.modules[ACCELERATE].AlignDevicesHook
    offloading = (False, and_offloads)
    return not hook.no_grad and all(type(part) is aligning and part.offload in offloading for part in _parts(hook))


def _parts(hook: Any) -> tuple:
    """Returns the hooks that a SequentialHook has, in any depth, or the hook itself."""
    if type(hook) is not sys.modules[ACCELERATE].SequentialHook:
        return (hook,)
    return tuple(part for inner in hook.hooks for part in _parts(inner))
