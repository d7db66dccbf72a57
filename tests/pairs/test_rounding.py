"""Stochastic rounding, the twin and the kernels': its random numbers against Random123's and an implementation in
integers, its expectation over every value of the noise, and the noise of a step on both backends."""

import numpy
import pytest
import roundings
import torch
from launching import DEVICE

from lora_fast.kernels import pointer_table
from lora_fast.kernels.pairs import adamw, transform
from lora_fast.ops.reference import rounding

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
BOTH = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
ONES = 0xFFFFFFFF
KNOWN = [  # Random123's kat_vectors, philox4x32 with 7 rounds: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((ONES,) * 4, (ONES, ONES), (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_known_answers(counter, key, words):
    assert tuple(int(word) for word in roundings.philox(counter, key)) == words
    state = numpy.asarray(counter, dtype=numpy.uint64)
    if counter[0] == counter[1] == 0:  # of the two words that the twin counts by itself it gives the first ones only
        numbers = rounding.noise(0, 1, 8, int(state[2]), int(state[3]))[0].tolist()
        assert numbers == [half for word in words for half in (word & 0xFFFF, word >> 16)]


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 8), (5, 16), (2, 33), (1, 1000)])
def test_noise_is_that_of_the_integers(rows, columns):
    for key, step, word3 in ((0, 1, 0), (0xDEADBEEF, 7, 1), (ONES, 2**24, 0), ((5 << 32) + 3, ONES, 1)):
        want = roundings.noise(key, rows, columns, step, word3)
        assert torch.equal(rounding.noise(key, rows, columns, step, word3), want)
    keys, steps = torch.tensor([3, 2**32 - 1]), torch.tensor([1, 9])
    together = rounding.noise(keys, rows, columns, steps, 1)
    for i in range(2):
        assert torch.equal(together[i], roundings.noise(int(keys[i]), rows, columns, int(steps[i]), 1))


SMALLEST = {BFLOAT16: 2.0**-133, FLOAT16: 2.0**-24}


def samples(dtype):
    """Returns float32 numbers between neighbours of dtype: normal, subnormal, at a power of two, close to the largest,
    of both signs. The parts below a unit of dtype are multiples of the noise's unit."""
    unit, tiny = 2.0 ** -roundings.MANTISSA[dtype], SMALLEST[dtype]
    least = 2.0 ** roundings.LEAST_EXPONENT[dtype]
    largest = torch.finfo(dtype).max
    values = [1 + 0.37 * unit, 1.5 + 0.999 * unit, 2 - 2.0**-23, 2 - 0.25 * unit, 1 + 2.0**-23, 3e4, 0.1, 1e-3]
    values += [least * (1 + 0.3 * unit), least - 0.25 * tiny, 0.25 * tiny, 7.625 * tiny, largest * (1 - 0.3 * unit)]
    x = torch.tensor(values, dtype=torch.float64).float()
    return torch.cat([x, -x])


@BOTH
def test_expectation_over_all_noise_is_exact_and_results_are_neighbours(dtype):
    """The numbers are every value of the bits that the cast drops, so the mean of the results is their expectation."""
    x = samples(dtype)
    numbers = torch.arange(2**16)
    used = 2 ** roundings.DROPPED[dtype]
    for value in x:
        results = rounding.round_stochastic(value.expand(len(numbers)), numbers, dtype).double()
        exact = value.double()
        assert results[:used].mean() == exact == results.mean(), f"{value.item()!r}"
        unit = roundings.spacing(exact, dtype)
        down = torch.floor(exact.abs() / unit) * unit * exact.sign()
        up = down + unit * exact.sign()
        assert set(results.tolist()) <= {down.item(), up.item()}
        assert torch.equal(results, roundings.to_neighbour(exact.expand(len(numbers)), dtype, numbers))


@BOTH
def test_numbers_of_the_dtype_and_numbers_that_are_not_finite_stay(dtype):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)  # all of them
    for number in (0, 1, 2**13 - 1, 2**16 - 1):
        numbers = torch.full(bits.shape, number)
        got = rounding.round_stochastic(bits.float(), numbers, dtype)
        assert torch.equal(got[~bits.isnan()], bits[~bits.isnan()]) and got[bits.isnan()].isnan().all()


@BOTH
def test_a_result_beyond_the_largest_number_is_infinite(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest * (1 + 2.0 ** -(roundings.MANTISSA[dtype] + 3))])
    for sign in (1, -1):
        assert rounding.round_stochastic(sign * x, torch.tensor([0]), dtype).item() == sign * largest
        assert rounding.round_stochastic(sign * x, torch.tensor([2**16 - 1]), dtype).item() == sign * float("inf")


# ---- The kernels

RANKS, LENGTHS = [1, 3, 8, 16, 33], [70, 9, 33, 5, 40]


