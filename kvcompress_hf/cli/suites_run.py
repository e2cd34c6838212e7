"""Filling caches with one prompt under many recipes, and scoring given answers on them.

A prompt goes through the model once. What its attention was given is kept, and every recipe's cache is filled from
that: observing, packing and planning run as in a prefill, the rest of the model does not run again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument
from kvcompress_hf.patches.generation import begin_pass
from kvcompress_hf.patches.second_reading import read_again

from .suites import Question


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
    """What the model makes of a question and its answer, and what its attention modules put out on the way.

    Args:
        logits: float32 `[tokens, vocabulary]`.
        attention: per layer float32 `[tokens, hidden]`.
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


def answer_on(model: Any, cache: Any, given: list[int], answer: list[int]) -> Outputs:
    """Feeds a question and its answer to a cache in one pass.

    No token of them is compressed: they are held back in the cache's tail, so a fork stays what its parent is.

    Args:
        model: the model, patched if the cache is a compressed one.
        cache: a compressed cache, changed by the call; `None` for a stock forward pass over everything given.
        given: tokens before the answer.
        answer: tokens of the answer; the last one is only predicted.

    Returns:
        The outputs at all positions that were fed.
    """
    if cache is not None:
        cache.activate_past_recording()
    ids = given + answer[:-1]
    with watching(model) as seen:
        logits = forward(model, ids, cache, len(ids))
    return Outputs(logits, seen)


def reference(model: Any, context: list[int], question: Question) -> Outputs:
    """What the model makes of a question with all of its context, in one stock forward pass.

    Args:
        model: the model, not patched.
        context: tokens before the question.
        question: the question and its answer.

    Returns:
        The outputs at the question's and the answer's positions.
    """
    whole = answer_on(model, None, context + question.ids, question.answer)
    start = len(context)
    # Copies, so that what the context made of itself is not kept as well.
    return Outputs(whole.logits[start:].clone(), [states[start:].clone() for states in whole.attention])


def answer_scores(outputs: Outputs, full: Outputs, answer: list[int]) -> dict[str, Any]:
    """How an answer fares, every token predicted from the right ones before it.

    Args:
        outputs: of a compressed cache; the last positions are the answer's.
        full: likewise with the full context.
        answer: its tokens.

    Returns:
        `exact` (every token is the most likely one, so greedy decoding gives the answer), `tokens` (share of tokens
        that are the most likely one), `same` (share whose most likely token is the full cache's), `kl` of full from
        compressed and `nll`, in nats per token.
    """
    logits, wanted = outputs.logits[-len(answer) :], full.logits[-len(answer) :]
    logp, full_logp = logits.log_softmax(-1), wanted.log_softmax(-1)
    target = torch.tensor(answer, device=logp.device)
    best = logits.argmax(-1)
    return {
        "exact": bool((best == target).all()),
        "tokens": float((best == target).float().mean()),
        "same": float((best == wanted.argmax(-1)).float().mean()),
        "kl": float((full_logp.exp() * (full_logp - logp)).sum(-1).mean()),
        "nll": float(-logp.gather(-1, target[:, None]).mean()),
    }


def output_errors(outputs: Outputs, full: Outputs) -> dict[str, Any]:
    """Relative errors: of the logits, each token's centred since softmax does not see a shift, and per layer.

    Args:
        outputs: of a compressed cache.
        full: with the full context.

    Returns:
        `logits`, `layers` and their mean, `attention`: norms of differences divided by norms, over the last of the
        tokens that both have.
    """
    tokens = outputs.logits.shape[0]
    wanted = full.logits[-tokens:]
    layers = [
        relative_error(states, whole[-tokens:]) for states, whole in zip(outputs.attention, full.attention, strict=True)
    ]
    return {
        "logits": relative_error(
            outputs.logits - outputs.logits.mean(-1, keepdim=True), wanted - wanted.mean(-1, keepdim=True)
        ),
        "layers": layers,
        "attention": sum(layers) / len(layers),
    }


def relative_error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """`|value - wanted| / |wanted|` in the Euclidean norm over all elements."""
    return float((value - wanted).norm() / wanted.norm().clamp(min=1e-30))
