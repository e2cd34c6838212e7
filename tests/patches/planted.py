"""Faults planted in the package, each of which a dry run must refuse."""

import torch

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.patches import interface, swap
from kvcompress_hf.patches.families import PagedLlamaAttention


def in_attend(change):
    """Plants a fault where the cache is asked: `change` may alter the arguments, or answer itself."""

    def plant(monkeypatch):
        attend = CompressedPagedCache.attend

        def faulty(self, layer_idx, query, key, value, attention_mask, **how):
            call = {"layer": layer_idx, "value": value, "mask": attention_mask, **how}
            answer = change(call)
            if answer is not None:
                return answer
            call.pop("layer")
            return attend(self, layer_idx, query, key, call.pop("value"), call.pop("mask"), **call)

        monkeypatch.setattr(CompressedPagedCache, "attend", faulty)

    return plant


def _sees_the_future(call):
    rows, _, tokens, _ = call["value"].shape
    call["mask"] = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)


def _window(by):
    def change(call):
        if call.get("sliding_window") is not None:
            call["sliding_window"] += by

    return change


def _without(name):
    def change(call):
        call[name] = None

    return change


def scaled(call):
    call["scaling"] *= 1.02


def _skips_layer_1(call):
    return call["dense"]() if call["layer"] == 1 else None


def _values_of_another_layer():
    last = {}

    def change(call):
        mine, other = call["value"], last.get("value")
        last["value"] = mine
        if call["layer"] == 1 and other is not None and other.shape == mine.shape:
            call["value"] = other.to(mine.dtype)

    return change


def _rotate(key, start):
    """One more rotary embedding, over the halves of a head."""
    half = key.shape[-1] // 2
    angle = torch.arange(start, start + key.shape[2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = (f(angle).repeat(1, 2).to(key.dtype) for f in (torch.cos, torch.sin))
    return key * cos + torch.cat([-key[..., half:], key[..., :half]], -1) * sin


def _keys_rotated_twice(monkeypatch):
    update, rotate = CompressedPagedCache.update, PagedLlamaAttention.rotate

    def in_update(self, key, value, layer_idx, *args, **kwargs):
        return update(self, _rotate(key, self.get_seq_length()), value, layer_idx, *args, **kwargs)

    def in_rotate(query, key, cos, sin):
        query, once = rotate(query, key, cos, sin)
        return query, rotate(key, once, cos, sin)[1]

    monkeypatch.setattr(CompressedPagedCache, "update", in_update)  # the interface's way
    monkeypatch.setattr(PagedLlamaAttention, "rotate", staticmethod(in_rotate))


def layer_keeps_to_itself(monkeypatch):
    """A layer that attends to new tokens only, by its stock forward, and never asks the cache."""
    paged, attend = swap._paged_attention, interface._attend

    def in_swap(module, cache, hidden_states, position_embeddings, attention_mask, *rest):
        if module.layer_idx == 1:
            stock = type(module).__bases__[1].forward
            return stock(module, hidden_states, position_embeddings, attention_mask)
        return paged(module, cache, hidden_states, position_embeddings, attention_mask, *rest)

    def in_interface(stock, module, query, key, value, mask, dropout, scaling, kwargs):
        if module.layer_idx == 1:
            key._kvc.cache._pending[1] = 0
            return stock(module, query, key, value, mask, dropout=0.0, scaling=scaling, **kwargs)[0]
        return attend(stock, module, query, key, value, mask, dropout, scaling, kwargs)

    monkeypatch.setattr(swap, "_paged_attention", in_swap)
    monkeypatch.setattr(interface, "_attend", in_interface)


def _wrapper_drops_the_mask(monkeypatch):
    """Around the whole of our attention, so that the first chunk's dense attention misses the mask as well."""
    paged, attend = swap._paged_attention, interface._attend

    def in_swap(module, cache, hidden_states, position_embeddings, attention_mask, *rest):
        return paged(module, cache, hidden_states, position_embeddings, None, *rest)

    def in_interface(stock, module, query, key, value, mask, *rest):
        return attend(stock, module, query, key, value, None, *rest)

    monkeypatch.setattr(swap, "_paged_attention", in_swap)
    monkeypatch.setattr(interface, "_attend", in_interface)


#: Fault: what plants it, with pytest's monkeypatch.
FAULTS = {
    "no causal mask": in_attend(_sees_the_future),
    "window one too long": in_attend(_window(1)),
    "window one too short": in_attend(_window(-1)),
    "window ignored": in_attend(_without("sliding_window")),
    "soft cap ignored": in_attend(_without("softcap")),
    "sinks ignored": in_attend(_without("sinks")),
    "scaling 2 % off": in_attend(scaled),
    "keys rotated twice": _keys_rotated_twice,
    "layer answers without the cache": in_attend(_skips_layer_1),
    "layer never asks the cache": layer_keeps_to_itself,
    "values of another layer": lambda monkeypatch: in_attend(_values_of_another_layer())(monkeypatch),
    "mask dropped at the cache": in_attend(_without("mask")),
    "mask dropped by a wrapper": _wrapper_drops_the_mask,
}
