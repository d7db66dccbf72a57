"""Seeds of random numbers. They come from where torch takes the numbers themselves, the device's default generator.

On a GPU, the seed is computed on the host from the generator's seed and offset, and the offset is advanced, so that
nothing is launched and nothing waits for the device. A checkpointed region that runs again draws the seeds of its first
run (``regions``). The generator is advanced in every run, because other draws of the region follow ours.
"""

from __future__ import annotations

import threading

import torch

from .. import checks, regions

SEEDS = 1 << 62
_CPU = torch.device("cpu")
_LOW = (1 << 64) - 1
_advancing = threading.Lock()


def check(seed: object) -> None:
    """Raises ArgumentError unless it is a seed."""
    if not (isinstance(seed, int) and 0 <= seed < SEEDS):
        raise checks.ArgumentError("seed", "an integer from 0 to 2**62 - 1", checks.shown(seed))


def draw(device: torch.device) -> int:
    """Returns a seed, from 0 to 2⁶²-1, of the device's default generator. In a checkpointed region that runs again it
    is the seed of the region's first run. It is not for a stream that a CUDA graph captures, which would repeat it."""
    if device.type == "cuda":
        seed = from_offset(torch.cuda.default_generators[device.index])
    else:
        seed = int(torch.randint(SEEDS, (), dtype=torch.int64, device=_CPU).item())
    return regions.same_again("seeds", lambda: seed) if regions.inside() else seed


def from_offset(generator: torch.Generator) -> int:
    """Returns a seed for the current offset of a GPU's generator, and advances the offset."""
    with _advancing:
        offset = generator.get_offset()
        generator.set_offset(offset + 4)  # a multiple of 4, as torch requires
    # The constants and the finaliser are those of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    z = generator.initial_seed() * 0xD1342543DE82EF95 + offset * 0x9E3779B97F4A7C15 & _LOW
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _LOW
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _LOW
    return (z ^ z >> 31) >> 2
