"""lsmlab: a sandboxed lab and test harness for Mandatory Access Control on Linux."""

__version__ = "0.1.0"
