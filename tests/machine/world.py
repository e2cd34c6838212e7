"""Whole caches beside a dense model of what they must hold, and everything that may be done to them.

A step is the name of an operation and small integers, so a run is a list that can be printed, replayed and shortened.
Every step ends with all invariants, see [`World.check`].
"""

import copy
import gc
import os
import sys
import tempfile
import threading
import weakref

import inside
import torch
from dense import SCALE, History, attention
from shapes import HEAD_DIM, KV_HEADS, Q_HEADS, SHAPES

import kvcompress_hf as kvc
from kvcompress_hf import CacheMemoryError, UnsupportedFeatureError

MOST_CACHES = 3
MOST_TOKENS = 160  # of a cache; then it is reset
MOST_BATCH = 4


def _recipes():
    small = {"protect": {"recent": 8}, "budget": 24}
    window = {"window": 8}
    changed = {
        "lossless": ("lossless", {"when": {"every": 4}}),
        "lossless-32": ("lossless", {}),
        "k8v8": ("k8v8", {"when": {"every": 4}}),
        "k8v4": ("k8v4", {"when": {"every": 8}}),
        "k4v4": ("k4v4", {"when": {"every": 8}}),
        "kv-compress": ("kv-compress", {**small, "observer": window, "when": {"every": 4}}),
        "h2o": ("h2o", {**small, "when": {"every": 4}}),
        "roco": ("roco", {"protect": {"sinks": 2, "recent": 8}, "budget": 24, "plan": {"protect_unsettled": 4}}),
        "scissorhands": ("scissorhands", {"budget": 24, "observer": {"window": 16}, "when": {"every": 4}}),
        "streaming": ("streaming", {"protect": {"sinks": 2}, "budget": 24, "when": {"every": 4}}),
        "snapkv": ("snapkv", {**small, "observer": window}),
        "keydiff": ("keydiff", {"protect": {"sinks": 2, "recent": 8}, "budget": 24}),
        "leankv": ("leankv", {"protect": {"recent": 8}, "observer": window, "when": {"every": 8}}),
        "r-kv": ("r-kv", {**small, "observer": {"window": 4}, "when": {"every": 8}}),
        "triattention": ("triattention", {**small, "when": {"every": 4}}),
        "think": ("think", {"protect": {"sinks": 2, "recent": 8}, "budget": 24, "when": {"every": 8}}),
        "auto": ("auto", {"protect": {"sinks": 2, "recent": 8}, "budget": 0.5, "when": {"every": 8}}),
    }
    return {name: kvc.get_preset(preset).with_overrides(**changes) for name, (preset, changes) in changed.items()}


RECIPES = _recipes()
# Relative error of an attention output, root mean square over a pass, by the worst tier that a slot may be in: about
# twice what normally distributed keys and values show.
_ERRORS = {"native": 2e-5, "k8v8": 0.04, "k8v4": 0.2, "k4v4": 0.45, "k4v2": 0.9, "k2v2": 1.2}
CONFIGURATIONS = {"shape": sorted(SHAPES), "recipe": sorted(RECIPES)}


class Fault(AssertionError):
    """A rule that does not hold; `kind` names it."""

    def __init__(self, kind, message):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


def check(holds, kind, message=""):
    if not holds:
        raise Fault(kind, message() if callable(message) else message)


class Entry:
    """A cache, its history, and what was last read out of it."""

    def __init__(self, cache, history, recipe, limited):
        self.cache, self.history, self.recipe, self.limited = cache, history, recipe, limited
        self.recording = False
        self.partly = False  # a commit was refused, so nobody knows how many recorded tokens are held back still
        self.recorded_from = 0
        self.held = None  # per layer bool [batch, kv_heads, tokens], as of the last check
        self.refresh = True


