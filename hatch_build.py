"""Compiles what is in C when colaserve is built or installed, editable too. Without a compiler it works without."""

import os
import platform
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MODEL = "services/colaserve_services/model"


class CustomBuildHook(BuildHookInterface):
    """The wheel has the library in it, and then a platform's tag."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """`version`: the kind of wheel, "standard" or "editable"."""
        folder = Path(self.root, MODEL)
        library = folder / "_cpu_attention.so"
        try:
            if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
                raise OSError("it is for Linux on x86-64")
            _compile(folder / "cpu_attention.c", library)
        except (OSError, subprocess.CalledProcessError) as e:
            library.unlink(missing_ok=True)
            self.app.display_warning(f"without the compiled attention, which makes CPUs with AVX512-BF16 faster: {e}")
            return
        build_data["artifacts"].append(f"{MODEL}/{library.name}")
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _compile(source: Path, library: Path) -> None:
    """In two steps: linked with -fopenmp it would bring a second OpenMP beside torch's."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, linked = Path(folder, "attention.o"), Path(folder, library.name)
        flags = ("-std=gnu11", "-O2", "-fPIC", "-fopenmp")
        subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(compiled)], check=True)
        subprocess.run([*compiler, "-shared", str(compiled), "-o", str(linked)], check=True)
        linked.replace(library)  # at once: a running server may have the old one open
