"""Counts how often the host waits for the device: per recipe and kind of step, with the places that ask.

    python tests/cuda/waits.py [--places] [recipe ...]

The package runs on [`far_device`], with the CUDA kernels on the CPU behind it. Prints a table, and JSON with `--json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from far_device import FAR, FarDevice, taken

import kvcompress_hf as kvc
from kvcompress_hf import kernels
from kvcompress_hf.kernels import ReferenceBackend, get_backend
from kvcompress_hf.kernels.cuda import CudaBackend
from kvcompress_hf.kernels.host_shim import build_shim
from kvcompress_hf.kernels.host_shim.recording import RecordingLauncher, TapeCapturer
from kvcompress_hf.paging.key_turn import Rotation
from kvcompress_hf.paging.waiting import to_device
from kvcompress_hf.runtime.attention import PagedAttention
from kvcompress_hf.runtime.call import AttentionCall
from kvcompress_hf.runtime.replay import Capturer, StepReplay

LAYERS, BATCH, Q_HEADS, KV_HEADS, HEAD_DIM = 2, 2, 4, 2, 64
PROMPT, STEPS = 70, 18

#: Presets with changes; most bytes of pages, sliding window of the last layer, padding of the first sequence, whether
#: masks come with every step, and whether sequences are shuffled, tokens taken back and caches forked meanwhile.
CASES: dict[str, dict[str, Any]] = {
    "lossless": dict(preset="lossless", when={"every": 8}),
    "k8v4": dict(preset="k8v4", when={"every": 8}),
    "k8v4, max_bytes": dict(preset="k8v4", when={"every": 8}, max_bytes=1 << 22),
    "k4v2, window": dict(preset="k4v2", when={"every": 8}, window=24),
    "k4v2, masks": dict(preset="k4v2", when={"every": 8}, padding=9, masks=True),
    "kv-compress": dict(preset="kv-compress", budget=0.5),
    "kv-compress, tokens": dict(preset="kv-compress", budget=40),
    "kv-compress, bytes": dict(preset="kv-compress", budget="200KiB"),
    "kv-compress, padding": dict(preset="kv-compress", budget=0.5, padding=9),
    "leankv": dict(preset="leankv"),
    "leankv, budget": dict(preset="leankv", budget=0.3),
    "roco": dict(preset="roco", budget=24),
    "h2o": dict(preset="h2o", budget=0.9, protect={"recent": 8}),
    "tova": dict(preset="tova", budget=24),
    "auto": dict(preset="auto", budget=0.3, protect={"recent": 8}),
    "auto, means": dict(preset="auto", budget=0.3, protect={"recent": 8}, evicted="mean"),
    "auto, packing only": dict(preset="auto", budget=0.9, protect={"recent": 8}),
    "auto, window": dict(preset="auto", budget=0.3, protect={"recent": 8}, window=24),
    "auto, masks": dict(preset="auto", budget=0.3, protect={"recent": 8}, padding=9, masks=True),
    "auto, padding": dict(preset="auto", budget=0.3, protect={"recent": 8}, padding=9),
    "auto, max_bytes": dict(preset="auto", budget=0.3, protect={"recent": 8}, max_bytes=1 << 22),
    "auto, short of memory": dict(preset="auto", budget=0.5, max_bytes=120_000),
    "events": dict(preset="auto", budget=0.3, protect={"recent": 8}, window=24, padding=9, events=True),
    "scissorhands": dict(preset="scissorhands", budget=40),
    "kvzip": dict(preset="kvzip", budget=0.5),
    "auto-kvzip": dict(preset="auto-kvzip", budget=0.3, protect={"recent": 8}),
    "snapkv": dict(preset="snapkv", budget=0.5),
    "pyramidkv": dict(preset="pyramidkv", budget=0.5),
    "ada-snapkv": dict(preset="ada-snapkv", budget=0.5),
    "streaming": dict(preset="streaming", budget=40),
    "streaming, reindexed": dict(preset="streaming", budget=40, positions="reindexed"),
    "keydiff": dict(preset="keydiff", budget=0.5, protect={"recent": 8}),
    "expected-attention": dict(preset="expected-attention", budget=0.5),
}


def steps_of(
    device: torch.device,
    preset: str,
    max_bytes: int | None = None,
    window: int | None = None,
    padding: int = 0,
    masks: bool = False,
    events: bool = False,
    capturer: Capturer | None = None,
    **changes: Any,
) -> Iterator[tuple[str, dict[str, int], Callable[[], tuple[object, ...]]]]:
    """Runs a prompt and decoding steps; with a capturer all but the first of these are replayed.

    Yields:
        The kind of each step, its waits by place, and a function that tells what is stored.
    """
    recipe = kvc.get_preset(preset).with_overrides(**changes)
    windows = [None] * (LAYERS - 1) + [window]
    turning = 1e4 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    reindexed = turning if recipe.positions == "reindexed" else None
    attention = PagedAttention([recipe], windows, max_bytes=max_bytes, inv_freq=reindexed)
    attention.rotations = [Rotation(turning)] * LAYERS
    forks: list[PagedAttention] = []
    generator = torch.Generator().manual_seed(0)

    def randn(heads: int, tokens: int) -> torch.Tensor:
        x = torch.randn((BATCH, tokens, heads, HEAD_DIM), generator=generator)
        x = (x * torch.rand((1, tokens, 1, 1), generator=generator)).half()
        return to_device(x, device).transpose(1, 2)

    outputs: list[torch.Tensor] = []  # of the last step, of each layer
    static: list[tuple[torch.Tensor, ...]] = []  # where a captured step finds its queries, keys and values
    replays: list[tuple[PagedAttention, StepReplay]] = []

    def attend(news: list[tuple[torch.Tensor, ...]], mask: torch.Tensor | None) -> list[torch.Tensor]:
        dense = [torch.zeros_like(new[0].transpose(1, 2)) for new in news]
        outputs = []
        for layer, (new, width, out) in enumerate(zip(news, windows, dense, strict=True)):
            logits = attention.layers[layer].logits_of(HEAD_DIM**-0.5, None, width, None)
            outputs.append(attention.attend(layer, AttentionCall(*new, logits), mask, lambda out=out: out))
        return outputs

    def forward(tokens: int, mask: torch.Tensor | None) -> None:
        news = [(randn(Q_HEADS, tokens), randn(KV_HEADS, tokens), randn(KV_HEADS, tokens)) for _ in windows]
        if capturer is None or tokens > 1 or not static:
            outputs[:] = attend(news, mask)
            if tokens == 1 and capturer is not None:
                static[:] = [tuple(each.clone() for each in new) for new in news]
            return
        if not replays or replays[-1][0] is not attention:
            replays.append((attention, StepReplay(attention, capturer)))
        for here, new in zip(static, news, strict=True):
            for buffer, each in zip(here, new, strict=True):
                buffer.copy_(each)
        outputs[:] = replays[-1][1].step(lambda: attend(static, None))

    mask = None
    if padding:
        allowed = torch.ones((BATCH, 1, PROMPT, PROMPT), dtype=torch.bool).tril()
        allowed[0, :, :, :padding] = False
        mask = to_device(allowed, device)

    def stored() -> tuple[object, ...]:
        slots = [positions.tolist() for store in attention.stores for positions in store.positions() or []]
        for store in attention.stores:
            lengths = store.lengths.near if device == FAR else store.lengths
            if not torch.equal(store.lengths_on_host(), lengths):
                raise AssertionError("the host believes in other lengths than the device has")
        return slots, attention.nbytes, attention.statistics.evicted_slots, [out.tolist() for out in outputs]

    taken()
    forward(PROMPT, mask)
    yield "prompt", taken(), stored
    if attention.awaits_second_reading:
        with attention.second_reading():
            forward(PROMPT, mask)
        yield "second reading", taken(), stored
    for step in range(STEPS):
        if events and step in (3, 11):
            attention.select(torch.tensor([1, 0] if step == 3 else [1, 1]))
        if events and step in (5, 12):
            attention.crop(2)
        if events and step in (7, 13):
            forks.append(attention)
            attention = attention.fork()
        before = attention.statistics.packings, attention.statistics.plans
        forward(1, torch.ones((BATCH, 1, 1, 1), dtype=torch.bool, device=device) if masks else None)
        packings, plans = attention.statistics.packings - before[0], attention.statistics.plans - before[1]
        yield ("plan" if plans else "packing" if packings else "quiet"), taken(), stored
    if capturer is not None and not attention.statistics.replays:
        raise AssertionError("no step was replayed")


def backend_for(device: torch.device, order: str, reference: bool) -> Any:
    """The CUDA kernels on the CPU for a device, or plain torch: what a device without kernels gets."""
    if reference:
        return get_backend(device) if device == FAR else ReferenceBackend()
    launcher = RecordingLauncher(build_shim(Path(__file__).parents[2] / "build" / "host_shim"), order)
    launcher.device_type = device.type
    return CudaBackend(launcher)


def count(
    names: list[str],
    order: str = "ascending",
    same: bool = False,
    reference: bool = False,
    replayed: bool = False,
) -> dict[str, dict[str, list[dict[str, int]]]]:
    """All steps of some cases: waits by place, by case and kind of step.

    Args:
        names: Which of [`CASES`].
        order: Schedule of the threads.
        same: Check against the same kernels on host tensors, where all asking is done: the same slots, bytes and
            outputs.
        reference: Plain torch instead of the kernels.
        replayed: Capture and replay steps on the device.
    """
    result: dict[str, dict[str, list[dict[str, int]]]] = {}
    for name in names:
        result[name] = {}
        ends: dict[torch.device, list[tuple[object, ...]]] = {}
        for device in (FAR, torch.device("cpu")) if same else (FAR,):
            backend = backend_for(device, order, reference)
            kernels.get_backend = lambda device, backend=backend: backend
            capturer = TapeCapturer(backend.launcher) if replayed and device == FAR else None
            with torch.no_grad(), FarDevice():
                for kind, waits, stored in steps_of(device, capturer=capturer, **CASES[name]):
                    if device == FAR:
                        result[name].setdefault(kind, []).append(waits)
                    if kind != "quiet":
                        ends.setdefault(device, []).append(stored())
                    taken()
        if any(end != ends[FAR] for end in ends.values()):
            raise AssertionError(f"{name}: device and host do not hold the same: {ends}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"any of {', '.join(CASES)}")
    parser.add_argument("--places", action="store_true", help="who asks what, in the step with the most waits")
    parser.add_argument("--json", action="store_true", help="print all that was counted")
    parser.add_argument("--same", action="store_true", help="check that a device holds what the host does")
    parser.add_argument("--reference", action="store_true", help="plain torch in place of the kernels")
    parser.add_argument("--replayed", action="store_true", help="capture steps and replay them, as a CUDA graph")
    options = parser.parse_args()
    result = count(
        options.cases or list(CASES), same=options.same, reference=options.reference, replayed=options.replayed
    )
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    kinds = ("quiet", "packing", "plan", "prompt", "second reading")
    lines = [f"{'most waits of a step':24}" + "".join(f"{kind:>16}" for kind in kinds)]
    for name, steps in result.items():
        most = {kind: max(sum(w.values()) for w in steps[kind]) for kind in steps}
        lines.append(f"{name:24}" + "".join(f"{most.get(kind, '-'):>16}" for kind in kinds))
        for kind in kinds[1:] if options.places else ():
            worst: Counter[str] = Counter(max(steps.get(kind, [{}]), key=lambda w: sum(w.values())))
            lines += [f"    {kind:8} {n:3} {place}" for place, n in worst.most_common()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