class World:
    """One to three caches of a shape and a recipe.

    Args:
        shape (`str`): Of `SHAPES`.
        recipe (`str`): Of `RECIPES`.
        batch (`int`): Sequences of the first cache.
        seed (`int`): For keys, values and queries.
        limit (`int`): 0 for none, else `max_bytes` is so many times 4 KiB per layer and sequence.
    """

    def __init__(self, shape, recipe, batch=1, seed=0, limit=0):
        self.shape, self.recipe = SHAPES[shape], RECIPES[recipe]
        self.limit = limit * 4096 * self.shape.layers * batch if limit else None
        self.generator = torch.Generator().manual_seed(seed)
        self.entries = []
        self.arenas = weakref.WeakSet()
        self.steps = 0
        self.new(batch=batch)
        self.check()

    # -- running ---------------------------------------------------------------------------------------------------

    def step(self, operation, **arguments):
        """Does one thing and checks everything."""
        self.steps += 1
        getattr(self, operation)(**arguments)
        self.check()

    def close(self):
        """Drops all caches; nothing may be left."""
        while self.entries:
            self._drop(0)
        check(not [a for a in self.arenas if inside.arena_bytes(a)], "leak", "an arena outlives its caches")

    def _pick(self, which):
        return self.entries[which % len(self.entries)] if self.entries else None

    # -- operations ------------------------------------------------------------------------------------------------

    def new(self, batch):
        """Another cache that shares nothing."""
        if len(self.entries) >= MOST_CACHES:
            return
        cache = kvc.CompressedPagedCache(self.shape.config, self.recipe, max_bytes=self.limit)
        self.entries.append(Entry(cache, History(self.shape.sources, batch), self.recipe, self.limit is not None))

    def append(self, which, tokens, padding, mask):
        """A prompt or a chunk; `padding` tokens of it are padding in some sequences."""
        entry = self._pick(which)
        if entry is None:
            return
        self._forward(entry, tokens, self._real(entry, tokens, padding), bool(mask))

    def decode(self, which, times, padding):
        """Some single tokens."""
        entry = self._pick(which)
        if entry is None or (not entry.history.seen and padding):
            return
        for _ in range(times):
            real = None
            if padding and not self.shape.slides:
                real = torch.ones(entry.history.batch, 1, dtype=torch.bool)
                real[padding % entry.history.batch] = False
            if not self._forward(entry, 1, real, real is not None):
                return

    def crop(self, which, tokens):
        """Forgets the newest tokens, or refuses and changes nothing."""
        entry = self._pick(which)
        if entry is None:
            return
        history = entry.history
        tokens = min(tokens, history.seen)
        before = self._look(entry)
        held_back = entry.recording and not entry.partly and tokens <= history.seen - entry.recorded_from
        try:
            entry.cache.crop(-tokens)
        except UnsupportedFeatureError:
            refusable = entry.recipe.evicts or self.shape.slides
            check(refusable and not held_back, "crop refused", f"{tokens} of {history.seen} could be given back")
            check(self._look(entry) == before, "refusal changed the cache", "crop")
            return
        except CacheMemoryError:
            check(entry.limited, "memory error without a limit", "crop")
            self._after_refusal(entry)
            return
        history.crop(tokens)
        entry.held, entry.refresh, entry.partly = None, True, False
        if entry.recording:
            entry.recorded_from = history.seen

    def reorder(self, which, order):
        """Beams."""
        entry = self._pick(which)
        if entry is not None and entry.history.seen:
            batch = entry.history.batch
            index = torch.tensor([(order // (i + 1) + i * order) % batch for i in range(batch)])
            entry.cache.reorder_cache(index)
            self._selected(entry, index)

    def repeat(self, which, times):
        """Several answers per prompt."""
        entry = self._pick(which)
        if entry is not None and entry.history.seen and entry.history.batch * times <= MOST_BATCH:
            index = torch.arange(entry.history.batch).repeat_interleave(times)
            entry.cache.batch_repeat_interleave(times)
            self._selected(entry, index)

    def select(self, which, bits):
        """Keeps some sequences, named by numbers or by a mask."""
        entry = self._pick(which)
        if entry is None or not entry.history.seen:
            return
        batch = entry.history.batch
        mask = torch.tensor([bool(bits >> i & 1) for i in range(batch)])
        if not mask.any():
            mask[bits % batch] = True
        index = mask.nonzero().flatten()
        entry.cache.batch_select_indices(mask if bits & 16 else index.flip(0) if bits & 32 else index)
        self._selected(entry, index.flip(0) if bits & 32 and not bits & 16 else index)

    def _selected(self, entry, index):
        entry.history.select(index)
        entry.held, entry.refresh = None, True

    def fork(self, which, how):
        """A second cache with the same past."""
        entry = self._pick(which)
        if entry is None or len(self.entries) >= MOST_CACHES:
            return
        make = (lambda cache: cache.fork(), copy.deepcopy, copy.copy)[how]
        self._add_twin(entry, make(entry.cache))

    def _add_twin(self, entry, cache):
        twin = Entry(cache, entry.history.copy(), entry.recipe, entry.limited)
        twin.recording, twin.recorded_from, twin.partly = entry.recording, entry.recorded_from, entry.partly
        check(twin.cache.get_seq_length() == twin.history.seen, "copy differs", "tokens seen")
        self.entries.append(twin)

    def save_and_load(self, which, keep):
        """Through a file, in place of the cache or beside it."""
        entry = self._pick(which)
        if entry is None or not entry.history.seen:
            return
        held_back = entry.recording and entry.history.seen > entry.recorded_from
        before = self._look(entry)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "cache.safetensors")
            try:
                entry.cache.save(path)
            except RuntimeError:
                check(held_back or entry.partly, "save refused", "nothing was held back")
                check(not os.listdir(folder), "file left behind", str(os.listdir(folder)))
                check(self._look(entry) == before, "refusal changed the cache", "save")
                return
            check(self._look(entry) == before, "saving changed the cache")
            limit = self.limit if entry.limited else None
            loaded = kvc.CompressedPagedCache.load(path, self.shape.model(), max_bytes=limit)
            twin = Entry(loaded, entry.history.copy(), entry.recipe, entry.limited)
            twin.recording, twin.recorded_from, twin.partly = entry.recording, entry.recorded_from, entry.partly
            check(self._look(twin)[:-1] == before[:-1], "file differs from cache")
        if keep and len(self.entries) < MOST_CACHES:
            self.entries.append(twin)
        else:
            place = self.entries.index(entry)
            self.entries[place] = twin

    def reset(self, which):
        """Forgets everything."""
        entry = self._pick(which)
        if entry is not None:
            self._reset(entry)

    def _reset(self, entry):
        entry.cache.reset()
        was_recording = entry.cache.is_recording_past(0)
        entry.history = History(self.shape.sources, entry.history.batch)
        entry.recording, entry.recorded_from, entry.held, entry.refresh = was_recording, 0, None, True
        entry.partly = False
        check(entry.cache.get_seq_length() == 0 and entry.cache.batch_size == -1, "reset leaves something")
        check(entry.cache.memory().total == 0, "reset leaves bytes", lambda: str(entry.cache.memory()))

    def drop(self, which, collected):
        """Lets go of a cache, by the last reference or through a cycle that the collector finds."""
        if len(self.entries) > 1:
            self._drop(which % len(self.entries), bool(collected))

    def _drop(self, place, cycle=False):
        entry = self.entries.pop(place)
        if cycle:
            entry.itself = entry
            del entry
            gc.collect()

    def record(self, which):
        """New tokens are held back from now on."""
        entry = self._pick(which)
        if entry is not None and not entry.recording:
            entry.cache.activate_past_recording()
            entry.recording, entry.recorded_from = True, entry.history.seen

    def stop_recording(self, which):
        """What was held back stays."""
        entry = self._pick(which)
        if entry is None or not entry.recording:
            return
        try:
            entry.cache.stop_past_recording()
        except CacheMemoryError:
            check(entry.limited, "memory error without a limit", "stop_past_recording")
            self._after_refusal(entry)
            return
        entry.recording, entry.held, entry.refresh, entry.partly = False, None, True, False

    def stop_half_way(self, which, tokens, layers):
        """Something in the model raises between two layers; the pass is repeated, and must be taken back first."""
        entry = self._pick(which)
        if entry is None or self.shape.layers < 2 or (entry.limited and self.recipe.plan is not None):
            return
        layers = 1 + layers % (self.shape.layers - 1)
        before, seen = self._look(entry), entry.history.seen
        try:
            self._pass(entry, tokens, None, False, layers)
        except CacheMemoryError:
            check(entry.limited, "memory error without a limit")
            self._after_refusal(entry)
            return
        if not any(self.shape.sources[i] == i for i in range(layers, self.shape.layers)):
            self._reset(entry)  # only layers that store nothing are missing: the pass counts as done
            return
        try:
            self._pass(entry, tokens, None, False, None)
        except CacheMemoryError:  # of a first prompt, of which nobody can tell that a layer is missing
            check(entry.limited and not seen, "memory error without a limit")
            self._after_refusal(entry)
            return
        except RuntimeError as error:
            check("stopped half way" in str(error), "half a pass is not named", str(error))
        else:
            raise Fault("half a pass unnoticed", f"{tokens} tokens in {layers} layers")
        check(entry.cache.get_seq_length() == seen, "half a pass stays", f"{entry.cache.get_seq_length()} for {seen}")
        if seen:
            check(self._look(entry)[:-1] == before[:-1], "half a pass changed the cache")
        self._forward(entry, tokens, None, False)

    def beside_each_other(self, tokens):
        """All caches decode at once, each in a thread of its own."""
        if len(self.entries) < 2:
            return
        entries = [entry for entry in self.entries if entry.history.seen + tokens <= MOST_TOKENS]
        drawn = [[self._draw(entry, 1) for _ in range(tokens)] for entry in entries]
        failures = []

        def work(entry, passes):
            try:
                for one in passes:
                    self._forward(entry, 1, None, False, one)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=pair) for pair in zip(entries, drawn, strict=True)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        for failure in failures:
            raise failure

    # -- forward passes --------------------------------------------------------------------------------------------

    def _real(self, entry, tokens, padding):
        """Which tokens are real, or `None` for all: padding lies on the left of a prompt, anywhere later."""
        batch = entry.history.batch
        if not padding or tokens < 2:
            return None
        if entry.history.seen and self.shape.slides:
            return None  # stock windows count padding in the middle, ours do not
        real = torch.ones(batch, tokens, dtype=torch.bool)
        for row in range(batch):
            count = (padding * (row + 1)) % (tokens + 1)
            at = 0 if not entry.history.seen or padding % 3 == 0 else (padding + row) % (tokens - count + 1)
            real[row, at : at + count] = False
        return real

    def _draw(self, entry, tokens):
        batch, randn = entry.history.batch, self.generator
        keys, values, queries = [], [], []
        for layer, source in enumerate(self.shape.sources):
            queries.append(torch.randn(batch, Q_HEADS, tokens, HEAD_DIM, generator=randn))
            own = source == layer
            keys.append(torch.randn(batch, KV_HEADS, tokens, HEAD_DIM, generator=randn) if own else None)
            values.append(torch.randn(batch, KV_HEADS, tokens, HEAD_DIM, generator=randn) if own else None)
        return queries, keys, values

    def _forward(self, entry, tokens, real, with_mask, drawn=None):
        """A whole pass and the comparison; returns whether it went through."""
        if entry.history.seen + tokens > MOST_TOKENS:
            self._reset(entry)
            return False
        try:
            outputs = self._pass(entry, tokens, real, with_mask, None, drawn)
        except CacheMemoryError:
            check(entry.limited, "memory error without a limit")
            self._after_refusal(entry)
            return False
        self._compare(entry, tokens, outputs)
        return True

    def _pass(self, entry, tokens, real, with_mask, layers, drawn=None):
        """Drives the layers as a model does; `layers` of them, or all."""
        history, cache, shape = entry.history, entry.cache, self.shape
        queries, keys, values = drawn or self._draw(entry, tokens)
        every = torch.ones(history.batch, tokens, dtype=torch.bool) if real is None else real
        past = history.seen
        outputs, tagged = [], {}
        held = self._held_now(entry)
        for layer in range(shape.layers if layers is None else layers):
            source, window, query = shape.sources[layer], shape.windows[layer], queries[layer]
            mask = _mask(every, window) if real is not None or with_mask else None
            new = keys[source], values[source]
            nothing = torch.zeros(history.batch, KV_HEADS, 0, dtype=torch.bool)

            def dense(query=query, new=new, window=window, nothing=nothing):
                return attention(query, *new, nothing, every, window)

            arguments = {"scaling": SCALE, "dense": dense, "sliding_window": window}
            if source == layer:
                tagged[layer] = cache.update(*new, layer)
                output = cache.attend(layer, query, *tagged[layer], mask, **arguments)
            else:
                output = cache.attend_shared(layer, source, query, *tagged[source], mask, **arguments)
            outputs.append(output)
            if layer == 0 and entry.limited and past:
                held = [None if h is None else h[:, :, :past] for h in self._read(entry, past)]
        if layers is None:
            history.append(keys, values, every)
            entry.refresh = True
        return outputs, queries, held

    def _held_now(self, entry):
        """What is held as a pass begins. Rows that grew by the last tokens alone are not read again before `check`."""
        if not entry.refresh:
            return entry.held
        history = entry.history
        if entry.held is None or entry.held[0].shape[2] >= history.seen:
            entry.held = self._read(entry)
            return entry.held
        slots = entry.cache.slots()
        for layer, rows in enumerate(entry.held):
            if rows is not None:
                new = history.real[:, None, rows.shape[2] :].expand(-1, KV_HEADS, -1)
                grown = torch.cat([rows, new], 2)
                if rows.shape[0] != history.batch or not torch.equal(grown.sum(2), slots[layer]):
                    entry.held = self._read(entry)
                    return entry.held
                entry.held[layer] = grown
        return entry.held

    def _compare(self, entry, tokens, passed):
        outputs, queries, held = passed
        history, shape = entry.history, self.shape
        check(entry.cache.get_seq_length() == history.seen, "tokens seen", f"{entry.cache.get_seq_length()}")
        worst = max(_ERRORS[name] for name in entry.recipe.tiers)
        new = history.real[:, -tokens:]
        for layer, (output, query) in enumerate(zip(outputs, queries, strict=True)):
            source = shape.sources[layer]
            expected = attention(
                query,
                history.keys[source],
                history.values[source],
                held[source][:, :, : history.seen - tokens],
                history.real,
                shape.windows[layer],
            )
            got, want = output[new], expected[new]
            check(bool(got.isfinite().all()), "not finite", f"layer {layer}")
            error = float((got - want).norm() / want.norm().clamp(min=1e-6)) if want.numel() else 0.0
            check(error <= worst, "wrong attention", lambda e=error, i=layer: f"layer {i}: {e:.2e} relative error")

    # -- looking ---------------------------------------------------------------------------------------------------

    def _look(self, entry):
        """Everything a refusal must leave as it was; bytes come last."""
        cache = entry.cache
        rows = [
            (row.layer, row.sequence, row.head, row.kept, None if row.positions is None else row.positions.tolist())
            for row in (cache.rows() if cache.batch_size > 0 else [])
        ]
        return cache.get_seq_length(), cache.batch_size, rows, cache.memory().total

    def _read(self, entry, seen=None):
        """Which tokens each row holds, per layer bool `[batch, kv_heads, tokens]`; checks that rows are well-formed."""
        history = entry.history
        seen = history.seen if seen is None else seen
        tokens = max(seen, entry.cache.get_seq_length())
        held = [
            torch.zeros(history.batch, KV_HEADS, tokens, dtype=torch.bool) if source == layer else None
            for layer, source in enumerate(self.shape.sources)
        ]
        if not seen:
            return held
        for row in entry.cache.rows():
            place = held[row.layer][row.sequence, row.head]
            if row.positions is None:
                place[: history.seen] = history.real[row.sequence]
                if seen == tokens:
                    real = int(place.sum())
                    check(row.kept == real, "slots", lambda r=row, n=real: f"{r} for {n} tokens")
                continue
            check(row.positions.numel() == row.kept, "slots", lambda r=row: f"{r}: {r.positions.numel()} positions")
            check(
                row.kept < 2 or bool((row.positions.diff() > 0).all()),
                "a token twice",
                lambda r=row: f"{r}: {r.positions.tolist()}",
            )
            inside_history = not row.kept or (int(row.positions[0]) >= 0 and int(row.positions[-1]) < tokens)
            check(inside_history, "unknown tokens", lambda r=row: f"{r}: {r.positions.tolist()}")
            place[row.positions] = True
        return held

    def _after_refusal(self, entry):
        """A cache at its limit compresses harder before it refuses; what it holds is still a part of its history."""
        cache, history = entry.cache, entry.history
        check(cache.get_seq_length() == history.seen, "refusal changed the length", f"{cache.get_seq_length()}")
        entry.partly = entry.recording
        entry.held = None
        entry.refresh = True

    # -- invariants ------------------------------------------------------------------------------------------------

    def check(self):
        """All invariants: what is held, pages, references, bytes, limits."""
        for entry in self.entries:
            touched = entry.refresh
            if touched:
                self._check_held(entry)
            if entry.history.seen and not self.steps % (2 if touched else 8):
                self._check_bytes(entry)
        for arena, stores in self._arenas().values():
            self._check_pages(arena, stores)

    def _arenas(self):
        found = {}
        for entry in self.entries:
            for arena in inside.arenas(entry.cache):
                self.arenas.add(arena)
                found.setdefault(id(arena), (arena, []))
            for store in inside.stores(entry.cache):
                found[id(store.arena)][1].append(store)
        return found

    def _check_held(self, entry):
        history, recipe = entry.history, entry.recipe
        seen, top = history.seen, history.top
        held = self._read(entry)
        for layer, (rows, window) in enumerate(zip(held, self.shape.windows, strict=True)):
            if rows is None:
                continue
            real = history.real[:, None].expand_as(rows)
            check(not bool((rows & ~real).any()), "padding held", f"layer {layer}")
            if recipe.evicts:
                if entry.recording or seen < top:
                    continue
                must = real & (torch.arange(seen) >= top - recipe.protect.recent)
                first = real & (real.cumsum(-1) <= recipe.protect.sinks)
                must = must | first
            else:
                must = real
            if window is not None:
                must = must & (torch.arange(seen) > seen - window)
            check(
                not bool((must & ~rows).any()),
                "tokens lost",
                lambda i=layer, m=must, r=rows: f"layer {i}: {(m & ~r).nonzero()[:5].tolist()} of {seen}",
            )
        entry.held, entry.refresh = held, False

    def _check_bytes(self, entry):
        reported, walked = entry.cache.memory().total, inside.held_bytes(entry.cache)
        check(reported == walked, "bytes", lambda: f"{reported} reported, {walked} held")

    def _check_pages(self, arena, stores):
        references = inside.references(arena)
        named = torch.cat([inside.pages_named(store) for store in stores])
        mine = {id(store) for store in stores}
        strangers = [owner for owner in inside.owners(arena) if id(owner) not in mine]
        check(not strangers, "leak", f"{len(strangers)} owners that no cache has")
        known = not named.numel() or (int(named.min()) >= 0 and int(named.max()) < references.numel())
        check(known, "unknown page")
        counted = torch.bincount(named, minlength=references.numel())
        check(bool((counted == references.clamp(min=0)).all()), "references", lambda: _differences(counted, references))
        check(int((counted > 0).sum()) == arena.live, "live pages", f"{arena.live} for {int((counted > 0).sum())}")
        check(arena.shared or int(counted.max() if counted.numel() else 0) < 2, "sharing unnoticed")
        noted, real = inside.addresses(arena)
        check(noted == real, "slab addresses")
        check(inside.arena_bytes(arena) == arena.nbytes, "arena bytes")
        check(arena.max_bytes is None or arena.nbytes <= arena.max_bytes, "limit", f"{arena.nbytes}")
        counts = int((references >= 0).sum())
        check(counts == arena.pages, "page count", f"{counts} for {arena.pages}")


def _mask(real, window):
    """As transformers makes it: over the new tokens only, true where a query sees a key."""
    at = torch.arange(real.shape[1])
    behind = at[:, None] - at
    sees = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return (sees & real[:, None] & real[:, :, None])[:, None]


def _differences(counted, references):
    at = (counted != references.clamp(min=0)).nonzero().flatten()[:5]
    return "; ".join(f"page {i}: {int(references[i])} counted, {int(counted[i])} named" for i in at.tolist())


#: What a driver may do: operation -> (weight, {argument: (least, most)}).
OPERATIONS = {
    "append": (5, {"which": (0, 2), "tokens": (1, 40), "padding": (0, 9), "mask": (0, 1)}),
    "decode": (8, {"which": (0, 2), "times": (1, 6), "padding": (0, 3)}),
    "crop": (3, {"which": (0, 2), "tokens": (0, 12)}),
    "reorder": (1, {"which": (0, 2), "order": (0, 23)}),
    "repeat": (1, {"which": (0, 2), "times": (1, 3)}),
    "select": (1, {"which": (0, 2), "bits": (0, 63)}),
    "fork": (2, {"which": (0, 2), "how": (0, 2)}),
    "save_and_load": (1, {"which": (0, 2), "keep": (0, 1)}),
    "reset": (1, {"which": (0, 2)}),
    "drop": (2, {"which": (0, 2), "collected": (0, 1)}),
    "new": (1, {"batch": (1, 3)}),
    "record": (1, {"which": (0, 2)}),
    "stop_recording": (1, {"which": (0, 2)}),
    "stop_half_way": (1, {"which": (0, 2), "tokens": (1, 9), "layers": (0, 3)}),
    "beside_each_other": (1, {"tokens": (1, 6)}),
}
