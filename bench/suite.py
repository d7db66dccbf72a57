"""The suite's ops, and the tests that must be green before an op's numbers are taken.

An op is a file of its name beside this one, with ``cases(scale)`` and ``build(case, setting)``.
"""

import importlib
from types import ModuleType

import torch
from measure import Setting
from shapes import Case, Scale

LAYER = ("tests/test_layer.py::test_gradcheck", "tests/test_layer.py::test_same_mask_in_forward_and_backward")
# op → pytest node ids: of the torch twins, of the kernels (run natively where there is a GPU, else interpreted)
TESTS: dict[str, tuple[str, ...]] = {
    "project": (*LAYER, "tests/test_kernels.py::test_few_tokens"),
    "linear": (*LAYER, "tests/test_kernels.py::test_few_tokens"),
    "grads": (*LAYER, "tests/test_kernels.py::test_only_what_is_needed"),
    "layer": (*LAYER, "tests/test_kernels.py::test_error_budget[0]"),
    "gram": ("tests/test_step_kernels.py::test_subsets_of_grams",),
    "solve": ("tests/test_step.py::test_spd_solve_by_lapacks_ratio", "tests/test_step.py::test_small_inverse"),
    "hadamard": ("tests/test_step.py::test_nnls_is_the_optimum", "tests/test_hadamard_kernels.py::test_theorem_3"),
    "cayley": ("tests/test_cayley.py::test_is_the_formula", "tests/test_cayley.py::test_within_the_error_budget"),
    "step": (
        "tests/test_optim.py::test_plain_is_torchs_fused_adamw_to_the_bit",
        "tests/test_step_kernels.py::test_step_is_torchs_adamw",
    ),
    "merge": (
        "tests/test_step.py::test_scaling_leaves_the_effective_weight",
        "tests/test_step_kernels.py::test_merge_of_every_rank",
    ),
}
OPS = tuple(TESTS)


def module(op: str) -> ModuleType:
    return importlib.import_module(op)


def cases(ops: tuple[str, ...], scale: Scale) -> list[Case]:
    return [case for op in ops for case in module(op).cases(scale)]


def here() -> Setting:
    """A GPU with our kernels, or the CPU with their torch twins."""
    cuda = torch.cuda.is_available()
    return Setting(torch.device("cuda" if cuda else "cpu"), cuda)
