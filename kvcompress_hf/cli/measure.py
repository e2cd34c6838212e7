"""Run one prompt under one cache and measure it: tokens, bytes that exist, speed, peak memory."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

import kvcompress_hf as kvc

PARTS = ("payload", "metadata", "fields", "tail", "tables", "slack", "free", "forks")


@dataclass(frozen=True)
class Method:
    """One way of keeping the cache: a title, and the stock cache or a recipe (`None`: the library's default)."""

    title: str
    recipe: str | kvc.Recipe | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    stock: bool = False


@dataclass
class Measured:
    """What one `generate` call did.

    Args:
        tokens: the new tokens.
        memory: bytes at the end, by part (`PARTS`), plus `total` and `dense` (the same tokens in a stock cache).
        peak_cache: the most bytes the cache held at any time.
        peak_process: growth of the process's resident memory over its size at the start, at its highest; `None`
            where the system does not tell.
        prompt_tokens: length of the prompt.
        prefill_seconds: from the call to the first token, compression included.
        decode_seconds: from the first token to the last.
        slots: slots kept, `[layers, kv_heads]`, mean over the batch; `None` for the stock cache.
    """

    tokens: list[int]
    memory: dict[str, int]
    peak_cache: int
    peak_process: int | None
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    slots: torch.Tensor | None

    @property
    def decode_steps(self) -> int:
        """Steps timed by `decode_seconds`: the first token belongs to the prefill."""
        return len(self.tokens) - 1


class Stopwatch(StoppingCriteria):
    """Notes the time after each token and never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class ResidentPeak:
    """Growth of the process's resident memory at its highest, by the kernel's own mark (Linux)."""

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
            self.start: int | None = self._read("VmRSS")
        except OSError:
            self.start = None

    @staticmethod
    def _read(key: str) -> int:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found is None:
            raise OSError(f"no {key} in /proc/self/status")
        return int(found[1]) * 1024

    def growth(self) -> int | None:
        """Bytes above the start at the highest, or `None` where it cannot be known."""
        return None if self.start is None else max(0, self._read("VmHWM") - self.start)


def dense_bytes(cache: DynamicCache) -> int:
    """Bytes of a stock cache's key and value storages."""
    layers: list[Any] = cache.layers
    tensors = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.untyped_storage().nbytes() for t in tensors)


def using(model: Any, method: Method) -> AbstractContextManager[Any]:
    """The model under a method for the length of a `with` block; afterwards it is as it was found."""
    return nullcontext() if method.stock else kvc.patched(model, method.recipe, **method.overrides)


def run(
    model: Any,
    input_ids: torch.Tensor,
    *,
    new_tokens: int,
    chunk: int | None = None,
    stop_at_eos: bool = False,
) -> Measured:
    """Generate greedily with the cache the model makes now (see `using`) and measure it.

    Args:
        model: any supported causal language model.
        input_ids: one prompt, `[1, tokens]`.
        new_tokens: how many tokens to generate.
        chunk: prefill the prompt in chunks of this many tokens.
        stop_at_eos: let the model end earlier; otherwise exactly `new_tokens` are made, so that speeds compare.

    Returns:
        The measurements.
    """
    watch = Stopwatch()
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": None if stop_at_eos else new_tokens,
        "do_sample": False,
        "return_dict_in_generate": True,
        "stopping_criteria": StoppingCriteriaList([watch]),
        "attention_mask": torch.ones_like(input_ids),
    }
    if chunk is not None:
        options["prefill_chunk_size"] = chunk
    peak = ResidentPeak()
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(input_ids, **options)
    growth = peak.growth()
    cache: Any = kvc.cache_of(out)
    slots = None
    if isinstance(cache, DynamicCache):
        total = peak_cache = dense_bytes(cache)
        memory = dict.fromkeys(PARTS, 0) | {"payload": total, "total": total, "dense": total}
    else:
        report = cache.memory()
        memory = {part: int(getattr(report, part)) for part in (*PARTS, "total", "dense")}
        peak_cache = cache.run_report.statistics.peak_bytes
        slots = torch.stack([layer.float().mean(0).cpu() for layer in cache.slots()])
    return Measured(
        tokens=out.sequences[0, input_ids.shape[1] :].tolist(),
        memory=memory,
        peak_cache=peak_cache,
        peak_process=growth,
        prompt_tokens=input_ids.shape[1],
        prefill_seconds=watch.times[0] - start,
        decode_seconds=watch.times[-1] - watch.times[0],
        slots=slots,
    )


def same_prefix(a: list[int], b: list[int]) -> float:
    """Share of the tokens before two continuations first differ, of the longer one's length."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    longest = max(len(a), len(b))
    return same / longest if longest else 1.0


@dataclass
class Summary:
    """The runs of one method, summed up as one line of the table."""

    method: Method
    runs: list[Measured] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    right: int = 0

    def mean(self, part: str) -> float:
        """Mean bytes of one part of the memory over the runs."""
        return sum(run.memory[part] for run in self.runs) / len(self.runs)

    def to_dict(self) -> dict[str, Any]:
        """Every figure, ready for JSON; bytes are means over the runs, peaks are the highest."""
        memory = {part: round(self.mean(part)) for part in (*PARTS, "total", "dense")}
        processes = [run.peak_process for run in self.runs if run.peak_process is not None]
        decode = sum(run.decode_seconds for run in self.runs)
        slots = [run.slots for run in self.runs if run.slots is not None]
        return {
            "title": self.method.title,
            "overrides": dict(self.method.overrides),
            "questions": len(self.runs),
            "right": self.right,
            "same_tokens": sum(self.same) / len(self.same) if self.same else None,
            "bytes": memory,
            "ratio": memory["total"] / memory["dense"],
            "prefill_tokens_per_second": sum(run.prompt_tokens for run in self.runs)
            / sum(run.prefill_seconds for run in self.runs),
            "decode_tokens_per_second": sum(run.decode_steps for run in self.runs) / decode if decode else None,
            "peak_cache_bytes": max(run.peak_cache for run in self.runs),
            "peak_process_bytes": max(processes) if processes else None,
            "slots_kept": torch.stack(slots).mean(0).tolist() if slots else None,
        }
