"""A portable Triton cache: filled on a machine without a GPU and used on a machine with one.

Triton keys a compiled kernel by its source, the options, the arch, ptxas, and a hash of Triton's own files. This hash
differs between builds of one version for two Pythons, which compile the same code, so it is replaced here by the
version. Before Triton 3.9 the hash of a kernel's source depends on the kernels that the process has compiled before,
because the globals of a called function are not yet known; this is corrected here. The cache folder belongs to one run,
so that no other program meets these keys. A group file contains the absolute paths of its members, so it is rewritten
where an archive is unpacked.

As a pytest plugin (``-p gpu_sections.compile_cache``) this module lets the tests use such a folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tarfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"
OWN_KEYS, STUB_ARCH = "LORA_FAST_GPU_CACHE", "LORA_FAST_STUB_ARCH"  # variables of a process's environment
if STUB_ARCH in os.environ:
    sys.path.insert(0, str(TESTS / "helpers"))
    import stub_driver

    stub_driver.load()  # before torch is imported

import torch  # noqa: E402

ARCH = 90  # of the kernels in the archive
MEBIBYTE = 1 << 20
GROUP = "__grp__"
EVERY = 15  # seconds between two lines that show progress
counts: Counter[str] = Counter()  # the "hits" and "misses" of this process


def environment(folder: Path) -> dict[str, str]:
    """Returns the environment variables with which a process compiles into the folder."""
    return {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1", OWN_KEYS: "1"}


def use() -> None:
    """Counts the cache hits of this process. In a run's own folder, it also switches to the portable keys."""
    import triton
    from triton import knobs
    from triton.runtime import cache, jit

    if OWN_KEYS in os.environ:
        if not hasattr(cache, "triton_key"):
            raise RuntimeError(f"Triton {triton.__version__}: triton.runtime.cache has no triton_key to replace")
        cache.triton_key = lambda: triton.__version__
        update_hash = jit.DependenciesFinder._update_hash

        def update_hash_in_order(self, called) -> None:
            _ = called.cache_key  # computing it collects the function's globals
            update_hash(self, called)

        jit.DependenciesFinder._update_hash = update_hash_in_order
    knobs.compilation.listener = _count


def _count(cache_hit: bool, **_) -> None:
    counts["hits" if cache_hit else "misses"] += 1


def pytest_runtest_teardown(item) -> None:
    """Ends a process of pytest-xdist whose device no longer works: a new process takes over its remaining tests."""
    if torch.cuda.is_initialized() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


def pytest_configure(config) -> None:
    use()
    if STUB_ARCH in os.environ:
        on_stub_driver()
        import budget

        budget.check = torch.testing.assert_close = lambda *values, **options: None  # the stub's values are undefined


def stub_environment(arch: int = ARCH) -> dict[str, str]:
    """Returns the environment variables with which a process uses the stub driver."""
    return {STUB_ARCH: str(arch), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def on_stub_driver() -> None:
    """Gives this process a stub device, on which neither our kernels nor torch's large products compute anything."""
    import stub_runs

    warnings.filterwarnings("ignore", message="CUDA initialization")  # torch warns that there is no driver
    stub_driver.install(int(os.environ[STUB_ARCH]))
    stub_runs.leave_products_out()
    # the pages of zeros cost nothing until they are written
    torch.randn = lambda *shape, generator=None, **options: torch.zeros(*shape, **options)


def test_environment() -> dict[str, str]:
    """Returns the environment with which pytest finds this plugin from any folder."""
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    paths = [str(Path(__file__).parents[1]), *(str(Path(path).absolute()) for path in given)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def compile_tests(processes: int) -> None:
    """Compiles the tests' launches by running the tests on the stub driver, where their failures mean nothing."""
    plugins = "-p gpu_sections.compile_cache -p no:cacheprovider"
    options = f"-q {plugins} -n {processes} --dist worksteal --tb no -W ignore".split()
    environment = {**test_environment(), **stub_environment()}
    cache, start = Path(os.environ["TRITON_CACHE_DIR"]), time.monotonic()
    command = [sys.executable, "-m", "pytest", *options, "-m", "gpu and not budget"]
    with subprocess.Popen(command, cwd=TESTS, env=environment, stdout=subprocess.DEVNULL) as tests:
        while tests.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                tests.wait(EVERY)
            kernels = sum(name.endswith(".cubin") for name in entries(cache))
            print(f"  tests, {time.monotonic() - start:.0f} s: {kernels} kernels in all", flush=True)


def entries(folder: Path) -> set[str]:
    """Returns the files of a cache, without sources and unfinished files."""
    files = {path.relative_to(folder) for path in folder.glob("*/*") if path.is_file() and path.suffix != ".source"}
    return {str(file) for file in files}


def pack(
    folder: Path, names: Iterable[str], archive: Path, most: float, preset: int = 6, seconds: float = math.inf
) -> list[str]:
    """Writes files of a cache to an archive of at most ``most`` MiB within about ``seconds``.

    A kernel's files are packed together or not at all.

    Returns:
        The names of the files that did not fit or were not reached in time.
    """
    from lora_fast.kernels import atomic_file

    left = []

    def fill(unfinished: Path) -> None:
        packed, end = sorted(names), time.monotonic() + seconds
        while True:
            with tarfile.open(unfinished, "w:xz", preset=preset) as tar:
                for i, name in enumerate(packed):
                    if time.monotonic() > end and (i == 0 or Path(name).parent != Path(packed[i - 1]).parent):
                        left.extend(packed[i:])
                        del packed[i:]
                        break
                    tar.add(folder / name, name)
            size = unfinished.stat().st_size / MEBIBYTE
            if size <= most or not packed:
                return
            keep, end = int(len(packed) * 0.9 * most / size), math.inf
            while keep and Path(packed[keep - 1]).parent == Path(packed[keep]).parent:
                keep -= 1
            left.extend(packed[keep:])
            del packed[keep:]

    atomic_file.write(archive, fill)
    return left


def unpack(archive: Path, folder: Path) -> tuple[int, int]:
    """Adds an archive's files to a cache.

    Returns:
        The number of kernels that this Triton can use, and the number that another version compiled.
    """
    import triton

    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
        files = [folder / member.name for member in tar.getmembers()]
    versions = Counter()
    for group in (file for file in files if file.name.startswith(GROUP)):
        members = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {member: str(group.parent / member) for member in members}}))
        versions[json.loads((group.parent / group.name.removeprefix(GROUP)).read_text())["triton_version"]] += 1
    return versions[triton.__version__], versions.total() - versions[triton.__version__]
