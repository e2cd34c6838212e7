"""With which keys a forward pass began, so that it is known again after it stopped half way and was taken back."""

from dataclasses import dataclass

import torch

_PROBED = 8  # tokens; so few are enough to tell texts apart and cost nothing to keep


@dataclass(frozen=True)
class Beginning:
    """The first tokens of a forward pass.

    Args:
        tokens (`int`): How many tokens the pass has.
        keys (`torch.Tensor`): Keys of its first tokens in the first layer, `[batch, kv_heads, tokens, head_dim]`.
    """

    tokens: int
    keys: torch.Tensor

    @classmethod
    def of(cls, key: torch.Tensor) -> "Beginning":
        """Of a pass whose keys have arrived.

        Args:
            key (`torch.Tensor`): Of the first layer, `[batch, kv_heads, tokens, head_dim]`.

        Returns:
            `Beginning`: It keeps at most 8 tokens, and no longer tensor alive.
        """
        key, tokens = key.detach(), key.shape[2]
        return cls(tokens, key if tokens == 1 else key[:, :, :_PROBED].clone())

    def repeated_by(self, key: torch.Tensor) -> bool:
        """Whether another pass begins with the same tokens, in a chunk of any length.

        Keys of the first layer depend on nothing but token and position, up to rounding, which differs with the
        number of tokens. Other tokens' keys are elsewhere in most channels, even where a bias rules a few of them.

        Args:
            key (`torch.Tensor`): Keys of the same layer, `[batch, kv_heads, tokens, head_dim]`.

        Returns:
            `bool`: Whether they are.
        """
        count = min(key.shape[2], self.keys.shape[2])
        before, now = self.keys[:, :, :count].float(), key.detach()[:, :, :count].float()
        if before.shape != now.shape or before.device != now.device:
            return False
        near = (now - before).abs() <= before.abs() / 32
        return bool((near.float().mean(dim=(1, 3)) >= 0.5).all())
