"""Constants that the kernels share with the code around them. This module does not import Triton."""

LARGEST_RANK = 256  # largest rank of an adapter, on either backend
LARGEST_SCALORA_RANK = 128  # largest rank of ScaLoRA in the kernels; the torch twin has no limit
OLDEST_ARCH = 80  # oldest compute capability of a GPU, as 10 · major + minor
OLDEST_TRITON = 3, 6  # oldest release of Triton, the one that torch 2.10 was built for
PHILOX_ROUNDS = 7  # rounds of the generator of dropout masks and stochastic roundings
SOLVERS = ("nnls", "paper", "column", "scalar")  # solvers of ScaLoRA's scales
UPDATE, CORRECTION = 0, 1  # passes of a step that round the factors, which have different noise: AdamW, what follows it
ROUNDINGS = ("nearest", "stochastic", "compensated")  # roundings of a 16-bit weight after a merge
INACTIVE = 1e-12  # relative to its block's largest diagonal entry: a coordinate of ScaLoRA's system below keeps scale 1
COLLINEAR = 1e-6  # relative determinant below which ScaLoRA's scalar α and β are not independent
RIDGE = 1e-7  # added to the unit diagonal of ScaLoRA's system
MUON_DAMPING_ULPS = 16  # least damping of LoRA-Muon's Grams, in units of ε times their trace, for their rounding
