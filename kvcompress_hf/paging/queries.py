"""What is remembered of the queries of every head, for observers that judge keys when a plan is due.

Two things, each only where an observer asks for it. Centres: the mean query before rotary embedding, and the mean norms
of its bands (TriAttention, arXiv 2604.04921, finds that these hardly change with position or text). And the newest
queries as they were. A band is a pair of channels that rotary embedding turns together, or a single channel that it
does not turn.

Queries count by the number of real tokens before them, so padding plays no part. Rotary embedding sees differences of
positions only: a model that counts from elsewhere has its centres turned by as much, and the scores are the same.
"""

from dataclasses import dataclass

import torch

from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.paging.key_turn import Rotation
from kvcompress_hf.paging.sequence_tensors import Declared, SequenceTensors

__all__ = ["QUERIES", "Queries", "QueryMemory", "band_norms"]

_HEADS = ("layers", "batch", "kv_heads", "group")
QUERIES = (
    Declared("queries_seen", torch.int32, ("layers", "batch"), kind="metadata"),
    Declared("query_sums", torch.float32, (*_HEADS, "head_dim"), kind="metadata"),
    Declared("query_norms", torch.float32, (*_HEADS, "head_dim"), kind="metadata"),
    Declared("newest_queries", None, (*_HEADS, "newest", "head_dim"), kind="metadata"),
)
_AT_ONCE = 1024  # tokens of a chunk that are turned at once
_UNTURNED = Rotation(torch.zeros(0))


@dataclass(frozen=True)
class Queries:
    """What is remembered of the queries of one layer.

    Args:
        seen (`torch.Tensor`): Queries of each sequence, `int32` `[batch]`. The next one stands at this position.
        centre (`torch.Tensor`, *optional*): Mean query, turned back to position 0: float32
            `[batch, kv_heads, group, head_dim]`.
        norms (`torch.Tensor`, *optional*): Mean norm of each band, as [`band_norms`] orders them, float32
            `[batch, kv_heads, group, bands]`.
        newest (`torch.Tensor`, *optional*): The newest queries as attention had them, the last one last:
            `[batch, kv_heads, group, newest, head_dim]`; zeros first where a sequence has not had as many.
    """

    seen: torch.Tensor
    centre: torch.Tensor | None
    norms: torch.Tensor | None
    newest: torch.Tensor | None


