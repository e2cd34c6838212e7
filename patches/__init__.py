"""How a model is switched to the compressed cache, and back."""

from kvcompress_hf.patches.core import is_patched, last_run_report, patch, patched, unpatch
from kvcompress_hf.patches.prefill import prefill

__all__ = ["is_patched", "last_run_report", "patch", "patched", "prefill", "unpatch"]
