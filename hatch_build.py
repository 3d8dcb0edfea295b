"""Compiles what is in C when colaserve is built or installed, editable too. Without a compiler it works without."""

import os
import platform
import shlex
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS_IN = "services/colaserve_services/model/backend"

# cpu_kernels.c is compiled for each kind of CPU, and once more for the part that chooses among them at run time.
AVX512 = ("-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
KERNELS = {
    "x86_64": (
        (),
        ("-DPASS=plain",),
        ("-DPASS=avx2", "-mfma", "-mavx2"),
        ("-DPASS=avx512", *AVX512),
        ("-DPASS=bf16", *AVX512, "-mavx512bf16"),
        ("-DPASS=amx", *AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    ),
    "aarch64": ((), ("-DPASS=plain",)),
}


class CustomBuildHook(BuildHookInterface):
    """The wheel has the library in it, and then a platform's tag."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """`version`: the kind of wheel, "standard" or "editable"."""
        passes, library = KERNELS.get(platform.machine(), ()), Path(self.root, KERNELS_IN, "_cpu_kernels.so")
        try:
            if platform.system() != "Linux" or not passes:
                raise OSError("it is for Linux on x86-64 and 64-bit Arm")
            _compile(library.with_name("cpu_kernels.c"), library, passes)
        except (OSError, subprocess.CalledProcessError) as e:
            library.unlink(missing_ok=True)
            self.app.display_warning(f"without the compiled kernels, which make CPUs faster: {e}")
            return
        build_data["artifacts"].append(f"{KERNELS_IN}/{library.name}")
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _compile(source: Path, library: Path, passes: Iterable[tuple[str, ...]]) -> None:
    """Compiled first, then linked: linked with -fopenmp it would bring a second OpenMP beside torch's."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        linked, compiled = Path(folder, library.name), []
        for number, flags in enumerate(passes):
            compiled.append(str(Path(folder, f"{number}.o")))
            flags = ("-std=gnu11", "-O2", "-fno-math-errno", "-fPIC", "-fopenmp", *flags)
            subprocess.run([*compiler, *flags, "-c", str(source), "-o", compiled[-1]], check=True)
        subprocess.run([*compiler, "-shared", *compiled, "-o", str(linked)], check=True)
        linked.replace(library)  # at once: a running server may have the old one open
