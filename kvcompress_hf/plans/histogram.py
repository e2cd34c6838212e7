"""Counts of slots by importance, so that a plan weighs every threshold without looking at the slots again.

A slot's bin is how far its score lies below the highest of its sequence, in 1/16 octaves. Positive floats order like
the integers of their bits, and the upper bits of such an integer are a logarithm, linear between powers of two: a bin
is one subtraction and one shift, the same on every device. Counts are integers, so plans are deterministic.
"""

from dataclasses import dataclass

import torch

from kvcompress_hf.plans.base import PlanView

BINS_PER_OCTAVE = 16
BINS = 40 * BINS_PER_OCTAVE  # what lies deeper than 40 octaves shares the last bin with scores of zero
_SHIFT = 23 - (BINS_PER_OCTAVE - 1).bit_length()  # float32 has 23 bits below its exponent


def bins_below_top(scores: torch.Tensor) -> torch.Tensor:
    """How far each score lies below the highest of its sequence.

    Args:
        scores (`torch.Tensor`): float32 `[batch, rows, slots]`, not negative.

    Returns:
        `torch.Tensor`: `int32` `[batch, rows, slots]`, 0 for the highest, `BINS - 1` for zeros and all too low.
    """
    # Whatever a poisoned sequence brings, bits must be those of a finite number that is not negative: NaN and below
    # zero count as zero. Adding zero makes -0.0 positive.
    bits = (scores.nan_to_num(nan=0.0).clamp(min=0.0) + 0.0).contiguous().view(torch.int32)
    return ((bits.amax((1, 2), keepdim=True) - bits) >> _SHIFT).clamp_(max=BINS - 1)


@dataclass(frozen=True)
class SlotCounts:
    """How many slots of each row lie less than `k` bins below the top, for every `k` from 0 to `BINS`.

    Args:
        free (`torch.Tensor`): `int32` `[batch, rows, tiers, BINS + 1]`, slots that may be evicted, by the tier that
            they are stored in.
        protected (`torch.Tensor`): Likewise for slots that must stay.
    """

    free: torch.Tensor
    protected: torch.Tensor

    @classmethod
    def of(cls, view: PlanView, depth: torch.Tensor) -> "SlotCounts":
        """Counts the slots of a view in one pass.

        Args:
            view (`PlanView`): Every slot.
            depth (`torch.Tensor`): `int32` `[batch, rows, slots]`, from [`bins_below_top`].

        Returns:
            `SlotCounts`: How many slots lie below each bin, protected ones apart.
        """
        batch, rows = depth.shape[:2]
        kind = view.tier.to(torch.int32) * 2 * BINS  # of each column
        index = (depth + view.protected.to(torch.int32) * BINS + kind).long()
        counts = torch.zeros((batch, rows, view.tiers * 2 * BINS), dtype=torch.int32, device=depth.device)
        counts.scatter_add_(-1, index, view.filled.to(torch.int32))
        counts = counts.view(batch, rows, view.tiers, 2, BINS)
        below = torch.nn.functional.pad(counts.cumsum(-1, dtype=torch.int32), (1, 0))
        return cls(below[..., 0, :], below[..., 1, :])

    def of_rows(self, sequences: slice) -> "SlotCounts":
        """The counts of some sequences of the batch."""
        return SlotCounts(self.free[sequences], self.protected[sequences])

    def stored(self) -> torch.Tensor:
        """Slots kept if those below bin `k` are: protected ones always. `int32` `[batch, rows, tiers, BINS + 1]`."""
        return self.free + self.protected[..., -1:]

    def above(self) -> torch.Tensor:
        """Slots below bin `k`, protected or not. `int32` `[batch, rows, tiers, BINS + 1]`."""
        return self.free + self.protected
