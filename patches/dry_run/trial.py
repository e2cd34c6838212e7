"""What the stock and the patched model are run on: ordinary tokens, in several passes, one row padded."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress_hf.compat import Cache, as_argument
from kvcompress_hf.layers import layer_windows
from kvcompress_hf.patches.support import text_config

__all__ = ["LONGEST_PAST", "Trial", "long_past", "ordinary_ids", "reading", "run_pass", "takes"]

#: A first chunk, a second one, and two single tokens.
_READING = (12, 6, 1, 1)
#: Padding in front of the second row.
_PADDING = 5
#: A chunk and a single token, each behind a past as long as the longest window.
_BEHIND = (3, 1)
#: Windows longer than this are compared by their number alone.
LONGEST_PAST = 8192


@dataclass(frozen=True)
class Trial:
    """A few forward passes, the same for the stock and the patched model.

    Args:
        ids (`Tensor`): Token ids, `int64` `[rows, tokens]`.
        real (`Tensor`): False for padding, `bool` `[rows, tokens]`.
        parts (`tuple[int, ...]`): Tokens per pass.
        past (`int`): 0 if each pass follows the one before; else every pass comes first behind that many tokens which
            no model has seen.
    """

    ids: Tensor
    real: Tensor
    parts: tuple[int, ...]
    past: int = 0

    def span(self, step: int) -> tuple[int, int]:
        """Where the tokens of a pass lie, the past counted.

        Args:
            step (`int`): Number of the pass.

        Returns:
            `tuple[int, int]`: First position, and the one after the last.
        """
        start = self.past if self.past else sum(self.parts[:step])
        return start, start + self.parts[step]

    @property
    def length(self) -> int:
        """`int`: Tokens that a cache has seen at the end, the past counted."""
        return self.past + (max(self.parts) if self.past else sum(self.parts))

    def real_of(self, step: int) -> Tensor:
        """Which tokens of a pass are real.

        Args:
            step (`int`): Number of the pass.

        Returns:
            `Tensor`: `bool` `[rows, tokens of the pass]`.
        """
        start, stop = self.span(step)
        return self.real[:, start - self.past : stop - self.past]


def reading(model: PreTrainedModel) -> Trial:
    """Two rows, one of them padded, read in chunks and then token by token.

    Args:
        model (`PreTrainedModel`): The model.

    Returns:
        `Trial`: A trial whose tensors are on the model's device.
    """
    ids = ordinary_ids(model, 2, sum(_READING))
    real = torch.ones_like(ids, dtype=torch.bool)
    if takes(model, "attention_mask"):
        real[1, :_PADDING] = False
    return Trial(ids, real, _READING)


def long_past(model: PreTrainedModel) -> Trial | None:
    """One row behind a past that fills the longest sliding window, where [`reading`] does not leave it.

    Args:
        model (`PreTrainedModel`): The model.

    Returns:
        `Trial` or `None`: `None` where it would tell nothing new, or the past would be longer than [`LONGEST_PAST`].
    """
    windows = [w for w in layer_windows(model.config) if w is not None and sum(_READING) <= w <= LONGEST_PAST]
    if not windows:
        return None
    ids = ordinary_ids(model, 1, max(_BEHIND))
    return Trial(ids, torch.ones_like(ids, dtype=torch.bool), _BEHIND, past=max(windows))


def run_pass(model: PreTrainedModel, trial: Trial, step: int, cache: Cache) -> Tensor:
    """One forward pass.

    Args:
        model (`PreTrainedModel`): The stock or the patched model.
        trial (`Trial`): What to run.
        step (`int`): Which of its passes.
        cache (`Cache`): With what came before.

    Returns:
        `Tensor`: float32 logits of the last token, `[rows, vocab]`, on the host.
    """
    start, stop = (place - trial.past for place in trial.span(step))
    arguments: dict[str, Any] = {"input_ids": trial.ids[:, start:stop].contiguous()}
    if not bool(trial.real.all()):
        arguments["attention_mask"] = trial.real[:, :stop].long()
    # Said outright where the model takes them: on the later ranks of a pipeline stock caches cannot tell. Behind a made
    # up past they begin at 0: what keys are made of is not looked at there, and no table of positions is too short.
    if takes(model, "position_ids"):
        positions = torch.arange(start, stop, device=trial.ids.device)
        arguments["position_ids"] = positions.repeat(trial.ids.shape[0], 1)
    out = model(**arguments, use_cache=True, **as_argument(model, cache))
    return out.logits[:, -1].float().cpu()


def takes(model: PreTrainedModel, name: str) -> bool:
    """Whether the model's `forward` has an argument of that name.

    Args:
        model (`PreTrainedModel`): The model.
        name (`str`): The argument.

    Returns:
        `bool`: False also where it only takes any argument.
    """
    return name in inspect.signature(model.forward).parameters


def ordinary_ids(model: PreTrainedModel, rows: int, tokens: int) -> Tensor:
    """Ids from the middle of the vocabulary, none of which the config names: special tokens, images and the like.

    Args:
        model (`PreTrainedModel`): The model.
        rows (`int`): Rows.
        tokens (`int`): Tokens per row.

    Returns:
        `Tensor`: `int64` `[rows, tokens]`, the same at each call.
    """
    vocabulary = text_config(model).vocab_size
    special = set(_named_tokens(model.config.to_dict()))
    drawn = torch.randint(
        vocabulary // 8,
        max(vocabulary * 3 // 4, vocabulary // 8 + 1),
        (8 * rows * tokens,),
        generator=torch.Generator().manual_seed(0),
    ).tolist()
    ordinary = [token for token in drawn if token not in special] or drawn
    chosen = [ordinary[i % len(ordinary)] for i in range(rows * tokens)]
    # With offloading to disk the weights are on "meta" between calls; accelerate then moves the ids itself.
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    return torch.tensor(chosen, device=device).view(rows, tokens)


def _named_tokens(config: dict[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _named_tokens(value)
        elif "token" in str(name):
            yield from (v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int))
