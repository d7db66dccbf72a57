"""``--method``: parsing of choices, and the bounds of nb-lora."""

from lora_fast import methods
from lora_fast.cli.inputs.method_options import read, with_bounds


def test_read_turns_options_into_hyperparameters():
    assert read("ilora:lam=0.5, rho_scale=2").instances == (methods.ILoRA(lam=0.5, rho_scale=2),)
    assert read("balora:gauge=svd,every=3").instances == (methods.BaLoRA(gauge="svd", every=3),)
    assert read("scale-reg:decoupled=true").instances == (methods.ScaleReg(decoupled=True),)
    assert read("scalora:limit=none,kappa=2").instances == (methods.ScaLoRA(limit=None, kappa=2),)
    assert (read("lora:lr=3e-4").instances, read("lora:lr=3e-4").lr, read("lora").lr) == ((), 3e-4, None)


def test_with_bounds_fills_every_nb_lora_without_its_own():
    given = ("lora", "nb-lora", "nb-lora:norm=spectral", "nb-lora:lr=0.1,bound_ratio=0.5")
    assert with_bounds(given, "frobenius", 2.0, None) == (
        "lora",
        "nb-lora:norm=frobenius,bound=2.0",
        "nb-lora:norm=spectral,bound=2.0",
        "nb-lora:lr=0.1,bound_ratio=0.5,norm=frobenius",
    )
    assert with_bounds(given, None, None, None) == given
