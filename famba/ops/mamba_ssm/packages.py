"""The packages mamba-ssm and causal-conv1d: which releases serve, and how the right one is installed.

Facts from the setup.py of mamba-ssm 2.2.5 to 2.3.2.post1 and of causal-conv1d 1.5.2 to 1.7.0, from the repositories
state-spaces/mamba and Dao-AILab/causal-conv1d, and from the workflows that publish their wheels:

- PyPI has their sources alone. Where a wheel for the torch, CUDA and Python at hand is published on GitHub, setup.py
  fetches it instead of compiling; build isolation would let it see another torch than the one that is installed.
- Of what PyPI holds before mamba-ssm 2.2.5 and causal-conv1d 1.5.2 nothing can be compiled: the sources are missing.
- From the release after mamba-ssm 2.3.2.post1 on the scan's extension is only built where MAMBA_KEEP_CUDA_BUILD=TRUE.
- mamba-ssm asks its compilers for C++17, which the headers of recent torch releases refuse.
- Their target architectures are fixed; TORCH_CUDA_ARCH_LIST has no effect.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

TRITON = "use backend 'triton', which needs nothing compiled"


@dataclass(frozen=True)
class Package:
    """A package with a CUDA extension.

    variables: what the names of its build's environment variables begin with. oldest, below: the releases that are
    supported, the second excluded. wheel: the release whose published wheels are known. source: the one to compile.
    """

    name: str
    extension: str
    variables: str
    oldest: str
    below: str
    wheel: str
    source: str

    def installed(self) -> str | None:
        """The version that is installed, None where none is."""
        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def supports(self, version: str) -> bool:
        """Whether its functions take the arguments that are known."""
        return numbers(self.oldest) <= numbers(version) < numbers(self.below)

    def is_opt_in(self, version: str) -> bool:
        """Whether a release leaves its extension out unless it is asked for."""
        return self is MAMBA_SSM and numbers(version) > numbers(self.source)

    def choose(self, known: str) -> str:
        """The version to install: the known one, or the newer one that is there."""
        version = self.installed()
        newer = version is not None and self.supports(version) and numbers(version) > numbers(self.source)
        return version if version and newer else known


MAMBA_SSM = Package("mamba-ssm", "selective_scan_cuda", "MAMBA", "2.2", "3", wheel="2.3.2.post1", source="2.3.2.post1")
CAUSAL_CONV1D = Package(
    "causal-conv1d", "causal_conv1d_cuda", "CAUSAL_CONV1D", "1.4", "2", wheel="1.6.1", source="1.7.0"
)
PACKAGES = (CAUSAL_CONV1D, MAMBA_SSM)


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version without its local part, in order: (2, 3, 2, 1) of 2.3.2.post1+cu12."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def remedy(packages: Sequence[Package]) -> str:
    """The command that installs what fits the torch and the CUDA at hand; where none can, what to use instead."""
    keep = {"MAMBA_KEEP_CUDA_BUILD": "TRUE"} if MAMBA_SSM in packages else {}
    if _has_wheels():
        return _chain(keep, [], [f"{p.name}=={p.choose(p.wheel)}" for p in packages])
    kit, cuda = toolkit(), torch.version.cuda or ""
    if kit is None or numbers(cuda)[:1] != (kit[1],):
        found = "no nvcc" if kit is None else f"the nvcc of CUDA {kit[1]} alone"
        return (
            f"no wheels are published for torch {torch.__version__} with Python {platform.python_version()}, and there "
            f"is {found} to compile for CUDA {cuda}, so {TRITON}"
        )
    # Without a forced build setup.py asks GitHub first, and dies where it is out of reach.
    forced = {f"{p.variables}_FORCE_BUILD": "TRUE" for p in packages}
    patches, sources = [], []
    for package in packages:
        version = package.choose(package.source)
        sources.append(f"{package.name}=={version}")
        if package is MAMBA_SSM and needs_cxx20():
            folder = f"./mamba_ssm-{version}"
            patches = [
                f"pip download --no-build-isolation --no-deps --no-binary mamba-ssm {sources.pop()}",
                f"tar -xzf {folder}.tar.gz",
                f"sed -i s/c++17/c++20/ {folder}/setup.py",
            ]
            sources.append(folder)
    return _chain(keep | forced | {"CUDA_HOME": str(kit[0])}, patches, sources)


def _chain(variables: dict[str, str], patches: Sequence[str], sources: Sequence[str]) -> str:
    """One line for a shell that stops at the first failure."""
    exported = [f"export {' '.join(f'{name}={value}' for name, value in variables.items())}"] if variables else []
    # Without build isolation setup.py needs its tools here; the last two are what mamba_ssm needs to be imported.
    tools = "pip install setuptools wheel ninja packaging einops transformers"
    # No dependencies: some of mamba-ssm's are pinned and serve other models, and torch itself would be put in anew.
    # No cache: pip would take out of it what was built for another torch.
    install = f"pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall {' '.join(sources)}"
    return " && ".join([*exported, tools, *patches, install])


def _has_wheels() -> bool:
    """Whether wheels are published for the torch, CUDA and Python at hand."""
    release = re.fullmatch(r"2\.(\d+)\.\d+(\+cu\d+)?", torch.__version__)
    if release is None or torch.version.cuda is None or platform.system() != "Linux":
        return False
    minor, cuda = int(release[1]), numbers(torch.version.cuda)[0]
    fits = cuda == 12 or (cuda == 11 and minor <= 7) or (cuda == 13 and minor >= 9)
    machine = platform.machine() == "x86_64" or (platform.machine() == "aarch64" and minor >= 7 and cuda > 11)
    return fits and machine and 6 <= minor <= 10 and (3, 10) <= sys.version_info[:2] <= (3, 13)


def needs_cxx20() -> bool:
    """Whether the headers of this torch refuse a compiler that is set to C++17."""
    header = Path(torch.__path__[0]) / "include" / "ATen" / "ATen.h"
    return header.is_file() and "C++20 or later" in header.read_text()


def toolkit() -> tuple[Path, int] | None:
    """Folder and major version of the CUDA toolkit with nvcc, as torch's build of extensions would look for it."""
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    found = [Path(nvcc).resolve().parents[1]] if nvcc else []
    for home in [*named, *found, Path("/usr/local/cuda")]:
        header = home / "include" / "cuda_runtime_api.h"
        if (home / "bin" / "nvcc").exists() and header.is_file():
            version = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"))
            if version is not None:
                return home, int(version[1]) // 1000
    return None
