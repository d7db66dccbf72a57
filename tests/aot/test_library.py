"""The ahead-of-time library builds, passes its own tests (ctest), is installed and found by other projects, and runs
the C snippets of the pages. It is built for one arch and one rank with some ops; make aot builds all."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).resolve().parents[2]
HEADER = (ROOT / "aot" / "lora_fast.h").read_text(encoding="utf-8")
VERSION = ".".join(re.findall(r"#define LORA_FAST_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", HEADER))
CUDA = Path(triton.__file__).parent / "backends" / "nvidia" / "include"  # has cuda.h
ARCH = 90
OPS = "project;project_parts;linear;add_to_y;add_parts_to_y;grad_s_b;grad_a;add_to_dx;sum;batch_project;batch_add"
OPS_OF_ILORA = "project;linear;grad_s_b;grad_a;sum;adamw_step;imbalance;transform"
NOT_BUILT = {"adamw"}  # functions of snippets whose kernels take too long to compile here
NO_KERNEL = -5
MISSING = [program for program in ("cmake", "ctest", "cc", "c++", "nm", "pkg-config") if shutil.which(program) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")

CONSUMER = """
cmake_minimum_required(VERSION 3.20)
project(engine LANGUAGES C)
add_executable(engine engine.c)
{use}
"""
ENGINE = """
#include <lora_fast.h>
#include <stdio.h>
int main(void) {
    lora_fast_layer layer = {.size = sizeof layer, .r = 0};
    puts(lora_fast_error_name(lora_fast_project(&layer, NULL, NULL, NULL, NULL)));
    return 0;
}
"""
PRINT_PARTS = """
get_property(TARGETS DIRECTORY "${lora_fast_SOURCE_DIR}" PROPERTY BUILDSYSTEM_TARGETS)
get_directory_property(OPS DIRECTORY "${lora_fast_SOURCE_DIR}" DEFINITION LORA_FAST_OPS)
message(STATUS "targets: ${TARGETS}, ops: ${OPS}.")
"""
PRINTED = "LORA_FAST_BAD_ARGUMENT\n"


def run(*command: str | Path, **environment: str) -> str:
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert process.returncode == 0, f"{process.stdout[-4000:]}\n{process.stderr[-4000:]}"
    return process.stdout


def refused(*command: str | Path, **environment: str) -> str:
    """Returns what a command that fails prints, on one line."""
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert process.returncode != 0
    return " ".join((process.stdout + process.stderr).split())


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def configure(folder: Path, *choices: str) -> None:
    choices = (
        f"-DPython3_EXECUTABLE={sys.executable}",
        f"-DLORA_FAST_ARCHS={ARCH}",
        "-DCMAKE_BUILD_TYPE=Debug",
        *choices,
    )
    run("cmake", "-S", ROOT, "-B", folder, "-DLORA_FAST_RANKS=16", f"-DLORA_FAST_OPS={OPS}", *choices)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("aot")
    configure(folder)
    run("cmake", "--build", folder)
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The installed library, in another folder than it was installed to."""
    folder = tmp_path_factory.mktemp("installed")
    run("cmake", "--install", built, "--prefix", folder / "before")
    return (folder / "before").rename(folder / "after")


@pytest.fixture(scope="module")
def static(built, installed, tmp_path_factory) -> Path:
    """The static library, installed. Its kernels are those that were compiled before."""
    folder = tmp_path_factory.mktemp("static")
    configure(built, "-DBUILD_SHARED_LIBS=OFF", "-DLORA_FAST_BUILD_TESTS=OFF", "-DLORA_FAST_BUILD_EXAMPLES=OFF")
    run("cmake", "--build", built, "--target", "lora_fast")
    run("cmake", "--install", built, "--prefix", folder)
    return folder


def test_library_passes_its_own_tests(built):
    """``reference`` needs a GPU, ``ilora`` and ``methods`` other kernels."""
    output = run(
        "ctest", "--test-dir", built, "--output-on-failure", "--verbose", "--exclude-regex", "reference|ilora|methods"
    )
    assert "100% tests passed" in output
    assert re.search(rf"sm_{ARCH}: \d+ launches", output)


