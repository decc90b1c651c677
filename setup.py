"""Compiles the CPU kernels where a compiler is at hand; everything else is said in pyproject.toml.

The kernels are a plain shared library (famba/ops/native/src/interface.h), loaded at run time, that knows neither torch
nor Python: one build serves all releases of both. Without a compiler the installation succeeds, and what went wrong is
left for `famba doctor` to tell.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

FOLDER = "famba/ops/native"
LIBRARY = f"{FOLDER}/libfamba_kernels.so"
FAILURE = f"{FOLDER}/build_failure.txt"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]

# Instruction set, lanes and flags. In rising order, which the linker keeps: of an inline function that several of them
# hold it takes the first, which every processor can run.
PORTABLE = ("portable", 4, [])
X86 = [
    ("avx2", 8, ["-mavx2", "-mfma", "-mtune=haswell"]),
    ("avx512", 16, ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]),
]


class BuildKernels(build_ext):
    """One object for each instruction set, linked into a shared library."""

    def run(self) -> None:
        """Build; where that fails, leave the reason in place of the library."""
        root = Path() if self.inplace or self.editable_mode else Path(self.build_lib)
        target, failure = root / LIBRARY, root / FAILURE
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in (target, failure):
            old.unlink(missing_ok=True)
        try:
            self._build(target)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("FAMBA_REQUIRE_KERNELS"):
                raise
            failure.write_text(f"the kernels could not be compiled at installation: {_reason(error)}\n")
            print(f"warning: {failure.read_text().strip()}", file=sys.stderr)  # noqa: T201

    def _build(self, target: Path) -> None:
        compiler = os.environ.get("CXX", "c++").split()
        extra = os.environ.get("CXXFLAGS", "").split()
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        dispatch = folder / "dispatch.o"
        define = ["-DFAMBA_X86"] if is_x86 else []
        jobs = [([*define, "-c", f"{FOLDER}/src/dispatch.cpp"], dispatch)]
        for name, lanes, flags in [PORTABLE, *(X86 if is_x86 else [])]:
            named = [f"-DFAMBA_ISA={name}", f"-DFAMBA_LANES={lanes}", *flags]
            jobs.append(([*named, "-c", f"{FOLDER}/src/kernels.cpp"], folder / f"{name}.o"))
        running = [_start([*compiler, *FLAGS, *extra, *command, "-o", str(out)]) for command, out in jobs]
        _finish(running)
        objects = [str(out) for _, out in jobs]
        _finish([_start([*compiler, *extra, "-shared", "-o", str(target), *objects, "-pthread", "-ldl"])])

    def get_source_files(self) -> list[str]:
        """List the files of the source distribution."""
        return [str(path) for path in sorted(Path(FOLDER, "src").iterdir())]

    def get_outputs(self) -> list[str]:
        """List the files of the wheel."""
        built = [Path(self.build_lib, name) for name in (LIBRARY, FAILURE)]
        return [str(path) for path in built if path.exists()]


class PlatformWheel(bdist_wheel):
    """A wheel for any Python on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3, no ABI, this platform."""
        return "py3", "none", super().get_tag()[2]


class EditableWheel(editable_wheel):
    """Put the checkout on Python's path, where `famba.configs` is not needed.

    Otherwise setuptools would install a finder, which Python asks last: a script beside a clone that is called famba
    would find that folder, as a package without anything in it.
    """

    def finalize_options(self) -> None:
        """Leave the simple layout that setuptools installs as a path."""
        packages = [name for name in self.distribution.packages or [] if not name.startswith("famba.configs")]
        self.distribution.packages, self.distribution.package_dir = packages, {"": "."}
        super().finalize_options()


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: S603


def _finish(processes: list[subprocess.Popen[str]]) -> None:
    """Wait for all, then raise CalledProcessError for the first that failed; show warnings of the others."""
    said = [process.communicate() for process in processes]
    for process, (out, error) in zip(processes, said, strict=True):
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args, out, error)
        sys.stderr.write(error)


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    """Say in one line what went wrong: the first error of the compiler, or its first line."""
    said = getattr(error, "stderr", None) or getattr(error, "stdout", None) or str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [str(error)]
    return next((line for line in lines if "error" in line.lower()), lines[0])


setup(
    ext_modules=[Extension("famba.ops.native.libfamba_kernels", sources=[f"{FOLDER}/src/kernels.cpp"])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel, "editable_wheel": EditableWheel},
)
