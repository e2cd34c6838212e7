"""The only place of these tests that looks behind the public face of a cache; adapt it here when the inside changes.

Everything else goes through `CompressedPagedCache`.
"""

import sys
import weakref

import torch


def _attention(cache):
    return cache._attention


def arenas(cache):
    """The page pools of a cache."""
    return list(_attention(cache).arenas)


def stores(cache):
    """The owners of pages of a cache."""
    return list(_attention(cache).stores)


def pages_named(store):
    """Page ids that a store's tables name within the lengths of their rows, with repeats."""
    return store.live_ids().long()


def owners(arena):
    """Everything alive that holds pages of an arena."""
    gone = {id(owner) for owner in arena._abandoned}  # dropped caches whose pages the next change gives back
    return [owner for owner in arena._alive() if id(owner) not in gone]


def references(arena):
    """References by page id, -1 where there is no page."""
    assert arena.live >= 0  # which gives back what finalisers have left
    return arena.references.long()


def addresses(arena):
    """Where kernels look for each slab, and where it really is."""
    real = [slab.data_ptr() if slab.shape[0] else 0 for slab in arena.slabs]
    return arena.slab_addresses.tolist(), real


def arena_bytes(arena):
    """Bytes that the slabs take, by walking their storages."""
    return sum(slab.untyped_storage().nbytes() for slab in arena.slabs if slab.shape[0])


def allocating_classes():
    """Classes whose methods allocate: what an allocator may refuse."""
    from kvcompress_hf.paging.arena import Arena

    return [Arena]


def kernel_classes():
    """Classes whose methods are the operations on pages of the CPU."""
    import kvcompress_hf.kernels as kernels

    backend = type(kernels.get_backend("cpu"))
    module = sys.modules[backend.__module__]
    return [backend, module._CpuDecodePlan]


def held_bytes(root):
    """Bytes of every distinct tensor storage reachable from an object through attributes and containers."""
    seen, storages, queue = set(), {}, [_attention(root)]
    skipped = (str, bytes, int, float, type, torch.dtype, torch.device, weakref.ref)
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, skipped):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            queue += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            queue += list(item)
        elif type(item).__module__.split(".")[0] == "kvcompress_hf" or hasattr(item, "func"):
            queue += list(getattr(item, "__dict__", {}).values())
            slots = (name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ()))
            queue += [getattr(item, name) for name in slots if hasattr(item, name)]
            if hasattr(item, "func"):  # functools.partial
                queue += [item.func, *item.args, *item.keywords.values()]
    return sum(storages.values())
