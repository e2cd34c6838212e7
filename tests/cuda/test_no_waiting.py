"""How often the host waits for the device: never in a decoding step, and a few times when something is packed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvcompress_hf as kvc
from kvcompress_hf import kernels
from kvcompress_hf.runtime.attention import PagedAttention

ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal.default")


class Questions(TorchDispatchMode):
    """Notes every operation whose result, or whose result's size, the host has to wait for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.asked: list[str] = []
        for name in ("tolist", "cpu", "numpy"):  # on the CPU these pass the dispatcher by
            plain = getattr(torch.Tensor, name)
            monkeypatch.setattr(
                torch.Tensor, name, lambda x, *a, plain=plain, name=name: self.note(name) or plain(x, *a)
            )

    def note(self, name: str) -> None:
        self.asked.append(name)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        index = (
            args[1] if name.startswith("aten.index") and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        )
        masks = [x for x in index if isinstance(x, torch.Tensor) and x.dtype is torch.bool]
        if any(part in name for part in ASKING) or (masks and not name.startswith("aten.index_put")):
            self.note(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(eos_token_id=2, initializer_range=0.02, vocab_size=101, num_hidden_layers=1, head_dim=64).half()


def test_questions_are_noticed(monkeypatch):
    asks = [
        lambda x: int(x.max()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 1],
        lambda x: torch.nonzero(x),
        lambda x: torch.equal(x, x),
        lambda x: bool((x > 1).any()),
    ]
    for ask in asks:
        with monkeypatch.context() as patch, Questions(patch) as questions:
            ask(torch.arange(3))
        assert questions.asked
    with monkeypatch.context() as patch, Questions(patch) as questions:
        torch.arange(3)[torch.tensor([0, 1])].add_(1)
    assert not questions.asked


@pytest.mark.parametrize(
    "preset, changes, max_bytes",
    [
        ("lossless", {}, None),
        ("k8v4", {}, 1 << 22),
        ("kv-compress", {"budget": 0.3}, None),
        ("leankv", {}, None),
        ("roco", {"budget": 24}, 1 << 22),
        ("auto", {"budget": 0.3}, None),
    ],
)
def test_decoding_asks_nothing(model, monkeypatch, shim, preset, changes, max_bytes):
    monkeypatch.setattr(kernels, "get_backend", lambda device: shim)
    recipe = kvc.get_preset(preset).with_overrides(**changes)
    cache = kvc.CompressedPagedCache(model.config, recipe, max_bytes=max_bytes)
    ids = torch.randint(3, 101, (2, 50))
    quiet = 0
    with torch.no_grad(), kvc.patched(model, recipe):
        model(ids, past_key_values=cache)
        for _ in range(36):
            packings = cache.inspect().statistics.packings
            with monkeypatch.context() as patch, Questions(patch) as questions:
                model(ids[:, :1], past_key_values=cache)
            if cache.inspect().statistics.packings == packings:
                assert questions.asked == []
                quiet += 1
    assert 30 < quiet < 36


def test_a_replayed_step_asks_nothing(model, capturers, monkeypatch):
    asked, ids = [], torch.randint(3, 101, (2, 50))
    replay = PagedAttention.replay

    def watched(self, start):
        packings = self.statistics.packings
        with monkeypatch.context() as patch, Questions(patch) as questions:
            done = replay(self, start)
        if self.statistics.packings == packings:
            asked.append(list(questions.asked))
        return done

    monkeypatch.setattr(PagedAttention, "replay", watched)
    for preset, changes in (("k8v4", {}), ("auto", {"budget": 0.3}), ("kv-compress", {"budget": 0.5})):
        asked.clear()
        with kvc.patched(model, preset, linears="stock", **changes):
            model.generate(ids, max_new_tokens=40, do_sample=False, kvcompress={"graph": True})
        assert len(asked) > 30 and not any(asked)


# What is counted here runs on a device that only pretends to be one (far_device.py), in a process of its own.
FAR = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch cannot have a device made in Python",
)
#: Most waits of a step that packs the tail, of one that plans as well, and of a prompt of one chunk.
LIMITS = {
    "k8v4": dict(packing=0, prompt=1),
    "k4v2, window": dict(packing=1, prompt=2),
    "kv-compress": dict(plan=2, prompt=2),
    "leankv": dict(plan=2, prompt=2),
    "roco": dict(plan=2, prompt=2),
    "auto": dict(plan=2, prompt=3),
    "auto, means": dict(plan=2, prompt=3),
    "auto, masks": dict(plan=3, prompt=4),
    "auto, window": dict(plan=3, prompt=4),
    "kvzip": dict(packing=0, prompt=0, second_reading=2),
    "snapkv": dict(packing=0, prompt=2),
}
MORE_LIMITS = {
    "pyramidkv": dict(packing=0, prompt=2),
    "k4v2, masks": dict(packing=1, prompt=2),
    "lossless": dict(packing=0, prompt=0),
    "k8v4, max_bytes": dict(packing=0, prompt=1),
    "kv-compress, tokens": dict(plan=2, prompt=2),
    "kv-compress, bytes": dict(plan=2, prompt=2),
    "kv-compress, padding": dict(plan=2, prompt=3),
    "leankv, budget": dict(plan=2, prompt=2),
    "h2o": dict(plan=2, prompt=2),
    "tova": dict(plan=2, prompt=2),
    "auto, padding": dict(plan=2, prompt=4),
    "auto, max_bytes": dict(plan=2, prompt=3),
    "auto-kvzip": dict(plan=2, prompt=1, second_reading=3),
    "scissorhands": dict(plan=2, prompt=2),
    "ada-snapkv": dict(packing=0, prompt=2),
    "streaming": dict(plan=2, prompt=2),
    "streaming, reindexed": dict(plan=4, prompt=4),
    "keydiff": dict(plan=2, prompt=2),
    "expected-attention": dict(packing=0, prompt=2),
}


