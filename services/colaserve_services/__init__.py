"""The services of colaserve: stages, coordinator, gateway, training and benchmarks."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("colaserve")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"