def test_example_trains_the_bits_that_python_trains(tmp_path):
    configure(tmp_path, "-DLORA_FAST_DTYPES=float32", f"-DLORA_FAST_OPS={OPS_OF_ILORA}")
    run("cmake", "--build", tmp_path, "--target", "lora_fast", "lora_fast_stub_cuda", "lora_fast_ilora_module")
    output = run("ctest", "--test-dir", tmp_path, "--output-on-failure", "--verbose", "--tests-regex", "^ilora$")
    assert "100% tests passed" in output and "Skipped" not in output


def test_library_exports_its_functions_alone(installed):
    symbols = run("nm", "-D", "--defined-only", "--format=posix", installed / "lib" / "liblora_fast.so")
    exported = {line.split()[0] for line in symbols.splitlines()}
    assert exported == set(re.findall(r"^LORA_FAST_API .*?(lora_fast_\w+)\(", HEADER, re.MULTILINE))


def test_installed_files_have_version_and_licence(installed):
    assert (installed / "share" / "licenses" / "lora_fast" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (installed / "include" / "lora_fast.h").read_text(encoding="utf-8") == HEADER
    assert (installed / "lib" / f"liblora_fast.so.{VERSION}").is_file()
    assert f"\nVersion: {VERSION}\n" in (installed / "lib" / "pkgconfig" / "lora_fast.pc").read_text()
    package = installed / "lib" / "cmake" / "lora_fast"
    assert f'set(PACKAGE_VERSION "{VERSION}")' in (package / "lora_fastConfigVersion.cmake").read_text()


def test_sources_name_their_licence():
    sources = [path for kind in ("*.c", "*.h", "*.in", "CMakeLists.txt") for path in (ROOT / "aot").rglob(kind)]
    sources += [ROOT / "CMakeLists.txt", *(ROOT / "aot").glob("*.py")]
    assert len(sources) > 15
    without = [
        path for path in sources if "SPDX-License-Identifier: Apache-2.0" not in path.read_text().partition("\n")[0]
    ]
    assert not without


def test_header_is_cpp(tmp_path):
    (tmp_path / "engine.cpp").write_text("#include <lora_fast.h>\nint main() { return lora_fast_version() == 0; }\n")
    flags = ("-std=c++11", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
    assert (
        run("c++", *flags, "-fsyntax-only", f"-I{ROOT / 'aot'}", tmp_path / "engine.cpp") == ""
    )  # run() checks the status


@pytest.mark.parametrize("library", ["installed", "static"])
def test_library_is_found_by_cmake(library, request, tmp_path):
    (use,) = (block for block in blocks("docs/engine.md", "cmake") if "find_package" in block)
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER.format(use=use))
    (tmp_path / "engine.c").write_text(ENGINE)
    prefix = request.getfixturevalue(library)
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", tmp_path / "build")
    assert run(tmp_path / "build" / "engine") == PRINTED


@pytest.mark.parametrize("library", ["installed", "static"])
def test_library_is_found_by_pkg_config(library, request, tmp_path):
    (line,) = (block for block in blocks("docs/engine.md", "sh") if "pkg-config" in block)
    prefix = request.getfixturevalue(library)
    (tmp_path / "engine.c").write_text(ENGINE)
    command = line.replace("--cflags", "--static --cflags") if library == "static" else line
    run("sh", "-c", f"cd {tmp_path} && {command}", PKG_CONFIG_PATH=str(prefix / "lib" / "pkgconfig"))
    assert run(tmp_path / "engine", LD_LIBRARY_PATH=str(prefix / "lib")) == PRINTED


def test_library_is_part_of_another_project(tmp_path):
    """It takes the project's choices and adds its library alone: no tests, no examples, no build type, no cached choice
    of shared libraries."""
    (use,) = (block for block in blocks("docs/engine.md", "cmake") if "FetchContent" in block)
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER.format(use=f"set(LORA_FAST_OPS scale_reg)\n{use}") + PRINT_PARTS)
    (tmp_path / "engine.c").write_text(ENGINE)
    choices = (f"-DFETCHCONTENT_SOURCE_DIR_LORA_FAST={ROOT}", f"-DPython3_EXECUTABLE={sys.executable}")
    output = run("cmake", "-S", tmp_path, "-B", tmp_path / "build", *choices)
    assert "targets: lora_fast, ops: scale_reg." in output
    cache = (tmp_path / "build" / "CMakeCache.txt").read_text()
    assert "BUILD_SHARED_LIBS" not in cache and "CMAKE_BUILD_TYPE:STRING=\n" in cache


