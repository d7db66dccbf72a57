"""Constants that the kernels and the code around them share, readable without Triton."""

LARGEST_RANK = 256  # of an adapter, on either backend
LARGEST_SCALORA_RANK = 128  # of ScaLoRA's system in the kernels; the torch twin takes any rank
OLDEST_ARCH = 80  # of a GPU, as 10 · major + minor of its compute capability
PHILOX_ROUNDS = 7  # of the generator that draws dropout masks and stochastic roundings
SOLVERS = ("nnls", "paper", "column", "scalar")  # of ScaLoRA's scales
ROUNDINGS = ("nearest", "stochastic", "compensated")  # of a 16-bit weight after a merge
INACTIVE = 1e-12  # of the largest diagonal entry of its block: a coordinate of ScaLoRA's system below keeps scale 1
COLLINEAR = 1e-6  # relative determinant below which ScaLoRA's one α and one β are not independent
RIDGE = 1e-7  # added to the unit diagonal of ScaLoRA's system
MUON_DAMPING_ULPS = 16  # least damping of LoRA-Muon's Grams, in units of ε times their trace: their rounding
