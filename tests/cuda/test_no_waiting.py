"""A decoding step that packs nothing never asks the device for anything: the host may run ahead of it."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import kvcompress_hf as kvc
from kvcompress_hf import kernels

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
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().half()


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
            packings = cache._attention.statistics.packings
            with monkeypatch.context() as patch, Questions(patch) as questions:
                model(ids[:, :1], past_key_values=cache)
            if cache._attention.statistics.packings == packings:
                assert questions.asked == []
                quiet += 1
    assert 30 < quiet < 36
