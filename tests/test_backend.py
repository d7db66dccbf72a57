"""The two modules of a family of ops, kernels and torch twins, have the same functions with the same arguments."""

import functools
import inspect
import itertools
import time

import pytest
from together import run_together

from lora_fast import backend


@pytest.mark.parametrize("family", ["linear", "pairs", "cayley"])
def test_families_have_the_same_functions_and_signatures(family):
    kernels, twins = (backend.load_ops(family, triton) for triton in (True, False))
    assert sorted(kernels.__all__) == sorted(twins.__all__)
    for name in kernels.__all__:
        arguments = [
            [(p.name, p.default) for p in inspect.signature(getattr(module, name)).parameters.values()]
            for module in (kernels, twins)
        ]
        assert arguments[0] == arguments[1], name


def test_overlapping_blocks_leave_the_backend_from_before_them():
    """The block that began last holds, in whichever order the blocks of several threads end."""
    before = backend.chosen()
    for order in itertools.permutations(range(3)):
        blocks = [backend.set_backend(name) for name in ("torch", "triton", "torch")]
        for block in blocks:
            block.__enter__()
        running = {0: "torch", 1: "triton", 2: "torch"}
        for i in order:
            assert backend.chosen() == running[max(running)]
            blocks[i].__exit__(None, None, None)
            del running[i]
        assert backend.chosen() == before


def test_blocks_of_many_threads_leave_the_backend_from_before_them():
    def run(name: str) -> None:
        for _ in range(1000):
            with backend.set_backend(name):
                time.sleep(0)  # lets another thread run
                assert backend.chosen() in ("torch", "triton")

    with backend.set_backend("auto"):
        run_together(*[functools.partial(run, name) for name in ("torch", "triton", "torch", "triton")])
        assert backend.chosen() == "auto"


def test_call_that_is_no_block_is_permanent():
    with backend.set_backend("auto"):
        for name in ("torch", "triton"):
            backend.set_backend(name)
            assert backend.chosen() == name
        with backend.set_backend("torch"):
            assert backend.chosen() == "torch"
        assert backend.chosen() == "triton"
        assert len(backend._alive()) == 1, "settings of calls that are no blocks are not held"
