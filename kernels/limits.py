"""Constants shared by the kernels and the code around them. This module does not import Triton."""

LARGEST_RANK = 256  # largest adapter rank on either backend
LARGEST_SCALORA_RANK = 128  # largest rank of ScaLoRA's system in the kernels; the torch twin takes any rank
OLDEST_ARCH = 80  # oldest supported GPU: 10 · major + minor of its compute capability
PHILOX_ROUNDS = 7  # rounds of the generator that draws dropout masks and stochastic roundings
SOLVERS = ("nnls", "paper", "column", "scalar")  # solvers of ScaLoRA's scales
ROUNDINGS = ("nearest", "stochastic", "compensated")  # how a merge rounds a 16-bit weight
INACTIVE = (
    1e-12  # share of its block's largest diagonal entry below which a coordinate of ScaLoRA's system keeps scale 1
)
COLLINEAR = 1e-6  # relative determinant below which ScaLoRA's one α and one β are not independent
RIDGE = 1e-7  # added to the unit diagonal of ScaLoRA's system
MUON_DAMPING_ULPS = 16  # smallest damping of LoRA-Muon's Grams, in units of ε · trace, which is their rounding error
