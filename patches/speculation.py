"""Speculative decoding whose tokens are those of plain decoding, on empty caches and on those that hold text."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import CandidateGenerator
from kvcompress_hf.errors import UnsupportedFeatureError

__all__ = ["BoundedCandidates", "recording_ends", "tokens_held"]


@contextlib.contextmanager
def recording_ends(cache: CompressedPagedCache | None) -> Iterator[None]:
    """A `with` block after which a cache records nothing, unless it did before; what was only tried is taken back.

    Args:
        cache (`CompressedPagedCache`, *optional*): The cache that `generate` is given.
    """
    if cache is None or cache.is_recording_past(0):
        yield
        return
    try:
        yield
    except BaseException:
        cache.withdraw_recorded()
        raise
    cache.stop_past_recording()


def tokens_held(
    cache: CompressedPagedCache,
    candidates: CandidateGenerator,
    input_ids: torch.Tensor,
    model_kwargs: Mapping[str, Any],
    mask_length: int | None,
) -> int:
    """How many tokens at the beginning of a prompt are not to be read, because the cache holds them.

    Args:
        cache (`CompressedPagedCache`): The cache of the model that verifies.
        candidates (`CandidateGenerator`): Where candidates come from.
        input_ids (`torch.Tensor`): `[1, tokens]`, the whole text or what is new of it.
        model_kwargs (`Mapping[str, Any]`): Arguments of the model in this call.
        mask_length (`int`, *optional*): Length of a mask of ones, which `generate` drops.

    Returns:
        `int`: Tokens; 0 if all of `input_ids` is new.

    Raises:
        UnsupportedFeatureError: If the draft model must see the whole text pass through the verifying one, or only the
            new tokens came with a mask that has padding.
    """
    seen = cache.get_seq_length()
    if not seen:
        return 0
    if candidates.requires_model_outputs:
        raise UnsupportedFeatureError(
            f"{type(candidates).__name__} drafts from the hidden states of the whole text, but the cache already holds "
            f"{seen} tokens, whose hidden states are gone; begin with an empty cache, or draft by prompt lookup or an "
            "assistant model."
        )
    if model_kwargs.get("inputs_embeds") is not None:
        return seen  # always the whole text
    mask = model_kwargs.get("attention_mask")
    length = mask_length if mask is None else mask.shape[1]
    if length == input_ids.shape[1]:
        return seen
    if mask is not None:
        # generate() cuts the mask to the length of the ids at every draft, and would take the padding for the new ones.
        raise UnsupportedFeatureError(
            f"Speculative decoding got the {input_ids.shape[1]} new tokens only, with a mask of all {length} tokens "
            "that has padding; pass the whole text, or leave the assistant or prompt lookup out."
        )
    return 0


class BoundedCandidates(CandidateGenerator):
    """Candidates that are verified against the very past that plain decoding would have attended to.

    A forward pass over a draft cannot pack or plan half way, so with recipes that change what is stored a draft ends
    where the tail is full: the cache packs after the same token as in plain decoding. The prompt is passed through the
    model by itself, without a draft and without recording, as in plain decoding too.

    Args:
        inner (`CandidateGenerator`): Where candidates come from.
        cache (`CompressedPagedCache`): The cache of the model that verifies them.
        read_again (`Callable`): Called once with the prompt, `[1, tokens]`, where the recipe wants a second reading.
    """

    def __init__(
        self, inner: CandidateGenerator, cache: CompressedPagedCache, read_again: Callable[[Any], None]
    ) -> None:
        self._inner = inner
        self._cache = cache
        self._read_again = read_again
        self._bounded = cache.recipe.changes_slots
        self._before = cache.get_seq_length()
        self._prompt_passed = False

    def get_candidates(self, input_ids: Any, **kwargs: Any) -> Any:
        """The inner generator's candidates, as many as may be verified at once.

        Args:
            input_ids (`torch.LongTensor`): `[1, tokens]`.
            kwargs: Passed on.

        Returns:
            `tuple`: Ids with candidates `[1, tokens + candidates]`; their logits `[1, candidates, vocab]` or `None`.
        """
        # The inner generator is asked even when nothing can be used: it counts on seeing every step.
        candidates: Any = self._inner.get_candidates(input_ids, **kwargs)
        ids, logits = candidates
        if self._prompt_passed:
            if self._cache.awaits_second_reading:
                new = self._cache.get_seq_length() - self._before
                # With inputs_embeds there are no ids but that of the token just made, which the cache has not seen.
                self._read_again(input_ids[:, :-1][:, -new:])
            self._cache.activate_past_recording()
            # The last accepted token is passed along with the draft.
            room = self._cache.tokens_until_packing() - 1 if self._bounded else ids.shape[1]
        else:
            self._prompt_passed = True
            self._cache.stop_past_recording()
            room = 0
        ids = ids[:, : input_ids.shape[1] + room]
        return ids, None if logits is None or not room else logits[:, :room]

    def update_candidate_strategy(self, input_ids: Any, scores: torch.Tensor, num_matches: int) -> None:
        """Tells the inner generator how many of its candidates were right.

        Args:
            input_ids (`torch.LongTensor`): `[1, tokens]`.
            scores (`torch.Tensor`): `[1, candidates + 1, vocab]`.
            num_matches (`int`): Candidates that were right.
        """
        self._inner.update_candidate_strategy(input_ids, scores, num_matches)

    def __getattr__(self, name: str) -> Any:
        # generate() asks generators of some kinds for their model and its settings.
        return getattr(self.__dict__["_inner"], name)
