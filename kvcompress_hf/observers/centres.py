"""Scores from the centres of queries before rotary embedding, learnt while decoding (TriAttention)."""

from dataclasses import dataclass

import torch

from kvcompress_hf.observers.base import Chunk, Observer
from kvcompress_hf.observers.look import Look
from kvcompress_hf.paging.key_turn import Rotation
from kvcompress_hf.paging.queries import Queries, band_norms
from kvcompress_hf.paging.slots import Slots
from kvcompress_hf.validation import check_flags, require_int


@dataclass(frozen=True)
class QueryCentres(Observer):
    """Observer: the logit that a query of the future is expected to give a key, by the key's distance and norm.

    Before rotary embedding the queries of a head lie close to a centre `E[q]`. So the logit of a key `k` at distance
    `d` is expected to be the sum over frequency bands `|E[q_f]| |k_f| cos(w_f d + phi_f)`, where `phi_f` is the angle
    between both; this is averaged over the next queries, 1, 2, 4, ... `2 ** offsets` positions on. Bands in which
    queries scatter add what norms alone say: `(1 - R_f) E[|q_f|] |k_f|` with `R_f = |E[q_f]| / E[|q_f|]`. Scores are
    standardised over the slots of each query head, and a slot gets the largest of its group (TriAttention, arXiv
    2604.04921, sections 3 and 4). No attention is looked at, neither of prompts nor while decoding.

    What differs from the paper: centres are not calibrated beforehand on other text, but are those of all queries that
    the sequence has had, prompt included; the next queries are those after the last token of the whole cache. Channels
    without rotary embedding are bands of one channel that does not turn; where it is not known how position turns
    queries, all are, and the centres are those of the turned queries.

    Args:
        offsets (`int`): The farthest of the next queries is `2 ** offsets` positions on.
        norms (`bool`): Add what norms say of scattered bands.
    """

    kind = "query-centres"

    offsets: int = 16
    norms: bool = True

    def __post_init__(self) -> None:
        require_int("QueryCentres", "offsets", self.offsets, 0, 20)
        check_flags(self, "norms")

    @property
    def fields(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: None: scores are made anew for each plan."""
        return ()

    @property
    def needs_rotary(self) -> bool:
        """`bool`: True: queries are turned back to position 0, and on to the future."""
        return True

    @property
    def learns_centres(self) -> bool:
        """`bool`: True."""
        return True

    @property
    def looks(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: The score."""
        return ("score",)

    def observe(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """Nothing to see; see [`Observer.observe`]."""
        return {}

    def look(self, look: Look) -> dict[str, torch.Tensor]:
        """Scores every slot; see [`Observer.look`]."""
        logits = expected_logits(look, self.offsets, self.norms)
        filled = look.filled[:, :, None]
        count = filled.sum(-1, keepdim=True).clamp(min=1)
        logits = torch.where(filled, logits, 0.0)
        mean = logits.sum(-1, keepdim=True) / count
        spread = torch.where(filled, logits - mean, 0.0).square().sum(-1, keepdim=True).div(count).sqrt()
        return {"score": ((logits - mean) / spread.clamp(min=torch.finfo(torch.float32).tiny)).amax(2)}

    def importance(self, slots: Slots) -> torch.Tensor:
        """The score; see [`Observer.importance`]."""
        return slots.fields["score"]


def expected_logits(look: Look, offsets: int, norms: bool) -> torch.Tensor:
    """What queries of the future are expected to give every slot, before the factor on logits.

    The trigonometric series is the product of the key, as it is stored, with the centre turned to where the query will
    stand; so the mean over several queries is one product with the mean of the turned centres.

    Args:
        look (`Look`): Everything a layer holds.
        offsets (`int`): The farthest query is `2 ** offsets` positions on.
        norms (`bool`): Add what norms say of scattered bands.

    Returns:
        `torch.Tensor`: float32 `[batch, kv_heads, group, slots]`.
    """
    queries, centre, mean_norms = look.queries, look.queries.centre, look.queries.norms
    if centre is None or mean_norms is None:
        raise ValueError("expected_logits() needs centres: the observer's learns_centres must be True.")
    ahead = _turned_centre(queries, centre, look.rotation, offsets)
    logits = ahead @ look.keys.transpose(-1, -2)
    if not norms:
        return logits
    scattered = (mean_norms - band_norms(centre, look.rotation)).clamp(min=0)  # (1 - R) E[|q|]
    return logits + scattered @ band_norms(look.keys, look.rotation).transpose(-1, -2)


def _turned_centre(queries: Queries, centre: torch.Tensor, rotation: Rotation | None, offsets: int) -> torch.Tensor:
    """The mean of the centre turned to the positions of coming queries, `[batch, kv_heads, group, head_dim]`."""
    if rotation is None:
        return centre
    steps = 2 ** torch.arange(offsets + 1, device=centre.device)
    at = queries.seen[:, None] - 1 + steps  # [batch, offsets]
    each = centre[:, :, :, None].expand(-1, -1, -1, offsets + 1, -1)
    return rotation.turn(each, at[:, None, None]).mean(3)