def factors(dtype, seed=0):
    """Returns factors of every rank, a and b in turn, with gradients and zero moments."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    is_a = [i % 2 == 0 for i in range(len(RANKS))]
    shapes = [(r, d) if side else (d, r) for r, d, side in zip(RANKS, LENGTHS, is_a, strict=True)]
    p, g = ([draw(*shape).to(dtype).to(DEVICE) for shape in shapes] for _ in range(2))
    return p, g, [torch.zeros_like(x, dtype=FLOAT32) for x in p], [torch.zeros_like(x, dtype=FLOAT32) for x in p], is_a


KEYS = [0, 5, 2**32 - 1, 123456789, 2**31]


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("gram", [False, True], ids=["flat", "rows"])
def test_step_kernel_draws_the_numbers_of_each_element(dtype, gram):
    """The learning rate is 0 and the parameters, in 16 bits, are scaled by what makes them no 16-bit numbers: by weight
    decay. What is rounded is p (1 − η w), which float32 computes in one rounding."""
    p, g, m, v, is_a = factors(dtype)
    before = [x.clone() for x in p]
    hyper = torch.tensor([[2.0**-10, 0.9, 0.999, 1e-8, 1.0]] * len(p), dtype=torch.float64, device=DEVICE)
    for x in g:
        x.zero_()
    steps = torch.tensor([0.0, 1.0, 9.0, 999.0, 2.0**24 - 2], device=DEVICE)
    keys = torch.tensor(KEYS, device=DEVICE)
    work = adamw.StepWork(gram=gram, keys=keys)
    adamw.step_(list(zip(p, g, m, v, strict=True)), is_a, hyper, steps, work)
    for i, (x, old) in enumerate(zip(p, before, strict=True)):
        exact = (old.float().cpu() * torch.tensor(1 - 2.0**-10)).double()
        arguments = KEYS[i], int(steps[i]), 0
        if not gram:
            numbers = roundings.noise(KEYS[i], 1, x.numel(), *arguments[1:]).view(x.shape)
        elif is_a[i]:
            numbers = roundings.noise(KEYS[i], *x.shape[::-1], *arguments[1:]).T
        else:
            numbers = roundings.noise(KEYS[i], *x.shape, *arguments[1:])
        want = roundings.to_neighbour(exact, dtype, numbers)
        assert torch.equal(x.cpu().double(), want), f"factor {i} of rank {RANKS[i]}"


@pytest.mark.gpu
@BOTH
def test_transform_kernel_draws_the_numbers_of_each_element(dtype):
    """p += M p with M = 2⁻¹⁰ I, which float32 computes exactly."""
    p, *_, is_a = factors(dtype)
    before, r_max = [x.clone() for x in p], max(RANKS)
    matrices = torch.eye(r_max, device=DEVICE).expand(len(p), -1, -1).contiguous() * 2.0**-10
    steps = torch.tensor([1.0, 2.0, 10.0, 1000.0, 2.0**24 - 1], device=DEVICE)
    tables = pointer_table.build_tables([p], is_a, range(len(p)))
    noise = transform.Noise(steps, torch.tensor(KEYS, device=DEVICE))
    transform.transform_tables_(tables, matrices, 0, True, noise)
    for i, (x, old) in enumerate(zip(p, before, strict=True)):
        exact = old.cpu().double() * (1 + 2.0**-10)
        shape = x.shape[::-1] if is_a[i] else x.shape
        numbers = roundings.noise(KEYS[i], *shape, int(steps[i]), 1)
        want = roundings.to_neighbour(exact, dtype, numbers.T if is_a[i] else numbers)
        assert torch.equal(x.cpu().double(), want), f"factor {i} of rank {RANKS[i]}"


@BOTH
@pytest.mark.parametrize("word3", [0, 1])
def test_twin_rounds_factors_by_the_numbers_of_each_element(dtype, word3):
    generator = torch.Generator().manual_seed(0)
    keys, steps = torch.tensor([7, 2**32 - 1]), torch.tensor([3.0, 11.0])
    for is_a, shape in ((True, (3, 17)), (False, (17, 3)), (None, (17, 3)), (True, (33, 5)), (False, (1, 1))):
        x = torch.randn(2, *shape, generator=generator)
        got = rounding.round_factors(x, dtype, keys, steps, is_a, word3)
        for i in range(2):
            name = int(keys[i]), int(steps[i]), word3
            if is_a is None:
                numbers = roundings.noise(name[0], 1, x[i].numel(), *name[1:]).view(shape)
            else:
                numbers = roundings.noise(name[0], *(shape[::-1] if is_a else shape), *name[1:])
                numbers = numbers.T if is_a else numbers
            assert torch.equal(got[i].double(), roundings.to_neighbour(x[i].double(), dtype, numbers))
        assert torch.equal(rounding.round_factors(x, dtype, None, steps, is_a, word3), x.to(dtype))
