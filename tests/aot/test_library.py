"""The ahead-of-time library builds and passes its own tests (ctest: contents, launches against Python's, the example),
and another CMake project finds it. It is built for one arch and one rank with some ops; make aot builds all."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MISSING = [program for program in ("cmake", "ctest", "cc") if shutil.which(program) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")

CONSUMER = """
cmake_minimum_required(VERSION 3.20)
project(engine LANGUAGES C)
find_package(lora_fast 0.1 REQUIRED)
add_executable(engine engine.c)
target_link_libraries(engine PRIVATE lora_fast::lora_fast)
"""
ENGINE = """
#include <lora_fast.h>
#include <stdio.h>
int main(void) {
    lora_fast_layer layer = {.r = 0};
    puts(lora_fast_error_name(lora_fast_project(&layer, NULL, NULL, NULL, NULL)));
    return 0;
}
"""


def run(*command: str | Path) -> str:
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, f"{process.stdout[-4000:]}\n{process.stderr[-4000:]}"
    return process.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("aot")
    choices = ["-DLORA_FAST_ARCHS=90", "-DLORA_FAST_RANKS=16"]
    choices += ["-DLORA_FAST_OPS=project;linear;grad_s_b;grad_a;grad_x;gram;small_inverse;adamw_step"]
    run("cmake", "-S", ROOT, "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}", *choices)
    run("cmake", "--build", folder)
    return folder


def test_library_passes_its_own_tests(built):
    output = run("ctest", "--test-dir", built, "--output-on-failure", "--verbose")
    assert "100% tests passed" in output
    assert "sm_90: " in output and "launches as from Python" in output


def test_library_is_found_by_another_project(built, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER)
    (tmp_path / "engine.c").write_text(ENGINE)
    run("cmake", "--install", built, "--prefix", tmp_path / "installed")
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}")
    run("cmake", "--build", tmp_path / "build")
    assert run(tmp_path / "build" / "engine").strip() == "LORA_FAST_BAD_ARGUMENT"
