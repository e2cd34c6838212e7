"""Runs pytest on a native library built with sanitizers; `test_sanitizer.py` and `make sanitize` start it.

python sanitized.py <library> [pytest arguments]
"""

import sys
from pathlib import Path

import pytest

from kvcompress_hf.kernels import library

chosen = Path(sys.argv[1])
library.library_path = lambda: chosen
raise SystemExit(pytest.main(sys.argv[2:]))
