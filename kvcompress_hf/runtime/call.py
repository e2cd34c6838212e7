"""One call of attention: the new tokens of a layer, how they attend, and what a mask over them says."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.kernels import Tail
from kvcompress_hf.paging.new_tokens import NewTokens
from kvcompress_hf.paging.store import PagedStore

# An additive mask forbids by its dtype's least number, by -inf, or by hand by -1e4 and less: softmax makes 0 of all.
_FORBIDS = -9_999.0


@dataclass(slots=True)
class AttentionCall(NewTokens):
    """New tokens of one layer, and which of them may see which.

    Args:
        query (`torch.Tensor`): As in [`NewTokens`], like the others that are not named here.
        mask (`Mask`, *optional*): Which new tokens a query may see; `None` for causal attention.
    """

    mask: "Mask | None" = None

    def detached(self) -> "AttentionCall":
        """The same tokens without a gradient.

        Returns:
            `AttentionCall`: A copy whose queries, keys and values share memory with these, outside of autograd.
        """
        return replace(self, query=self.query.detach(), key=self.key.detach(), value=self.value.detach())

    def select(self, index: torch.Tensor) -> "AttentionCall":
        """Picks sequences, as beam search does.

        Args:
            index (`torch.Tensor`): `int64` `[new batch]`.

        Returns:
            `AttentionCall`: A copy whose sequence `i` is this one's sequence `index[i]`.
        """
        at = index.to(self.key.device)
        valid = None if self.valid is None else self.valid[at]
        return replace(self, query=self.query[at], key=self.key[at], value=self.value[at], valid=valid)

    def singly(self) -> "Iterator[AttentionCall]":
        """Goes through the tokens one by one, oldest first.

        Yields:
            `AttentionCall`: A single token at its position, without a mask: it sees everything before it.
        """
        for token in range(self.tokens):
            one = slice(token, token + 1)
            query, key, value = (x[:, :, one] for x in (self.query, self.key, self.value))
            valid = None if self.valid is None else self.valid[:, one].contiguous()
            yield replace(
                self, query=query, key=key, value=value, valid=valid, position=self.position + token, mask=None
            )

    def attend(
        self,
        store: PagedStore,
        layer: int,
        tail: Tail | None,
        *,
        position: int,
        key_position: int | None = None,
    ) -> torch.Tensor:
        """Attends to what is stored and to the new tokens; stores nothing.

        Args:
            store (`PagedStore`): Holds the past of the layer.
            layer (`int`): Place of the layer among the store's layers.
            tail (`Tail`, *optional*): Tail of the layer, or a part of it; nothing for tokens that are the first.
            position (`int`): Logical position of the first query.
            key_position (`int`, *optional*): Logical position of the first new key; `position` when left out.

        Returns:
            `torch.Tensor`: Output of attention, `[batch, queries, q_heads, head_dim]`.
        """
        allowed, bias = (None, None) if self.mask is None else self.mask.parts()
        if allowed is not None and allowed.shape[0] != self.query.shape[0]:  # one mask for all sequences
            batch = self.query.shape[0]
            allowed = allowed.expand(batch, -1, -1).contiguous()
            bias = None if bias is None else bias.expand(batch, -1, -1).contiguous()
        past = tail is not None  # whose values may be rotated
        value = store.rotated(self.value) if past else self.value
        with store.reading:  # pages and tables stay where they are
            output = store.backend.chunk_attention(
                self.query,
                self.key,
                value,
                store.rows(layer),
                tail,
                position=position,
                logits=self.logits,
                key_position=key_position,
                allowed=allowed,
                bias=bias,
            )
        return store.rotated(output) if past else output


def centred(key: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """Takes the vector that a layer's keys are centred by off new keys, as they are stored and attended to.

    Args:
        key (`torch.Tensor`): New keys, `[batch, kv_heads, tokens, head_dim]`.
        shift (`torch.Tensor`, *optional*): As from [`PagedStore.key_shift_of`].

    Returns:
        `torch.Tensor`: `key` less the shift; `key` itself where there is none.
    """
    return key if shift is None else key - shift


class Mask:
    """A mask over the new tokens, read once per forward pass however many layers it is for.

    Args:
        tensor (`torch.Tensor`): bool or additive, `[batch, 1, queries, tokens]`.
    """

    __slots__ = ("_implied", "_parts", "_real", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._real: torch.Tensor | None = None
        self._parts: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._implied: dict[int | None, bool] = {}

    def real_tokens(self, queries: int, tokens: int, batch: int) -> torch.Tensor:
        """Which new tokens are real: those that may see themselves.

        Args:
            queries (`int`): Queries of the call.
            tokens (`int`): New tokens.
            batch (`int`): Sequences.

        Returns:
            `torch.Tensor`: True for real tokens, `bool` `[batch, tokens]`.

        Raises:
            UnsupportedFeatureError: If the mask is not over the new tokens only.
        """
        mask = self.tensor
        fits = mask.dim() == 4 and mask.shape[-2:] == (queries, tokens) and mask.shape[0] in (1, batch)
        if not fits or queries != tokens:
            raise UnsupportedFeatureError(
                f"Got an attention mask of shape {tuple(mask.shape)} for {tokens} new tokens; a compressed cache needs "
                f"[batch, 1, {tokens}, {tokens}], over the new tokens only. Pass a 2-D mask [batch, all tokens] "
                "instead and let transformers build the 4-D one."
            )
        real = self._real
        if real is None or real.shape[0] != batch:
            self._check_heads()
            diagonal = mask[:, 0].diagonal(dim1=-2, dim2=-1)
            real = diagonal if diagonal.dtype == torch.bool else diagonal > _FORBIDS
            real = self._real = real.expand(batch, -1).contiguous()
        return real

    def says_nothing(self, window: int | None) -> bool:
        """Whether it forbids just what causal attention with a window forbids anyway, and adds nothing.

        Kernels then need no mask, and pass over the keys that nobody sees. Looked at on a CPU only, as another device
        would have to be waited for.

        Args:
            window (`int`, *optional*): The layer's sliding window in tokens.

        Returns:
            `bool`: Whether it may be left out.
        """
        mask = self.tensor
        if mask.device.type != "cpu" or mask.dim() != 4 or mask.shape[-2] != mask.shape[-1]:
            return False
        if window not in self._implied:
            allowed, bias = self.parts()
            self._implied[window] = bias is None and _is_causal(allowed, window)
        return self._implied[window]

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """`list[torch.Tensor | None]`: The mask itself and what was read from it so far, for counting bytes."""
        return [self.tensor, self._real, *(self._parts or ())]

    @property
    def biased(self) -> bool:
        """`bool`: Whether anything is added to the logits."""
        return self.tensor.is_floating_point() and self.parts()[1] is not None

    def _check_heads(self) -> None:
        """Refuses masks that are not the same for all heads, and those of integers."""
        mask = self.tensor
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise UnsupportedFeatureError(
                f"Got an attention mask of dtype {mask.dtype}; a compressed cache needs one of bool, or of floating "
                "point, that is added to the logits. Pass a 2-D mask [batch, all tokens] and let transformers build it."
            )
        if mask.shape[1] != 1 and not bool((mask == mask[:, :1]).all()):
            raise UnsupportedFeatureError(
                f"Got an attention mask that differs between its {mask.shape[1]} heads (ALiBi, T5 biases, sparsity per "
                "head); a compressed cache applies one mask to all heads. Use the stock cache for it."
            )

    def parts(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Splits the mask into what it forbids and what it adds, when first asked; later calls get the same tensors.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: Which new tokens each query may see, `bool`; and what is added
            to the logits, float32, `None` where that is nothing. Each `[batch, queries, tokens]`.
        """
        if self._parts is None:
            self._check_heads()
            block = self.tensor[:, 0]
            if block.dtype == torch.bool:
                self._parts = block.contiguous(), None
            else:
                allowed = block > _FORBIDS
                bias = torch.where(allowed, block, 0).float()
                self._parts = allowed.contiguous(), bias.contiguous() if bool(bias.any()) else None
        return self._parts


def _is_causal(allowed: torch.Tensor, window: int | None) -> bool:
    """Whether `bool` `[batch, tokens, tokens]` is causal with a window; some rows at a time, as prompts are long."""
    tokens = allowed.shape[-1]
    keys = torch.arange(tokens)
    for first in range(0, tokens, 256):
        queries = keys[first : first + 256, None]
        seen = keys <= queries
        if window is not None:
            seen &= keys > queries - window
        if not bool((allowed[:, first : first + 256] == seen).all()):
            return False
    return True
