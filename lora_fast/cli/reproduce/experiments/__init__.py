"""Experiments of the methods' papers that can be repeated without a GPU and a network, one file each.

**To add an experiment**: write a file here with ``run(session: Session) -> Result`` (session.py, result.py), and add a
row to ``EXPERIMENTS``. Nothing else changes. session.py, result.py, finetunes.py and overhead.py are shared helpers.
"""

from __future__ import annotations

EXPERIMENTS = {  # name → module in this package, description
    "scalora-regression": (
        "scalora_regression",
        "ScaLoRA Fig. 1: linear regression by plain gradient descent, where LoRA of rank 8 stops at its floor.",
    ),
    "balora-factorisation": (
        "balora_factorisation",
        "BaLoRA: factorisation of a 20×20 matrix, at each method's best of 50 learning rates.",
    ),
    "ilora-overhead": ("ilora_overhead", "iLoRA Fig. 1: the time that its regulariser adds to a training step."),
    "scalora-overhead": (
        "scalora_overhead",
        "ScaLoRA Table 10: the time of a step over LoRA's, with scaling every 1 to 100 steps.",
    ),
    "scale-norms": (
        "scale_norms",
        "Scale regularization: ‖a‖, ‖b‖ and their ratio while SmolLM2 trains, by five methods.",
    ),
    "nb-lora-inverse": ("nb_lora_inverse", "NB-LoRA Table 6: the time of an r×r inverse, one by one and batched."),
    "nb-lora-rates": (
        "nb_lora_rates",
        "NB-LoRA Fig. 3: SmolLM2's held-out loss over learning rates up to 0.1, LoRA against NB-LoRA.",
    ),
    "smollm2-methods": ("smollm2_methods", "All methods on SmolLM2 at equal steps: loss curves and held-out loss."),
}
