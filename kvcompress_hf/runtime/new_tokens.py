"""New tokens of one layer on their way through attention, and what a mask over them says."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch

from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.kernels import Tail
from kvcompress_hf.paging.store import PagedStore


@dataclass(slots=True)
class NewTokens:
    """Queries, keys and values of new tokens of one layer, and how they attend.

    Args:
        query (`torch.Tensor`): `[batch, q_heads, tokens, head_dim]`.
        key (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`, centred where the cache centres keys.
        value (`torch.Tensor`): `[batch, kv_heads, tokens, head_dim]`.
        valid (`torch.Tensor`, *optional*): `bool` `[batch, tokens]`, false for padding.
        scaling (`float`): Factor on the logits.
        softcap (`float`, *optional*): Logits become `softcap * tanh(logits / softcap)`.
        window (`int`, *optional*): Sliding window in tokens.
        sinks (`torch.Tensor`, *optional*): Extra logit per query head, `[q_heads]`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    valid: torch.Tensor | None
    scaling: float
    softcap: float | None
    window: int | None
    sinks: torch.Tensor | None

    @property
    def tokens(self) -> int:
        """`int`: How many there are."""
        return self.key.shape[2]

    def sink_logits(self) -> torch.Tensor | None:
        """The sinks as kernels take them.

        Returns:
            `torch.Tensor` or `None`: float32 `[q_heads]`.
        """
        return None if self.sinks is None else self.sinks.detach().float().contiguous()

    def detached(self) -> "NewTokens":
        """The same tokens without a gradient.

        Returns:
            `NewTokens`: They.
        """
        return replace(self, query=self.query.detach(), key=self.key.detach(), value=self.value.detach())

    def select(self, index: torch.Tensor) -> "NewTokens":
        """The same tokens of other sequences.

        Args:
            index (`torch.Tensor`): `int64` `[new batch]`.

        Returns:
            `NewTokens`: Sequence `i` is what sequence `index[i]` was.
        """
        at = index.to(self.key.device)
        valid = None if self.valid is None else self.valid[at]
        return replace(self, query=self.query[at], key=self.key[at], value=self.value[at], valid=valid)

    def singly(self) -> "Iterator[NewTokens]":
        """The tokens one by one.

        Yields:
            `NewTokens`: One token.
        """
        for token in range(self.tokens):
            one = slice(token, token + 1)
            query, key, value = (x[:, :, one] for x in (self.query, self.key, self.value))
            valid = None if self.valid is None else self.valid[:, one].contiguous()
            yield replace(self, query=query, key=key, value=value, valid=valid)

    def attend(
        self,
        store: PagedStore,
        layer: int,
        tail: Tail,
        mask: torch.Tensor | None,
        *,
        position: int,
        key_position: int | None = None,
    ) -> torch.Tensor:
        """Attention over what is stored and the new tokens, which are not stored here.

        Args:
            store (`PagedStore`): Where the past is.
            layer (`int`): Place of the layer among the store's.
            tail (`Tail`): Its tail.
            mask (`torch.Tensor`, *optional*): bool or additive, `[batch, 1, queries, tokens]`.
            position (`int`): Position of the first query.
            key_position (`int`, *optional*): Position of the first key, where it is another.

        Returns:
            `torch.Tensor`: `[batch, queries, q_heads, head_dim]`.
        """
        allowed, bias = split_mask(mask)
        with store.reading:  # pages and tables stay where they are
            attended = store.backend.chunk_attention(
                self.query,
                self.key,
                self.value,
                store.rows(layer),
                tail,
                position=position,
                key_position=key_position,
                scale=self.scaling,
                softcap=self.softcap,
                window=self.window,
                sinks=self.sink_logits(),
                allowed=allowed,
                bias=bias,
            )
        return cast(torch.Tensor, attended)  # without return_lse it is the output alone


def real_tokens(mask: torch.Tensor, queries: int, tokens: int, batch: int) -> torch.Tensor:
    """Which new tokens are real: those that may see themselves. `bool` `[batch, tokens]`."""
    if mask.dim() != 4 or mask.shape[-1] != tokens or mask.shape[-2] != queries or queries != tokens:
        raise UnsupportedFeatureError(
            f"Got an attention mask of shape {tuple(mask.shape)} for {tokens} new tokens; a compressed cache needs "
            f"[batch, 1, {tokens}, {tokens}], over the new tokens only. Pass a 2-D mask [batch, all tokens] "
            "instead and let transformers build the 4-D one."
        )
    diagonal = mask[:, 0].diagonal(dim1=-2, dim2=-1)
    real = diagonal if diagonal.dtype == torch.bool else diagonal == 0
    return real.expand(batch, -1).contiguous()


def split_mask(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Who of the new tokens sees whom, and what is added to the logits, each `[batch, tokens, tokens]` or `None`."""
    if mask is None:
        return None, None
    block = mask[:, 0]
    if block.dtype == torch.bool:
        return block.contiguous(), None
    allowed = block > torch.finfo(block.dtype).min / 2
    bias = torch.where(allowed, block, 0).float()
    return allowed.contiguous(), bias.contiguous() if bool(bias.any()) else None
