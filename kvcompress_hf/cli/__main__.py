"""`python -m kvcompress_hf.cli` is the same as the `kvcompress` command."""

import sys

from . import main

sys.exit(main())
