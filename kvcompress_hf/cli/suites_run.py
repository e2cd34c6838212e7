"""Filling caches with one prompt under many recipes, and scoring answers on them.

A prompt goes through the model once. What its attention was given is kept, and every recipe's cache is filled from
that: observing, packing and planning run as in a prefill, the rest of the model does not run again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import DynamicCache

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument
from kvcompress_hf.patches.generation import begin_pass
from kvcompress_hf.patches.second_reading import read_again

from .suites import Exchange, Turn

#: Tokens after which a cache plans again in an exchange that grows.
BLOCK = 32
_SCORED_AT_ONCE = 64


class _Recorder(kvc.CompressedPagedCache):
    """A cache that also keeps what each layer's attention is called with."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, "lossless")
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def attend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keeps the arguments, then does as any cache."""
        self.calls.append((args, {name: value for name, value in kwargs.items() if name != "dense"}))
        return super().attend(*args, **kwargs)


class Prompt:
    """A prompt that has been through the model once, to fill caches with.

    Args:
        model: a causal language model, patched for as long as the prompt is used.
        ids: tokens of the prompt.
    """

    def __init__(self, model: Any, ids: list[int]) -> None:
        self.model, self.length = model, len(ids)
        self._ids = torch.tensor([ids], device=model.device)
        recorder = _Recorder(model.config)
        forward(model, ids, recorder, keep=1)
        self._calls = recorder.calls

    def fill(self, recipe: kvc.Recipe, seed: int = 0) -> kvc.CompressedPagedCache:
        """A cache that holds the prompt under a recipe, the same as `kvc.prefill(model, ids, recipe)`.

        Args:
            recipe: how to compress.
            seed: fixes what a recipe leaves to chance.
        """
        torch.manual_seed(seed)
        cache = kvc.CompressedPagedCache(self.model.config, recipe, prompt_tokens=self.length)
        begin_pass(self.model, cache, self.length)
        for args, kwargs in self._calls:
            cache.attend(*args, **kwargs, dense=_no_output)
        if cache.awaits_second_reading:
            read_again(self.model, cache, self._ids)
        return cache


def _no_output() -> torch.Tensor:
    """Stands in for the attention output of a prompt, which is known already."""
    return torch.empty(0)


def ratio_while_decoding(model: Any, cache: kvc.CompressedPagedCache) -> float:
    """Measured bytes over dense bytes while a token is decoded, so that the tail's room counts too.

    A fork would not do: it copies the pages that it writes scores to, and both copies would count.

    Args:
        model: the model, patched.
        cache: holds a prompt, and afterwards the same again: the token is taken back.
    """
    cache.activate_past_recording()
    forward(model, [0], cache, keep=1)
    cache.crop(-1)
    cache.stop_past_recording()
    return cache.memory().ratio  # the tail's room stays; what recording held back is gone


def forward(model: Any, ids: list[int], cache: Any, keep: int) -> torch.Tensor:
    """One forward pass over a cache.

    Args:
        model: a causal language model.
        ids: new tokens.
        cache: the cache, `None` for none.
        keep: positions at the end whose logits are wanted.

    Returns:
        float32 `[keep, vocabulary]`.
    """
    start = 0 if cache is None else cache.get_seq_length()
    tokens = torch.tensor([ids], device=model.device)
    positions = torch.arange(start, start + len(ids), device=model.device)[None]
    extra = {"logits_to_keep": keep} if model._supports_logits_to_keep() else {}
    past = as_argument(model, cache)
    out = model(tokens, position_ids=positions, use_cache=cache is not None, **past, **extra)
    return out.logits[0, -keep:].float()


@dataclass
class Outputs:
    """What the model predicts for the answers of an exchange, and what its attention modules put out on the way.

    Args:
        logits: `[answer tokens, vocabulary]`, in the model's dtype.
        attention: per layer float32 `[answer tokens, hidden]`; empty where nobody watched.
    """

    logits: torch.Tensor
    attention: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def watching(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collects the outputs of the model's attention modules, layer by layer, in the list it gives.

    Raises:
        ValueError: where the model has no module that ends in `self_attn` or `attn`.
    """
    seen: list[torch.Tensor] = []

    def note(module: Any, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        seen.append(states[0].float())

    modules = [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in ("self_attn", "attn", "attention")]
    if not modules:
        raise ValueError(f"{type(model).__name__} has no attention modules by the usual names")
    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def play(model: Any, cache: Any, exchange: Exchange, *, watch: bool = False) -> Outputs:
    """Gives a cache the turns of an exchange, each with its right answer.

    Unless the exchange grows, no token of it is compressed: they are held back in the cache's tail. One that grows goes
    in by blocks of `BLOCK` tokens, after each of which a recipe that plans plans again.

    Args:
        model: the model, patched if the cache is a compressed one.
        cache: holds the context, and is changed by the call.
        exchange: with its answers; the very last token of them is only predicted.
        watch: also collect the outputs of the attention modules, for an exchange of one turn that does not grow.
    """
    blocks = exchange.grows and isinstance(cache, kvc.CompressedPagedCache)
    if isinstance(cache, kvc.CompressedPagedCache) and not exchange.grows:
        cache.activate_past_recording()
    pending, logits, attention = list[int](), [], list[torch.Tensor]()
    with watching(model) if watch else nullcontext() as seen:
        for turn in exchange.turns:
            ids, scored = pending + turn.given + turn.answer[:-1], len(turn.answer)
            size, keep = (BLOCK, BLOCK) if blocks else (len(ids), scored)
            parts = [forward(model, ids[at : at + size], cache, keep) for at in range(0, len(ids), size)]
            # A copy, so that what was made of the given tokens is not kept as well.
            logits.append(torch.cat(parts)[-scored:].to(model.dtype, copy=True))
            pending = turn.answer[-1:]
        attention = [states[-scored:].clone() for states in seen or ()]
    return Outputs(torch.cat(logits), attention)


class FullCache:
    """A context in transformers' own cache, which the stock attention reads.

    Args:
        model: a causal language model, patched or not.
        context: tokens.
    """

    def __init__(self, model: Any, context: list[int]) -> None:
        self.model, self._cache = model, DynamicCache(config=model.config)
        forward(model, context, self._cache, keep=1)

    def play(self, exchange: Exchange, *, watch: bool = False) -> Outputs:
        """What the model predicts in an exchange with all of its context; see `play`."""
        return play(self.model, copy.deepcopy(self._cache), exchange, watch=watch)


def write_answers(model: Any, cache: kvc.CompressedPagedCache, exchange: Exchange) -> Exchange:
    """The exchange with the answers that it lacks, decoded greedily to where the model ends, at most `exchange.write`.

    Args:
        model: the model, patched.
        cache: holds the context, losslessly, and is changed by the call.
        exchange: all of its answers are known, or none.
    """
    if all(turn.answer for turn in exchange.turns):
        return exchange
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [] if end is None else [end]
    turns = []
    for turn in exchange.turns:
        answer = list[int]()
        logits = forward(model, turn.given, cache, 1)[-1]
        logits[ends] = -torch.inf  # an answer has at least one token
        while len(answer) < exchange.write and (token := int(logits.argmax())) not in ends:
            answer.append(token)
            logits = forward(model, [token], cache, 1)[-1]
        turns.append(Turn(turn.given, answer))
    return replace(exchange, turns=tuple(turns))


def answer_scores(outputs: Outputs, full: Outputs, answer: list[int]) -> dict[str, Any]:
    """How an answer fares, every token predicted from the right ones before it.

    Args:
        outputs: of a compressed cache; the rows are the answer's.
        full: likewise with the full context.
        answer: its tokens.

    Returns:
        `right` (every token is the most likely one, so greedy decoding gives the answer), `full_right` (the same with
        the full context), `as_full` (share of tokens whose most likely token is the full cache's), and in nats per
        token `kl` of full from compressed, `nll` of the answer, and `nll_change` from the full cache's.
    """
    right = full_right = True
    same, kl, nll, full_nll = 0, 0.0, 0.0, 0.0
    # In pieces: large vocabularies make large tables.
    for at in range(0, len(answer), _SCORED_AT_ONCE):
        rows = slice(at, at + _SCORED_AT_ONCE)
        logp, full_logp = outputs.logits[rows].float().log_softmax(-1), full.logits[rows].float().log_softmax(-1)
        target = torch.tensor(answer[rows], device=logp.device)[:, None]
        best, full_best = logp.argmax(-1, keepdim=True), full_logp.argmax(-1, keepdim=True)
        right, full_right = right and bool((best == target).all()), full_right and bool((full_best == target).all())
        same += int((best == full_best).sum())
        kl += float((full_logp.exp() * (full_logp - logp)).sum())
        nll -= float(logp.gather(-1, target).sum())
        full_nll -= float(full_logp.gather(-1, target).sum())
    n = len(answer)
    return {
        "right": right,
        "full_right": full_right,
        "as_full": same / n,
        "kl": kl / n,
        "nll": nll / n,
        "nll_change": (nll - full_nll) / n,
    }


def output_errors(outputs: Outputs, full: Outputs) -> dict[str, Any]:
    """Relative errors: of the logits, each token's centred since softmax does not see a shift, and per layer.

    Args:
        outputs: of a compressed cache.
        full: with the full context.

    Returns:
        `logits`, `layers` and their mean, `attention`: norms of differences divided by norms, over the answer's tokens.
    """
    logits, wanted = outputs.logits.float(), full.logits.float()
    layers = [relative_error(states, whole) for states, whole in zip(outputs.attention, full.attention, strict=True)]
    return {
        "logits": relative_error(logits - logits.mean(-1, keepdim=True), wanted - wanted.mean(-1, keepdim=True)),
        "layers": layers,
        "attention": sum(layers) / len(layers),
    }


def relative_error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """`|value - wanted| / |wanted|` in the Euclidean norm over all elements."""
    return float((value - wanted).norm() / wanted.norm().clamp(min=1e-30))
