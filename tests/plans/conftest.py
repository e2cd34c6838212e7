"""Views of slots made by hand."""

import pytest
import torch

from kvcompress_hf.paging.slots import Slots
from kvcompress_hf.plans.base import PlanView


@pytest.fixture
def make_slots():
    def make(positions, fields=None, *, seen, prompt=0, filled=None, group=1, layers=None):
        """Slots of `[rows, slots]` positions of one sequence, or `[batch, rows, slots]`."""
        positions = torch.as_tensor(positions, dtype=torch.int32)
        positions = positions[None] if positions.dim() == 2 else positions
        rows = positions.shape[1]
        return Slots(
            fields={
                name: torch.as_tensor(v, dtype=torch.float32).view(positions.shape)
                for name, v in (fields or {}).items()
            },
            positions=positions,
            filled=torch.ones_like(positions, dtype=torch.bool) if filled is None else filled,
            tier=torch.zeros(positions.shape[-1], dtype=torch.int64),
            layer_of_row=torch.zeros(rows, dtype=torch.int64) if layers is None else torch.tensor(layers),
            group=torch.full((rows,), group),
            seen=seen,
            prompt=prompt,
        )

    return make


@pytest.fixture
def make_view():
    def make(importance, positions=None, **changes):
        """A view of `[batch, rows, slots]` importances; one tier of 16-slot pages of 1000 bytes unless changed."""
        importance = torch.as_tensor(importance, dtype=torch.float32)
        batch, rows, slots = importance.shape
        if positions is None:
            positions = torch.arange(slots).expand(batch, rows, slots)
        values = dict(
            importance=importance,
            spread=None,
            positions=torch.as_tensor(positions, dtype=torch.int32),
            filled=torch.ones(importance.shape, dtype=torch.bool),
            protected=torch.zeros(importance.shape, dtype=torch.bool),
            tier=torch.zeros(slots, dtype=torch.int64),
            layer_of_row=torch.zeros(rows, dtype=torch.int64),
            slots_per_page=torch.full((rows, 1), 16),
            page_bytes=torch.full((rows,), 1000),
            allowed_bytes=None,
            allowed_slots=None,
            tokens=torch.full((batch,), slots),
            dense_bytes=torch.full((batch,), 10**6),
            distortion=torch.zeros((batch, 1)),
        )
        return PlanView(**{**values, **changes})

    return make
