"""Speculative decoding whose tokens are those of plain decoding, for recipes that change what is stored."""

from collections.abc import Callable
from typing import Any

import torch

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import CandidateGenerator

__all__ = ["BoundedCandidates"]


class BoundedCandidates(CandidateGenerator):
    """Candidates that are verified against the very past that plain decoding would have attended to.

    A forward pass over a draft cannot pack or plan half way, so a draft ends where the tail is full: the cache packs
    after the same token as in plain decoding. The prompt is passed through the model by itself, without a draft, as in
    plain decoding too.

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
            room = self._cache.tokens_until_packing() - 1  # the last accepted token is passed along with the draft
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
