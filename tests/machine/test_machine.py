"""Whole caches under random operations, against a dense model; see `world.py` for the rules and `run.py` for long runs."""

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

from drive import random_step, replay, setting
from world import CONFIGURATIONS, OPERATIONS, World


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
