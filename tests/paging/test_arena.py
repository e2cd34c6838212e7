"""The arena against a plain model: ids, reference counts, growth, trimming."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress_hf.errors import CacheMemoryError
from kvcompress_hf.paging import arena as arena_module
from kvcompress_hf.paging.arena import Arena

PAGE = 64


class Owner:
    """Holds page ids, writes a token into each page, and follows relocations."""

    def __init__(self, arena):
        self.arena, self.held, self.changes = arena, {}, 0
        arena.register(self)

    def take(self, count):
        for page in self.arena.allocate(count).tolist():
            assert page not in self.held
            self.held[page] = len(self.held) * 7 % 251
            self.write(page)

    def write(self, page):
        self.arena.slabs[page >> self.arena.slab_shift][page & ((1 << self.arena.slab_shift) - 1)] = self.held[page]

    def check(self):
        for page, token in self.held.items():
            stored = self.arena.slabs[page >> self.arena.slab_shift][page & ((1 << self.arena.slab_shift) - 1)]
            assert (stored == token).all()

    def relocate(self, new_id):
        self.held = {int(new_id[page]): token for page, token in self.held.items()}

    def slabs_changed(self):
        self.changes += 1


def small_arena(monkeypatch, pages=16, **kwargs):
    monkeypatch.setattr(arena_module, "_SLAB_BYTES", pages * PAGE)
    monkeypatch.setattr(arena_module, "_COPIED_BYTES", pages // 4 * PAGE)
    return Arena(PAGE, torch.device("cpu"), **kwargs)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(1, 70), st.tuples(st.just("drop"), st.integers(0, 100)), st.just("trim")), max_size=14
    )
)
def test_pages_keep_their_content_whatever_happens(steps):
    with pytest.MonkeyPatch.context() as monkeypatch:
        arena = small_arena(monkeypatch)
        owner = Owner(arena)
        for step in steps:
            if isinstance(step, int):
                owner.take(step)
            elif step == "trim":
                arena.trim()
                assert arena.pages - arena.live <= arena.live // 32
            else:
                gone = list(owner.held)[: len(owner.held) * step[1] // 100]
                arena.release(torch.tensor(gone, dtype=torch.int32))
                for page in gone:
                    del owner.held[page]
            owner.check()
            assert arena.live == len(owner.held)
            assert int((arena.references > 0).sum()) == len(owner.held)
            assert arena.nbytes == sum(slab.untyped_storage().nbytes() for slab in arena.slabs)


def test_an_empty_arena_gives_everything_back(monkeypatch):
    arena = small_arena(monkeypatch)
    owner = Owner(arena)
    owner.take(100)
    arena.release(torch.tensor(list(owner.held), dtype=torch.int32))
    owner.held.clear()
    arena.trim()
    assert arena.nbytes == 0 and arena.slabs == []


def test_pages_with_two_references_survive_one_release(monkeypatch):
    arena = small_arena(monkeypatch)
    ids = arena.allocate(5)
    arena.retain(ids[[0, 0, 1]])
    arena.release(ids)
    assert arena.references[ids.long()].tolist() == [2, 1, 0, 0, 0]
    assert arena.live == 2


def test_growing_never_moves_a_full_slab(monkeypatch):
    arena = small_arena(monkeypatch)
    arena.allocate(16)
    address = arena.slabs[0].data_ptr()
    arena.allocate(500)
    assert arena.slabs[0].data_ptr() == address == int(arena.slab_addresses[0])


def test_a_small_slab_grows_in_place_of_a_further_one(monkeypatch):
    arena = small_arena(monkeypatch)
    owner = Owner(arena)
    owner.take(3)
    owner.take(5)
    owner.check()
    assert len(arena.slabs) == 1 and owner.changes >= 2


def test_pages_are_handed_out_as_zeros(monkeypatch):
    arena = small_arena(monkeypatch)
    owner = Owner(arena)
    owner.take(40)
    arena.release(torch.tensor(list(owner.held), dtype=torch.int32))
    ids = arena.allocate(50)
    assert not arena.read(ids).any()


def test_page_ids_reach_no_further_than_the_pages_kept(monkeypatch):
    arena = small_arena(monkeypatch)
    owner = Owner(arena)
    owner.take(100)
    gone = [page for page in owner.held if page % 20]  # one page in 20 stays, in every slab
    arena.release(torch.tensor(gone, dtype=torch.int32))
    for page in gone:
        del owner.held[page]
    arena.trim()
    owner.check()
    assert arena.live == arena.pages == arena.references.numel() == 5


def test_growth_ahead_is_bounded(monkeypatch):
    arena = small_arena(monkeypatch, pages=1024)
    arena.allocate(3200)
    arena.allocate(1)
    assert arena.pages <= 3201 + 3200 // 32


def test_the_cap_is_named_and_nothing_is_lost(monkeypatch):
    arena = small_arena(monkeypatch, max_bytes=20 * PAGE)
    arena.allocate(18)
    with pytest.raises(CacheMemoryError, match="max_bytes"):
        arena.allocate(3)
    assert arena.live == 18 and arena.pages == 18
    arena.allocate(2)
    assert arena.nbytes == 20 * PAGE
