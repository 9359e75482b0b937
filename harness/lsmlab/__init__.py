"""lsmlab: a sandboxed lab and test harness for Mandatory Access Control on Linux."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lsmlab")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
