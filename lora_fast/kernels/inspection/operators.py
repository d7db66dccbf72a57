"""Operators of Triton's interpreter as one call of numpy each, with the same results.

Triton checks and casts both operands, copies them to the shape of the result and computes integers once more in int64,
for a check of overflows that is off in the interpreter. Numpy broadcasts by itself, so nothing of this is needed where
both operands have the same dtype. All other operands go to Triton's own methods.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

FLOATS, SIGNED, UNSIGNED = ("fp32", "fp64"), ("int32", "int64"), ("uint32", "uint64")
INTEGERS, NUMBERS = SIGNED + UNSIGNED, FLOATS + SIGNED + UNSIGNED
OPERATIONS = {
    "add": (np.add, NUMBERS), "sub": (np.subtract, NUMBERS), "mul": (np.multiply, NUMBERS),
    "truediv": (np.divide, FLOATS), "mod": (np.fmod, SIGNED),
    "floordiv": (lambda x, y: (x - np.fmod(x, y)) // y, SIGNED),
    "and": (np.bitwise_and, (*INTEGERS, "int1")), "or": (np.bitwise_or, (*INTEGERS, "int1")),
    "xor": (np.bitwise_xor, INTEGERS), "rshift": (np.right_shift, UNSIGNED),
}  # fmt: skip
REFLECTED = ("add", "sub", "mul", "truediv")
COMPARISONS = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


def patch() -> None:
    """Adds the operators to what a launch changes in Triton's language."""
    patch_language, changes = interpreter._patch_lang, []

    def patch_language_and_operators(function):
        scope = patch_language(function)
        if not changes:
            changes.extend(_changes())
        for change in changes:
            scope.set_attr(*change)
        return scope

    interpreter._patch_lang = patch_language_and_operators


def _changes() -> list[tuple]:
    """Returns owner, name and new function of each change. The language has Triton's own functions at this time."""
    methods = {f"__{name}__": _comparison(operation) for name, operation in COMPARISONS.items()}
    methods |= {f"__{name}__": _operator(*row) for name, row in OPERATIONS.items()}
    methods |= {f"__r{name}__": _operator(*OPERATIONS[name], is_reflected=True) for name in REFLECTED}
    methods["__getitem__"] = _with_new_axes
    changes = [(tl.tensor, name, _or_tritons(getattr(tl.tensor, name), method)) for name, method in methods.items()]
    return [*changes, (tl, "where", _or_tritons(tl.where, _where))]


def _or_tritons(tritons, ours):
    """Returns a function that calls ``ours``, and Triton's function where ours returns None."""

    def call(*args, **kwargs):
        result = None if kwargs else ours(*args)
        return tritons(*args, **kwargs) if result is None else result

    return call


def _operator(operation, dtypes, is_reflected=False):
    def compute(tensor, other):
        dtype = tensor.dtype
        other = other if isinstance(other, tl.tensor) else _constant(other, dtype)
        if other is None:
            return None
        if other.dtype.name != dtype.name:
            if operation is np.add and dtype.is_ptr() and other.dtype.name in SIGNED:
                handle = interpreter.interpreter_builder.create_addptr(tensor.handle, other.handle)
                return _tensor(handle, dtype, tensor, other)
            if not (other.dtype.name in SIGNED and dtype.name in SIGNED):
                return None
            dtype = tl.int64
        if dtype.name not in dtypes:
            return None
        left, right = (other.handle, tensor.handle) if is_reflected else (tensor.handle, other.handle)
        kept = dtype if dtype is tl.int64 else tensor.handle.dtype
        return _tensor(TensorHandle(operation(left.data, right.data), kept), dtype, tensor, other)

    return compute


def _comparison(operation):
    def compare(tensor, other):
        dtype = tensor.dtype
        is_number = type(other) is int and dtype.name in SIGNED
        other = _constant(other, dtype) if is_number else interpreter.interpreter_semantic.to_tensor(other)
        if other is None or not (other.dtype.name == dtype.name in NUMBERS):
            return None
        return _tensor(TensorHandle(operation(tensor.handle.data, other.handle.data), dtype), tl.int1, tensor, other)

    return compare


def _where(condition, x, y):
    tensor = x if isinstance(x, tl.tensor) else y
    if not (isinstance(tensor, tl.tensor) and isinstance(condition, tl.tensor) and condition.dtype.name == "int1"):
        return None
    x, y = (value if isinstance(value, tl.tensor) else _constant(value, tensor.dtype) for value in (x, y))
    if x is None or y is None or x.dtype.name != y.dtype.name:
        return None
    handle = interpreter.interpreter_builder.create_select(condition.handle, x.handle, y.handle)
    return _tensor(handle, x.dtype, condition, x, y)


def _with_new_axes(tensor, slices):
    is_axis = lambda index: index is None or (type(index) is slice and index == slice(None))
    if not (tensor.type.is_block() and isinstance(slices, tuple) and all(map(is_axis, slices))):
        return None
    return _tensor(TensorHandle(tensor.handle.data[slices], tensor.handle.dtype), tensor.dtype, tensor)


_constants, _blocks = {}, {}


def _constant(number, dtype: tl.dtype) -> tl.tensor | None:
    """Returns a scalar, or None if Triton computes the number in another dtype."""
    number = number.value if isinstance(number, tl.constexpr) else number
    key = name, number = dtype.name, number
    if type(number) is int and name in INTEGERS:
        is_of_dtype = -(2**31) * (name in SIGNED) <= number < 2 ** (31 + (name in UNSIGNED))
    else:
        is_of_dtype = type(number) in (int, float) and name in FLOATS
    if is_of_dtype and key not in _constants:
        _constants[key] = tl.tensor(
            TensorHandle(np.array([number or 0], interpreter._get_np_dtype(dtype)), dtype), dtype
        )
    return _constants[key] if is_of_dtype else None


def _tensor(handle: TensorHandle, dtype: tl.dtype, *operands: tl.tensor) -> tl.tensor:
    """Returns the tensor of a result, which is a scalar if all operands are."""
    if any(operand.type.is_block() for operand in operands):
        key = dtype.name, handle.data.shape
        if key not in _blocks:
            _blocks[key] = tl.block_type(dtype, list(handle.data.shape))
        dtype = _blocks[key]
    return tl.tensor(handle, dtype)
