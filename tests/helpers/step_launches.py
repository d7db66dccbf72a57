"""The launches of a step of each method, by name."""

from lora_fast import methods as M

SCALING = ["gram", "scalora_solve", "scales", "merge", "step"]
LAUNCHES = {
    "plain": ([], ["step"]),
    "lora+": ([M.LoRAPlus()], ["step"]),
    "scaled adamw": ([M.ScaledAdamW()], ["gram", "spd_solve", "step"]),
    "scale-reg": ([M.ScaleReg()], ["gram", "scale_reg", "step"]),
    "ilora": ([M.ILoRA()], ["step", "imbalance", "transform"]),
    "pilora": ([M.PiLoRA()], ["gram", "spd_solve", "step", "imbalance", "transform"]),
    "scalora": ([M.ScaLoRA(kappa=1.0, interval=1)], SCALING),
    "scalora between": ([M.ScaLoRA(kappa=1.0, interval=100)], ["step"]),
    "balora": ([M.BaLoRA()], ["step", "transform"]),
    "ref-lora": ([M.RefLoRA()], ["gram", "step"]),
    "lora-muon": ([M.LoRAMuon()], ["momentum", "gram", "muon", "move"]),
}
