"""The way of a new key from the attention layer to a page: `python tests/test_walk.py -v` shows it.

A tiny Llama reads a prompt, a second chunk and one token. In the last two, every Python function of the package that
is handed the first layer's new keys is noted: in a tensor, or in an object up to three levels deep. What a function
makes of them (a copy, the same less its mean) counts as keys from there on.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument

ROOMS = ["patches", "cache", "runtime", "observers", "plans", "paging", "kernels"]  # as the arrows run
#: Files of the kernels that look at a tensor for the function before: shapes, addresses, strides.
LEAVES = {("kernels", "checks"), ("kernels", "arguments")}


def room_of(filename):
    """The room of a source file, or `None` for files of others."""
    parts = Path(filename).with_suffix("").parts
    for top in ("kvcompress_hf", "patches", "kernels"):
        if top in parts:
            inside = parts[len(parts) - parts[::-1].index(top) :]
            return inside[0] if top == "kvcompress_hf" else top
    return None


def tensors_in(value, name, depth=3):
    """Pairs of names and tensors in a value: itself, or what its fields hold."""
    if isinstance(value, torch.Tensor):
        yield name, value
        return
    if depth == 0 or value is None or isinstance(value, (str, int, float, torch.nn.Module)):
        return
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = value._asdict()
    elif isinstance(value, (list, tuple)):
        for each in value[:4]:
            yield from tensors_in(each, name, depth - 1)
        return
    elif type(value).__module__.split(".")[0] in ("kvcompress_hf", "patches", "kernels"):
        if dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
        else:
            slots = getattr(type(value), "__slots__", ())
            fields = {f: getattr(value, f, None) for f in ([slots] if isinstance(slots, str) else slots)}
    else:
        return
    for field, each in fields.items():
        yield from tensors_in(each, field, depth - 1)


class Walk:
    """Functions that are handed the keys of one call, in the order of the calls."""

    def __init__(self):
        self.stops, self.names, self.storages, self.kept, self._open = [], [], set(), [], []

    def _is_key(self, tensor):
        return tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in self.storages

    def add(self, tensor):
        self.storages.add(tensor.untyped_storage().data_ptr())
        self.kept.append(tensor)  # or its address could be another's

    def event(self, frame, event, value):
        if event not in ("call", "return") or (room := room_of(frame.f_code.co_filename)) not in ROOMS:
            return
        code = frame.f_code
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
        arguments = {name: frame.f_locals.get(name) for name in code.co_varnames[:count] if name != "self"}
        if event == "call":
            if not self.kept and isinstance(arguments.get("key"), torch.Tensor):
                self.add(arguments["key"])
            found = [name for key, each in arguments.items() for name, t in tensors_in(each, key) if self._is_key(t)]
            if found:
                if (room, Path(code.co_filename).stem) in LEAVES:
                    return
                self.stops.append((room, Path(code.co_filename).name, code.co_name))
                self.names += [name for name in found if name not in self.names]
                held = (t for key, each in arguments.items() for _, t in tensors_in(each, key) if self._is_key(t))
                self._open.append((frame, next(held)))
        elif self._open and self._open[-1][0] is frame:
            _, key = self._open.pop()
            if isinstance(value, torch.Tensor) and value.shape == key.shape and value.dtype == key.dtype:
                self.add(value)

    def summary(self):
        """Functions, rooms, turns back to a room that lies higher, and names."""
        rooms = [room for room, _, _ in self.stops]
        places = [ROOMS.index(room) for room in rooms if room in ROOMS]
        return {
            "functions": len(self.stops),
            "rooms": len(set(rooms)),
            "files": len({(room, file) for room, file, _ in self.stops}),
            "turns back": sum(b < a for a, b in itertools.pairwise(places)),
            "names": len(self.names),
        }


@torch.no_grad()
def walk(recipe, tokens):
    """The walk of the first layer's keys in a forward pass of so many tokens behind a prompt of 96."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    model = kvc.patch(LlamaForCausalLM(config).eval(), recipe)
    cache = kvc.CompressedPagedCache(model.config, recipe)
    ids = torch.randint(3, 64, (1, 96 + 2 * tokens))
    model(ids[:, :96], **as_argument(model, cache))
    model(ids[:, 96 : 96 + tokens], **as_argument(model, cache))
    seen = Walk()
    sys.setprofile(seen.event)
    try:
        model(ids[:, 96 + tokens :], **as_argument(model, cache))
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize("recipe", ["k8v4", "kv-compress"])
def test_a_decoded_token_goes_straight_down(recipe):
    way = walk(kvc.get_preset(recipe), 1).summary()
    assert way["turns back"] == 0 and 4 <= way["functions"] <= 11 and way["names"] <= 2


@pytest.mark.parametrize("recipe, turns", [("k8v4", 1), ("kv-compress", 2)])
def test_a_chunk_turns_back_once_for_each_that_uses_it(recipe, turns):
    """Attention, the observer where there is one, and the store are given the keys one after the other."""
    seen = walk(kvc.get_preset(recipe), 32)
    way = seen.summary()
    assert seen.stops[-1] == ("kernels", "backend.py", "pack")
    assert way["turns back"] <= turns and way["functions"] <= 26 and way["names"] <= 5


def main():
    for recipe, tokens in (("k8v4", 1), ("kv-compress", 1), ("k8v4", 32), ("kv-compress", 32)):
        seen = walk(kvc.get_preset(recipe), tokens)
        print(f"{recipe}, {tokens} new: {seen.summary()}")
        print(f"    names: {', '.join(seen.names)}")
        if "-v" in sys.argv:
            for stop in seen.stops:
                print("   ", *stop)


if __name__ == "__main__":
    main()
