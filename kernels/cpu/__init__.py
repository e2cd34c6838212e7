"""The CPU backend: C++ behind a plain C ABI, called through ctypes."""

from .backend import CpuBackend, instruction_sets

__all__ = ["CpuBackend", "instruction_sets"]