def far(script: str, *arguments: str) -> str:
    """What a script prints that uses the pretended device."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def check_limits(limits: dict[str, dict[str, int]], *options: str) -> None:
    counted = json.loads(far("waits.py", "--json", *options, *limits))
    for name, most in limits.items():
        steps = counted[name]
        assert steps["quiet"] and not any(steps["quiet"]), f"{name}: a quiet step waits: {steps['quiet']}"
        for kind, limit in most.items():
            waits = steps[kind.replace("_", " ")]
            worst = max(waits, key=lambda places: sum(places.values()))
            assert sum(worst.values()) <= limit, f"{name}, {kind}: {worst}"


@FAR
def test_packing_and_planning_ask_only_what_the_host_must_know(shim_library):
    check_limits(LIMITS)


@FAR
@pytest.mark.slow
def test_so_do_other_recipes(shim_library):
    check_limits(MORE_LIMITS)


@FAR
def test_a_device_that_is_not_asked_holds_the_same(shim_library):
    """The same slots and bytes as where everything is asked: lists may be longer than what is in them."""
    far("waits.py", "--same", "kv-compress", "events")


@FAR
def test_replayed_steps_ask_no_more_and_hold_the_same(shim_library):
    """Captured and replayed on the device, run one by one on the host."""
    check_limits({name: LIMITS[name] for name in ("k8v4", "auto", "kv-compress")}, "--replayed", "--same")


@FAR
def test_a_device_without_kernels_does_the_same_in_plain_torch():
    """No host tensor among its own, no memory read behind its back: pages, plans and outputs as on the CPU."""
    far("waits.py", "--same", "--reference", "kv-compress", "k8v4", "leankv", "roco", "auto", "auto, means", "events")


@FAR
def test_lists_as_long_as_they_may_get_say_the_same():
    assert far("far_lists.py").endswith("right\n")


@FAR
def test_every_kind_of_wait_is_noticed():
    assert json.loads(far("far_device.py")) == {"missed": [], "imagined": []}
