"""Real weights pass the dry run in every dtype, and every planted fault that concerns them is refused."""

import sys
from pathlib import Path

import pytest
import torch

from kvcompress_hf.errors import UnsupportedModelError
from kvcompress_hf.patches import is_patched, patch, unpatch

sys.path.insert(0, str(Path(__file__).parents[1] / "patches"))
from planted import FAULTS

#: What SmolLM2 and Gemma 3 have none of.
_ELSEWHERE = {"smollm2": ("window", "soft cap", "sinks"), "gemma3": ("soft cap", "sinks")}
CASES = [(name, fault) for name, without in _ELSEWHERE.items() for fault in FAULTS if not fault.startswith(without)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(scope="module")
def weights(load):
    """A real model in a dtype, loaded once."""
    loaded = {}

    def weights(name, dtype):
        if name not in loaded:
            loaded[name] = load(name, torch.float32)[0]
        return loaded[name].to(dtype)

    return weights


@dtypes
@pytest.mark.parametrize(("name", "route"), [("smollm2", "swap"), ("smollm2", "interface"), ("gemma3", "interface")])
def test_real_weights_are_accepted(name, route, dtype, weights):
    model = weights(name, dtype)
    try:
        assert is_patched(patch(model, "lossless", route=route))
    finally:
        unpatch(model)


@dtypes
@pytest.mark.parametrize(("name", "fault"), CASES)
def test_planted_fault_is_refused(name, fault, dtype, weights, monkeypatch):
    model = weights(name, dtype)
    FAULTS[fault](monkeypatch)
    with pytest.raises(UnsupportedModelError, match="check=False"):
        patch(model, "lossless")
    assert not is_patched(model)
