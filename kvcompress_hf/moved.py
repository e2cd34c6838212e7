"""Old import paths, kept for one release."""

import importlib
import sys
import warnings
from collections.abc import Iterable


def forward(old: str, new: str, submodules: Iterable[str] = ()) -> None:
    """Makes an old module path name the new one's modules, and warns.

    The modules are the very same objects under both names, so classes keep their identity.

    Args:
        old (`str`): Path that callers imported, e.g. `"kvcompress_hf.planning"`.
        new (`str`): Where its content is now, e.g. `"kvcompress_hf.plans"`.
        submodules (`Iterable[str]`, *optional*): Names of modules inside it.
    """
    warnings.warn(
        f"{old} is now {new}; the old path will be removed in the next release.", DeprecationWarning, stacklevel=3
    )
    for name in submodules:
        module = importlib.import_module(f"{new}.{name}")
        sys.modules[f"{old}.{name}"] = module
        setattr(sys.modules[old], name, module)
