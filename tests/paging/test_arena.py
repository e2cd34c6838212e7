"""The arena against a plain model: ids, reference counts, growth, trimming."""

import contextlib
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress_hf.errors import CacheMemoryError
from kvcompress_hf.paging import arena as arena_module
from kvcompress_hf.paging.arena import Arena, changes_pages

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


class Rows:
    """An owner as a store is one: pages in a table, changed as a whole."""

    def __init__(self, arena):
        self.arena, self.table, self.changes = arena, torch.zeros(0, dtype=torch.int32), 0
        self.reading = arena.register(self)

    @changes_pages
    def take(self, count, then=lambda: None):
        ids = self.arena.allocate(count)
        then()
        self.table = torch.cat([self.table, ids])

    @changes_pages
    def hold(self, ids):
        """As a fork, which also copies a page to write to, and gives it up."""
        self.arena.release(self.arena.copy_pages(ids))
        self.table = torch.cat([self.table, ids])
        self.arena.retain(ids)

    @changes_pages
    def drop(self, count):
        gone, self.table = self.table[:count], self.table[count:]
        self.arena.release(gone)

    def relocate(self, new_id):
        self.table = new_id[self.table.long()]

    def slabs_changed(self):
        self.changes += 1

    def live_ids(self):
        return self.table


def consistent(arena, *owners):
    named = torch.cat([owner.table for owner in owners])
    counts = torch.bincount(named.long(), minlength=arena.references.numel()) if named.numel() else named
    assert arena.references.clamp(min=0).sum() == named.numel() and (not named.numel() or arena.references.min() >= -1)
    assert named.numel() == 0 or torch.equal(counts.int(), arena.references.clamp(min=0))
    assert arena.live == torch.unique(named).numel()
    assert [s.data_ptr() if s.shape[0] else 0 for s in arena.slabs] == arena.slab_addresses.tolist()
    assert [s.shape[0] for s in arena.slabs] == arena.pool.sizes.tolist()


class Broken(BaseException):
    """As KeyboardInterrupt: nobody catches it on the way."""


STEPS = [
    lambda arena, first, second: first.take(3),
    lambda arena, first, second: first.take(30),
    lambda arena, first, second: second.take(50),
    lambda arena, first, second: first.drop(25),
    lambda arena, first, second: second.hold(first.table[-2:]),
    lambda arena, first, second: arena.trim(),
    lambda arena, first, second: second.drop(50),
    lambda arena, first, second: arena.trim(),
]


@pytest.mark.parametrize("error", [MemoryError, Broken])
@pytest.mark.parametrize("what", ["new_slab", "allocate", "write", "read", "_commit", "release", "slabs_changed"])
def test_whatever_breaks_off_leaves_every_page_with_its_owner(monkeypatch, what, error):
    """The n-th call of each kind fails, for every n: tables, references, slabs and addresses still agree."""
    for n in range(1, 40):
        with pytest.MonkeyPatch.context() as patch:
            arena = small_arena(patch)
            first, second = Rows(arena), Rows(arena)
            place, calls = Rows if what == "slabs_changed" else Arena, [0]
            real = getattr(place, what)

            def failing(*args, real=real, calls=calls, n=n):
                calls[0] += 1
                if calls[0] == n:
                    raise error("simulated")
                return real(*args)

            patch.setattr(place, what, failing)
            for step in STEPS:
                with contextlib.suppress(error):
                    step(arena, first, second)
                consistent(arena, first, second)
            if calls[0] < n:
                return
    raise AssertionError("more calls than were tried")


def test_pages_taken_and_never_entered_are_free_again(monkeypatch):
    arena = small_arena(monkeypatch)
    owner = Rows(arena)
    owner.take(5)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        owner.take(7, then=interrupted)
    assert arena.live == 5
    consistent(arena, owner)


def test_a_finalizer_in_the_middle_of_a_change(monkeypatch):
    """The collector may run a cache's end inside an allocation of the same thread: its pages go afterwards."""
    arena = small_arena(monkeypatch)
    owner, gone = Rows(arena), Rows(arena)
    owner.take(5)
    gone.take(6)
    owner.take(4, then=lambda: arena.abandon(gone))
    assert arena.live == 9
    consistent(arena, owner)
    assert not arena.has_other_owners({id(owner)})


def test_a_finalizer_waits_for_nobody(monkeypatch):
    arena = small_arena(monkeypatch)
    owner, gone = Rows(arena), Rows(arena)
    owner.take(5)
    gone.take(6)
    inside, leave = threading.Event(), threading.Event()

    def busy():
        owner.take(1, then=lambda: (inside.set(), leave.wait(60)))

    thread = threading.Thread(target=busy)
    thread.start()
    assert inside.wait(60)
    arena.abandon(gone)  # the other thread holds the lock and goes on only after this
    leave.set()
    thread.join(60)
    assert arena.live == 6


def test_nothing_moves_while_a_kernel_of_another_thread_reads(monkeypatch):
    arena = small_arena(monkeypatch)
    owner, reader = Rows(arena), Rows(arena)
    owner.take(3)
    reader.take(1)
    owner.take(60)
    owner.drop(55)
    reading, leave = threading.Event(), threading.Event()

    def read():
        with reader.reading:
            reading.set()
            leave.wait(60)

    thread = threading.Thread(target=read)
    thread.start()
    assert reading.wait(60)
    table, slabs = reader.table.tolist(), [slab.data_ptr() for slab in arena.slabs]
    arena.trim()
    owner.take(1)
    assert reader.table.tolist() == table and [slab.data_ptr() for slab in arena.slabs][: len(slabs)] == slabs
    leave.set()
    thread.join(60)
    arena.trim()
    assert arena.pages - arena.live <= arena.live // 32
    consistent(arena, owner, reader)


def test_an_arena_goes_with_its_last_owner(monkeypatch):
    arena = small_arena(monkeypatch)
    owner = Rows(arena)
    owner.take(5)
    gone = weakref.ref(arena)
    arena.forget_abandoned()
    del arena, owner
    assert gone() is None
