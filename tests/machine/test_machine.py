"""Whole caches under random operations, against a dense model; rules in `world.py`, long runs in `run.py`."""

import gc
import sys
import warnings
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

sys.path.insert(0, str(Path(__file__).parent))

from drive import kind_of, replay, world_of
from shapes import SHAPES
from world import CONFIGURATIONS, OPERATIONS, World

EXAMPLES, STEPS = 12, 40  # hypothesis: of each shape
WORLDS, LENGTH = 12, 40  # from seeds: of each shape; `run.py` does more


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


class CacheMachine(RuleBasedStateMachine):
    """Hypothesis chooses the world and the operations; a failing run is shortened and printed as a program."""

    shape = None

    def __init__(self):
        super().__init__()
        self.world = None

    @initialize(
        recipe=st.sampled_from(CONFIGURATIONS["recipe"]),
        batch=st.integers(1, 3),
        seed=st.integers(0, 2**31 - 1),
        limit=st.sampled_from([0, 0, 0, 2, 4, 8]),
    )
    def begin(self, recipe, batch, seed, limit):
        self.world = World(self.shape, recipe, batch, seed, limit)

    def teardown(self):
        if self.world is not None:
            self.world.close()


def _add(name, bounds):
    @rule(**{argument: st.integers(*ends) for argument, ends in bounds.items()})
    def operation(self, **arguments):
        self.world.step(name, **arguments)

    setattr(CacheMachine, name, operation)


for _name, (_, _bounds) in OPERATIONS.items():
    _add(_name, _bounds)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_nothing_that_hypothesis_thinks_of_breaks_a_cache(shape):
    machine = type(f"Machine_{shape}", (CacheMachine,), {"shape": shape})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_random_worlds_hold(shape):
    for number in range(WORLDS):
        made_of, steps = world_of("suite", number, LENGTH, {"shape": shape})
        error, done = replay(made_of, steps)
        if error is not None:
            raise AssertionError(f"{kind_of(error)} in world {number}: {made_of} {steps[:done]}") from error


#: What long runs found, shortened: what the world is made of, and its steps.
FOUND = {
    "newest tokens given up where no page was left to lower them to": (
        {"shape": "llama", "recipe": "auto", "batch": 3, "seed": 1134653709, "limit": 2},
        [
            ("decode", {"which": 1, "times": 6, "padding": 0}),
            ("append", {"which": 1, "tokens": 34, "padding": 0, "mask": 0}),
            ("decode", {"which": 1, "times": 2, "padding": 3}),
            ("append", {"which": 2, "tokens": 9, "padding": 2, "mask": 0}),
            ("append", {"which": 2, "tokens": 29, "padding": 7, "mask": 0}),
            ("append", {"which": 1, "tokens": 29, "padding": 5, "mask": 1}),
        ],
    ),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found_before_holds(what):
    error, _ = replay(*FOUND[what])
    if error is not None:
        raise error