class QueryMemory:
    """The remembered queries of all layers of a store; nothing until the first are added.

    Args:
        tensors (`SequenceTensors`): The store's tensors, those of the queries among them.
    """

    def __init__(self, tensors: SequenceTensors) -> None:
        self.tensors = tensors

    @property
    def nbytes(self) -> int:
        """`int`: Bytes it takes."""
        values = self.tensors.values
        return sum(values[each.name].nbytes for each in QUERIES if each.name in values)

    def add(
        self,
        layer: int,
        query: torch.Tensor,
        valid: torch.Tensor | None,
        rotation: Rotation | None,
        *,
        centres: bool,
        newest: int,
    ) -> None:
        """Remembers new queries of a layer.

        Args:
            layer (`int`): Index of the layer.
            query (`torch.Tensor`): `[batch, q_heads, tokens, head_dim]`.
            valid (`torch.Tensor`, *optional*): `bool` `[batch, tokens]`, false for padding.
            rotation (`Rotation`, *optional*): How position turns them; where it is not known they count as they are.
            centres (`bool`): Whether centres are learnt.
            newest (`int`): How many of the newest are kept.

        Raises:
            UnsupportedFeatureError: If layers of one shape of keys have different numbers of query heads.
        """
        self._make(query.shape[1] // self.tensors.sizes["kv_heads"], centres, newest)
        grouped = query.unflatten(1, (self.tensors.sizes["kv_heads"], -1))
        seen = self.tensors.values["queries_seen"][layer]
        if centres:
            for start in range(0, query.shape[2], _AT_ONCE):
                part = slice(start, start + _AT_ONCE)
                some = None if valid is None else valid[:, part]
                self._add_to_centres(layer, grouped[..., part, :], some, rotation or _UNTURNED, seen)
                seen = seen + (min(_AT_ONCE, query.shape[2] - start) if some is None else some.sum(1))
        if newest:
            self._keep_newest(layer, grouped[..., -newest:, :], None if valid is None else valid[:, -newest:])
        self.tensors.values["queries_seen"][layer] += query.shape[2] if valid is None else valid.sum(1).int()

    def of(self, layer: int, rotation: Rotation | None) -> Queries | None:
        """What is remembered of a layer.

        Args:
            layer (`int`): Index of the layer.
            rotation (`Rotation`, *optional*): As it was given to [`QueryMemory.add`].

        Returns:
            `Queries` or `None`: `None` before the first query.
        """
        values = self.tensors.values
        if "queries_seen" not in values:
            return None
        seen = values["queries_seen"][layer]
        centre = norms = None
        if "query_sums" in values:
            count = seen.clamp(min=1)[:, None, None, None]
            bands = values["query_sums"].shape[-1] - (rotation or _UNTURNED).width // 2
            centre, norms = values["query_sums"][layer] / count, values["query_norms"][layer, ..., :bands] / count
        newest = values.get("newest_queries")
        return Queries(seen, centre, norms, None if newest is None else newest[layer])

    def _make(self, group: int, centres: bool, newest: int) -> None:
        values, known = self.tensors.values, {"group": group, "newest": newest}
        wanted = ["queries_seen"] + ["query_sums", "query_norms"] * centres + ["newest_queries"] * bool(newest)
        for name in wanted:
            if name not in values:
                self.tensors.make(name, **known)
            elif "group" in self.tensors.declared[name].dims and values[name].shape[3] != group:
                raise UnsupportedFeatureError(
                    f"A layer has {group} query heads per KV head and another {values[name].shape[3]}, with KV heads "
                    "alike; recipes that remember queries need the same number. Take one whose observer does not, "
                    "such as 'auto' or 'h2o'."
                )

    def _add_to_centres(
        self, layer: int, grouped: torch.Tensor, valid: torch.Tensor | None, rotation: Rotation, seen: torch.Tensor
    ) -> None:
        """Adds queries `[batch, kv_heads, group, tokens, head_dim]`, the first of them at position `seen`."""
        tokens = grouped.shape[3]
        if valid is None:
            place = torch.arange(tokens, device=grouped.device).expand(grouped.shape[0], -1)
        else:
            place = valid.cumsum(1) - 1
            grouped = torch.where(valid[:, None, None, :, None], grouped, 0)  # padding may hold anything
        at_zero = rotation.turn(grouped.float(), -(seen[:, None] + place)[:, None, None])
        norms = band_norms(at_zero, rotation)
        self.tensors.values["query_sums"][layer] += at_zero.sum(3)
        self.tensors.values["query_norms"][layer, ..., : norms.shape[-1]] += norms.sum(3)

    def _keep_newest(self, layer: int, grouped: torch.Tensor, valid: torch.Tensor | None) -> None:
        kept = self.tensors.values["newest_queries"][layer]
        tokens, room = grouped.shape[3], kept.shape[3]
        both = torch.cat([kept, grouped], dim=3)
        if valid is None:
            kept.copy_(both[..., tokens:, :])
            return
        # A stable sort brings padding to the front; all that was kept before counts as real, its first zeros too.
        real = torch.cat([valid.new_ones((valid.shape[0], room)), valid], dim=1)
        order = real.to(torch.uint8).argsort(dim=1, stable=True)[:, tokens:]
        kept.copy_(both.gather(3, order[:, None, None, :, None].expand_as(kept)))


def band_norms(states: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
    """Norm of each band: first the pairs that rotary embedding turns, then each other channel by itself.

    Args:
        states (`torch.Tensor`): Queries or keys, `[..., head_dim]`.
        rotation (`Rotation`, *optional*): Which channels are pairs; none where that is not known.

    Returns:
        `torch.Tensor`: float32 `[..., head_dim - pairs]`.
    """
    states, rotation = states.float(), rotation or _UNTURNED
    end = rotation.start + rotation.width
    turned = states[..., rotation.start : end]
    first, second = (turned[..., ::2], turned[..., 1::2]) if rotation.interleaved else turned.chunk(2, dim=-1)
    alone = torch.cat([states[..., : rotation.start], states[..., end:]], dim=-1)
    return torch.cat([(first.square() + second.square()).sqrt(), alone.abs()], dim=-1)  # `norm` over two is slow
