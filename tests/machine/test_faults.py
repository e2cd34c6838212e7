"""A failure at sampled places of every scenario; `run_faults.py` tries every place there is."""

import gc
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import faults
import model_faults
from faults import Fault

PLACES = {"line": 4, "torch": 3}  # of each kind in each scenario, spread evenly; of the other kinds one


@pytest.fixture(autouse=True, scope="module")
def few_objects():
    """Caches go through the garbage collector all the time; it need not look at all of transformers each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", sorted(faults.scenarios()))
def test_a_failure_leaves_the_cache_as_before_or_closed(name):
    try_places(faults.scenario(name))


@pytest.mark.parametrize("name", sorted(model_faults.scenarios()))
def test_a_failure_leaves_the_model_usable(name):
    try_places(model_faults.ModelScenario(*model_faults.scenarios()[name]))


def try_places(subject):
    places = 0
    for kind in subject.kinds:
        if kind == "opcode":
            continue  # between lines; `run_faults.py --kinds opcode`
        count = subject.count(kind)
        for at in chosen(count, PLACES.get(kind, 1)):
            places += 1
            try:
                where, ended = subject.fail(kind, at)
            except Fault as fault:
                raise AssertionError(f"{kind} {at} of {count}, {fault.where}: {fault}") from None
            assert ended in ("before", "after", "packed later", "closed"), (kind, at, where)
    assert places >= PLACES["line"]


def chosen(count, places):
    """Numbers from 1 to `count`, spread evenly; the ends among them where there are several."""
    if not count or places == 1:
        return [1 + count // 2] if count else []
    return sorted({1 + i * (count - 1) // (places - 1) for i in range(places)})
