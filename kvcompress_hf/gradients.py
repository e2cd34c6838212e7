"""Gradients and a compressed past: what is stored has none, and a backward pass that would need them says so."""

import copy
from typing import Any

import torch
from torch import Tensor

from kvcompress_hf.errors import UnsupportedFeatureError

__all__ = ["GradientGuard"]


class GradientGuard:
    """Lets loops run that forget `torch.no_grad()`, but no gradient come out wrong or go missing.

    The first tokens of a cache are attended to by the model's own attention, and their gradients are right. Behind a
    stored past there are none, so what attention returns then refuses `backward`.

    Args:
        layers (`int`): How many layers the cache has.
        filled (`bool`): Whether tokens are stored already.
    """

    def __init__(self, layers: int, filled: bool) -> None:
        self._filled = [filled] * layers
        self._cut = False  # whether stored keys or values were cut off from a graph

    def copy(self) -> "GradientGuard":
        """A second one for a fork.

        Returns:
            `GradientGuard`: A guard of its own, in the same state.
        """
        other = copy.copy(self)
        other._filled = list(self._filled)
        return other

    def after(self, layer_idx: int, output: Tensor, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """What a layer's attention returns to the model.

        Args:
            layer_idx (`int`): Index of the layer, whose new tokens are now stored.
            output (`Tensor`): `[batch, tokens, q_heads, head_dim]`.
            inputs (`tuple[Tensor, Tensor, Tensor]`): Queries, keys and values of the new tokens.

        Returns:
            `Tensor`: `output`, or the same values with a `backward` that raises `UnsupportedFeatureError`.
        """
        behind, self._filled[layer_idx] = self._filled[layer_idx], True
        return self._guarded(behind, output, inputs) if torch.is_grad_enabled() else output

    def after_shared(self, source_idx: int, output: Tensor, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """As [`GradientGuard.after`], for a layer that reads what another one has stored.

        Args:
            source_idx (`int`): Index of that other layer.
            output (`Tensor`): `[batch, tokens, q_heads, head_dim]`.
            inputs (`tuple[Tensor, Tensor, Tensor]`): Queries, keys and values of the new tokens.

        Returns:
            `Tensor`: `output`, as from [`GradientGuard.after`].
        """
        return self._guarded(True, output, inputs) if torch.is_grad_enabled() else output

    def _guarded(self, behind: bool, output: Tensor, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        wanted = any(tensor.requires_grad for tensor in inputs)
        if not behind and (output.requires_grad or not wanted):
            self._cut = self._cut or wanted
            return output
        if not wanted and not self._cut:
            return output
        self._cut = True
        # Of its own, since the inputs need none where only what is stored was made with gradients.
        refuses = torch.zeros((), requires_grad=True)
        return _Refuse.apply(output.detach(), refuses)


class _Refuse(torch.autograd.Function):
    """The same values; their gradients are refused."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, refuses: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise UnsupportedFeatureError(
            "backward() went through a compressed cache that held a past, and a compressed past has no gradients: they "
            "would be missing or wrong. Train on the whole text without a cache (use_cache=False), or on a stock "
            "cache: DynamicCache(config=model.config)."
        )
