"""Puts the generated code, which lies outside of this folder, into wheels; an editable install reads it where it is."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """`version`: the kind of wheel, "standard" or "editable"."""
        if version == "standard":
            build_data["force_include"][str(Path(self.root).parent / "protos" / "gen" / "colaserve")] = "colaserve"