def test_kernels_of_another_source_are_refused(tmp_path):
    copy = shutil.copytree(
        ROOT / "lora_fast", tmp_path / "lora_fast", ignore=shutil.ignore_patterns("__pycache__", "cli")
    )
    python = f"-DPython3_EXECUTABLE={sys.executable}"
    message = refused("cmake", "-S", ROOT, "-B", tmp_path / "build", python, PYTHONPATH=str(tmp_path))
    assert f"lora_fast: expected the kernels of {ROOT / 'lora_fast'}" in message and f"imports {copy}" in message
    message = refused(sys.executable, ROOT / "aot" / "build.py", "--out", tmp_path, PYTHONPATH=str(tmp_path))
    assert f"expected the package beside it, {ROOT / 'lora_fast'}, got {copy}" in message


@pytest.mark.parametrize("choice", ["ARCHS=80,86", "ARCHS=sm_80", "RANKS=", "RANKS=16 32"])
def test_choices_that_are_no_numbers_are_refused(choice, tmp_path):
    name, value = choice.split("=")
    message = refused(
        "cmake", "-S", ROOT, "-B", tmp_path, f"-DPython3_EXECUTABLE={sys.executable}", f"-DLORA_FAST_{choice}"
    )
    assert f"LORA_FAST_{name}: expected numbers with semicolons between them, got {value}".strip() in message


SNIPPETS = [
    pytest.param(code, id=f"{Path(page).stem}-{i}")
    for page in ("README.md", "docs/engine.md")
    for i, code in enumerate(blocks(page, "c"))
]


def calls(code: str) -> list[tuple[str, str]]:
    """Returns the name and a call of every function of a snippet that is not static. An array of numbers is zeros
    of its own, every other pointer is an address of addresses."""
    found = []
    for name, parameters in re.findall(r"^int (?!main)(\w+)\(([^)]+)\) \{", code, re.MULTILINE):
        arguments = []
        for i, parameter in enumerate(parameters.split(",")):
            is_array = "*" in parameter or "[" in parameter
            if "lora_fast_stream" in parameter:
                arguments.append("NULL")
            elif is_array:
                arguments.append(f"(void *)(zeros + {256 * i})" if "int32_t" in parameter else "(void *)addresses")
            else:
                arguments.append("16")
        found.append((name, f"{name}({', '.join(arguments)})"))
    return found


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_run(code, built, installed, tmp_path):
    """A program prints what its comments promise. Every function is called with the stub of the driver."""
    stub = built / "aot" / "tests" / "stub"
    source = code
    if "int main(" not in code:
        assert calls(code)
        lines = [f'    printf("{name} %d %s\\n", {call}, lora_fast_error_message());' for name, call in calls(code)]
        source += "\n".join([
            "#include <stdio.h>",
            "extern int stub_arch;",
            "int32_t zeros[4096];",
            "_Alignas(16) void *addresses[4096];",
            "int main(void) {",
            f"    stub_arch = {ARCH};",
            "    for (int i = 0; i < 4096; i++) addresses[i] = addresses;",
            *lines,
            "}",
        ])  # fmt: skip
    (tmp_path / "snippet.c").write_text(source)
    flags = ("-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{installed / 'include'}", "-isystem", CUDA)
    libraries = (f"-L{installed / 'lib'}", "-llora_fast", f"-L{stub}", "-l:libcuda.so.1")
    rpath = f"-Wl,-rpath,{installed / 'lib'}:{stub}"
    run("cc", *flags, tmp_path / "snippet.c", *libraries, rpath, "-o", tmp_path / "snippet")
    output = run(tmp_path / "snippet").splitlines()
    if source is code:
        assert output == re.findall(r"^ *printf\(.*\); +/\* (.+) \*/$", code, re.MULTILINE)
    for name, _ in calls(code):
        status = NO_KERNEL if name in NOT_BUILT else 0
        assert any(line.startswith(f"{name} {status} ") for line in output), output
