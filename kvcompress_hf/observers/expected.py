"""Expected attention: what queries yet to come are likely to attend to (arXiv 2510.00636)."""

from dataclasses import dataclass

import torch

from kvcompress_hf.observers.attention_seen import write_field_of_all
from kvcompress_hf.observers.base import Chunk, Observer
from kvcompress_hf.paging.new_tokens import NewTokens
from kvcompress_hf.paging.slots import Slots
from kvcompress_hf.validation import check_flags, check_numbers, require_int


@dataclass(frozen=True)
class ExpectedAttention(Observer):
    """Observer: the attention that a normally distributed future query gives a slot, times the norm of its value.

    For query heads with mean `m` and covariance `C` a key `k` expects `exp(s m.k + s**2 k'Ck / 2)` with the factor `s`
    on the logits; this is normalised over all slots and averaged over the query heads of the group, `epsilon` is added,
    and the sum is multiplied by `|v|` (arXiv 2510.00636, equations 5-9). The paper takes mean and covariance before
    rotary embedding and turns them by the mean rotation of the next 512 positions. Here they are those of the last
    `queries` rotated queries, so past positions stand for the coming ones and the spread of their rotations is part of
    the covariance; this needs nothing of the model's rotary embedding. Later chunks of a prompt score what is stored
    anew, from the keys as they are stored. A soft cap on logits is not modelled.

    Args:
        queries (`int`): Last queries of the prompt or chunk whose statistics stand for the future.
        covariance (`bool`): Count the spread of the queries, not their mean alone.
        value (`bool`): Multiply by the norm of the value.
        epsilon (`float`): Added to the attention before that. It lets large values count where little attention is
            expected; without it what only a later question looks at is lost first.
    """

    kind = "expected"

    queries: int = 512
    covariance: bool = True
    value: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        require_int("ExpectedAttention", "queries", self.queries, 1)
        check_flags(self, "covariance", "value")
        check_numbers(self, "epsilon", low=0, high=1)
        if self.epsilon and not self.value:
            raise ValueError("ExpectedAttention(epsilon=..., value=False): only values make something of epsilon.")

    @property
    def fields(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: The score."""
        return ("score",)

    @property
    def scores_decoded(self) -> bool:
        """`bool`: False: scores are made from the queries of prompts."""
        return False

    def observe(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """Scores new and stored tokens by the chunk's last queries; see [`Observer.observe`]."""
        store, layer, new = chunk.store, chunk.layer, chunk.new
        batch, kv_heads, tokens, dim = new.key.shape
        rows, tail = store.rows(layer), store.tail(layer)
        mean, covariance = self._statistics(new)
        keys, values, filled = [], [], []
        for tier, lengths in enumerate(rows.lengths):
            width = rows.width(tier)
            stored = store.backend.read_slots(rows, tier, width)
            keys.append(stored[0].view(batch, kv_heads, width, dim))
            values.append(stored[1].view(batch, kv_heads, width, dim))
            filled.append((torch.arange(width, device=lengths.device) < lengths[:, None]).view(batch, kv_heads, width))
        slot = torch.arange(tail.k.shape[2], device=tail.k.device)
        real = new.valid
        if real is None:
            real = torch.ones((batch, tokens), dtype=torch.bool, device=new.key.device)
        keys += [tail.k, new.key]
        values += [tail.v, new.value]
        for used in (slot < tail.lengths[:, None], real):
            filled.append(used[:, None].expand(batch, kv_heads, -1))
        held = torch.cat(filled, dim=-1)
        # What is not a token may hold anything, infinities too.
        pieces = zip((store.whole(layer, k) for k in keys), filled, strict=True)  # queries vary: a shift would show
        logits = torch.cat([self._logits(torch.where(f[..., None], k, 0), mean, covariance) for k, f in pieces], dim=-1)
        attention = (logits * new.logits.scale).masked_fill(~held[:, :, None], -torch.inf).softmax(-1).mean(2)
        score = torch.where(held, attention, 0.0)
        if self.value:
            norms = [torch.where(f, v.float().norm(dim=-1), 0.0) for v, f in zip(values, filled, strict=True)]
            score = (score + self.epsilon) * torch.cat(norms, dim=-1)
        widths = tuple(part.shape[-1] for part in filled)
        return {"score": write_field_of_all(chunk.store, chunk.layer, new.valid, score, widths, "score")}

    def _statistics(self, new: NewTokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean `[batch, kv_heads, group, head_dim]` and covariance, times half the scale, of the last queries."""
        query = new.query[:, :, -self.queries :].float()
        query = query.unflatten(1, (new.key.shape[1], -1))
        weight = torch.ones(query.shape[0], query.shape[3], device=query.device)
        if new.valid is not None:
            weight = new.valid[:, -self.queries :].float()
        weight = (weight / weight.sum(1, keepdim=True).clamp(min=1))[:, None, None, :, None]
        query = torch.where(weight > 0, query, 0.0)
        mean = (query * weight).sum(3)
        if not self.covariance:
            return mean, None
        centred = query - mean[:, :, :, None]
        return mean, (centred * weight).transpose(-1, -2) @ centred * (new.logits.scale / 2)

    @staticmethod
    def _logits(keys: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor | None) -> torch.Tensor:
        """Logits over the scale, float32 `[batch, kv_heads, group, tokens]`."""
        keys = keys.float()
        logits = mean @ keys.transpose(-1, -2)
        if covariance is None:
            return logits
        for head in range(mean.shape[2]):  # one query head at a time: each is as large as the keys
            logits[:, :, head] += (keys @ covariance[:, :, head] * keys).sum(-1)
        return logits

    def importance(self, slots: Slots) -> torch.Tensor:
        """The score; see [`Observer.importance`]."""
        return slots.fields["score"]
