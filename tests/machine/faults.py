"""Faults at every point: a scenario is run once for each call, line or layer that can fail, with the failure there.

After each, [`judge`] wants: the cache as before, or after, or closed with an error that says what to do; the fork that
shares its pages unharmed; page counts exact; every page back when the cache goes; the next answers those of a run
that nothing disturbed.
"""

import contextlib
import dis
import functools
import gc
import os
import sys
import tempfile
import weakref
from pathlib import Path

import inside
import torch
from shapes import SHAPES
from torch.utils._python_dispatch import TorchDispatchMode
from world import RECIPES, Entry, Fault, History, World, check

import kvcompress_hf as kvc
from kvcompress_hf import units

# As imported and as it lies there: an editable install imports through links.
_IMPORTED = Path(units.__file__).parent
_PARTS = [_IMPORTED / folder for folder in ("", "kernels", "patches")]
_FOLDERS = tuple({str(path) for part in _PARTS for path in (part, part.resolve())})


# -- where it may fail -------------------------------------------------------------------------------------------------


class Counter:
    """Counts the places of a kind that are passed, and raises at the n-th.

    Args:
        error: What to raise, an instance; `None` only counts.
        at (`int`, *optional*): At which place, counted from 1.
    """

    def __init__(self, error=None, at=None):
        self.error, self.at, self.passed, self.where = error, at, 0, None

    def hit(self, where):
        self.passed += 1
        if self.at == self.passed:
            self.where = where() if callable(where) else where
            raise self.error


@functools.cache
def _impossible(code):
    """Offsets at which no interrupt comes, as Python looks for one behind calls and at jumps only.

    On the way out of a `with` block and at the `try:` of a `try` block a trace function could raise, and no handler
    would see it: locks would stay taken.
    """
    instructions = list(dis.get_instructions(code))
    never = {each.offset for each in instructions if each.opname == "NOP"}
    for at, each in enumerate(instructions):
        behind = instructions[at + (each.opname == "SWAP") :][:3]
        if len(behind) == 3 and all(one.opname == "LOAD_CONST" and one.argval is None for one in behind):
            never.add(each.offset)
    return never


@contextlib.contextmanager
def lines(counter, opcodes=False):
    """Every line of the package that runs, as an interrupt may come there; with `opcodes` every instruction."""

    def local(frame, event, argument):
        if opcodes:
            frame.f_trace_opcodes = True
        if event == ("opcode" if opcodes else "line") and frame.f_lasti not in _impossible(frame.f_code):
            counter.hit(lambda: f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}")
        return local

    def trace(frame, event, argument):
        name = frame.f_code.co_filename
        if not name.startswith(_FOLDERS):
            return None
        if opcodes:
            frame.f_trace_opcodes = True
        return local

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextlib.contextmanager
def operations_of_torch(counter):
    """Every operation of torch, as an allocation may fail in any."""

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counter.hit(lambda: f"{function} in {_caller()}")
            return function(*args, **(kwargs or {}))

    with Mode():
        yield


def _caller():
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith(_FOLDERS):
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


def _wrapped(counter, name, real, after):
    def call(*args, **kwargs):
        if not after:
            counter.hit(f"before {name} in {_caller()}")
        result = real(*args, **kwargs)
        if after:
            counter.hit(f"after {name} in {_caller()}")
        return result

    return call


@contextlib.contextmanager
def calls(counter, targets, after=False):
    """Calls of functions, `(owner, name)`; the failure comes before their work, or after it is done."""
    replaced = []
    try:
        for owner, name in targets:
            real = owner.__dict__.get(name) if isinstance(owner, type) else getattr(owner, name)
            if real is None or isinstance(real, (staticmethod, classmethod, property)):
                continue
            replaced.append((owner, name, real))
            setattr(owner, name, _wrapped(counter, name, real, after))
        yield
    finally:
        for owner, name, real in replaced:
            setattr(owner, name, real)


def _methods(kind):
    names = [name for name, value in vars(kind).items() if callable(value) and not name.startswith("__")]
    return [(kind, name) for name in names if not isinstance(vars(kind)[name], (staticmethod, classmethod))]


def _of_allocator(recipe):
    return [pair for kind in inside.allocating_classes() for pair in _methods(kind)]


def _of_kernels(recipe):
    return [pair for kind in inside.kernel_classes() for pair in _methods(kind)]


def _of_judgement(recipe):
    """Observers and plans."""
    kinds = {
        kind
        for part in (recipe.observer, recipe.plan)
        if part is not None
        for kind in type(part).__mro__
        if kind.__module__.startswith("kvcompress_hf") and not kind.__module__.endswith("recipe")
    }
    return [pair for kind in sorted(kinds, key=lambda kind: kind.__name__) for pair in _methods(kind)]


def _of_files(recipe):
    import builtins
    import mmap

    wanted = ("open", "fsync", "replace", "rename", "fstat", "stat", "chmod", "fchmod", "close", "link", "unlink")
    return [(builtins, "open"), (mmap, "mmap")] + [(os, name) for name in wanted if hasattr(os, name)]


#: Kind of place -> (how to watch, which error to raise there).
KINDS = {
    "line": (lambda counter, recipe: lines(counter), KeyboardInterrupt),
    "opcode": (lambda counter, recipe: lines(counter, opcodes=True), KeyboardInterrupt),
    "torch": (lambda counter, recipe: operations_of_torch(counter), torch.OutOfMemoryError),
    "allocator before": (lambda counter, recipe: calls(counter, _of_allocator(recipe)), MemoryError),
    "allocator after": (lambda counter, recipe: calls(counter, _of_allocator(recipe), after=True), MemoryError),
    "kernel before": (lambda counter, recipe: calls(counter, _of_kernels(recipe)), RuntimeError),
    "kernel after": (lambda counter, recipe: calls(counter, _of_kernels(recipe), after=True), RuntimeError),
    "judgement before": (lambda counter, recipe: calls(counter, _of_judgement(recipe)), RuntimeError),
    "judgement after": (lambda counter, recipe: calls(counter, _of_judgement(recipe), after=True), RuntimeError),
    "files before": (lambda counter, recipe: calls(counter, _of_files(recipe)), OSError),
    "files after": (lambda counter, recipe: calls(counter, _of_files(recipe), after=True), OSError),
}


# -- what is under way when it fails -----------------------------------------------------------------------------------


class Scenario:
    """A cache with a past, possibly a fork that shares it, and something that is done to the cache.

    Args:
        name (`str`): For people.
        action (`str`): `"pass"`, `"crop"`, `"select"`, `"fork"`, `"save"`, `"load"`, `"reset"`, `"drop"` or
            `"commit"`.
        shape (`str`): Of `SHAPES`.
        recipe (`str`): Of `RECIPES`.
        passes (`tuple[int, ...]`): Tokens of the passes before the action, and of the action where it is a pass.
        forked (`bool`): Whether a fork shares the pages.
        limit (`int`, *optional*): `max_bytes`.
        batch (`int`): Sequences.
    """

    ANSWER = (1, 3, 1)  # passes that show what the cache holds

    def __init__(self, name, action, shape, recipe, passes, forked=False, limit=None, batch=2, padded=False):
        self.name, self.action, self.shape, self.recipe = name, action, shape, recipe
        self.passes, self.forked, self.limit, self.batch, self.padded = passes, forked, limit, batch, padded
        world = World(shape, recipe, batch, seed=1)
        world.limit = limit
        self.world = world
        self.data = [world._draw(world.entries[0], tokens) for tokens in (*passes, *self.ANSWER)]
        self.others = [world._draw(world.entries[0], tokens) for tokens in self.ANSWER]
        world.entries.clear()
        self.undisturbed = self._undisturbed()

    @property
    def kinds(self):
        """Kinds of places that the action can pass."""
        files = self.action in ("save", "load")
        judged = RECIPES[self.recipe].observer is not None and self.action in ("pass", "commit")
        return [
            kind
            for kind in KINDS
            if (files or not kind.startswith("files")) and (judged or not kind.startswith("judgement"))
        ]

    def _pass(self, cache, history, data, number=None):
        """One pass; returns its outputs."""
        real = None
        tokens = data[0][0].shape[2]
        if self.padded and number is not None and tokens > 1:
            real = torch.ones(self.batch, tokens, dtype=torch.bool)
            real[0, : min(2, tokens - 1)] = False
        entry = Entry(cache, history, RECIPES[self.recipe], self.limit is not None)
        entry.held = [None]  # nothing is compared here but with the undisturbed run
        entry.refresh = False
        entry.limited = False
        outputs = self.world._pass(entry, tokens, real, real is not None, None, data)[0]
        return outputs if real is None else [torch.where(real[:, :, None, None], out, 0) for out in outputs]

    def prepare(self):
        """Cache and fork as they are before the action, and their histories."""
        cache = kvc.CompressedPagedCache(SHAPES[self.shape].config, RECIPES[self.recipe], max_bytes=self.limit)
        history = History(SHAPES[self.shape].sources, self.batch)
        before = len(self.passes) - (self.action == "pass")
        for number in range(before):
            if self.action == "commit" and number == before - 1:
                cache.activate_past_recording()
            self._pass(cache, history, self.data[number], number)
        twin = cache.fork() if self.forked else None
        folder = tempfile.TemporaryDirectory() if self.action in ("save", "load") else None
        if self.action == "save":
            Path(folder.name, "cache").write_bytes(b"what was there")
        if self.action == "load":
            cache.save(Path(folder.name, "cache"))
        return cache, history, twin, folder

    def act(self, cache, history, folder):
        """The action; returns outputs, or another cache that it makes."""
        if self.action == "pass":
            return self._pass(cache, history, self.data[len(self.passes) - 1], len(self.passes) - 1)
        if self.action == "crop":
            return cache.crop(-3)
        if self.action == "commit":
            return cache.crop(-1)
        if self.action == "select":
            return cache.batch_select_indices(torch.tensor([1, 1, 0]))
        if self.action == "fork":
            return cache.fork()
        if self.action == "reset":
            return cache.reset()
        path = Path(folder.name, "cache")
        if self.action == "save":
            return cache.save(path)
        return kvc.CompressedPagedCache.load(path, SHAPES[self.shape].model())

    def answer(self, cache, history, data=None):
        """What the cache says next."""
        out = []
        for one in data or self.data[-len(self.ANSWER) :]:
            if history.batch != self.batch:
                one = [[None if x is None else x[torch.tensor([1, 1, 0])] for x in part] for part in one]
            out += self._pass(cache, history, one)
        return out

    def _undisturbed(self):
        expected = {}
        for name, data in (("before", None), ("twin", self.others)):
            cache, history, _twin, _folder = self.prepare()
            expected["length before"] = history.seen
            expected[name] = self.answer(cache, history, data)
        cache, history, _twin, folder = self.prepare()
        made = cache if self.action == "drop" else self.act(cache, history, folder)
        expected["action"] = made if self.action == "pass" else None
        self._note(history)
        expected["length after"] = cache.get_seq_length()
        expected["whole"] = None
        if self.action == "save":
            expected["whole"] = Path(folder.name, "cache").read_bytes()
        subject = made if self.action in ("fork", "load") else cache
        if self.action == "reset":
            history = History(SHAPES[self.shape].sources, self.batch)
        expected["after"] = self.answer(subject, history)
        return expected

    def _note(self, history):
        """What the action does to the history."""
        if self.action in ("crop", "commit"):
            history.crop(3 if self.action == "crop" else 1)
        if self.action == "select":
            history.select(torch.tensor([1, 1, 0]))

    # -- one failure -----------------------------------------------------------------------------------------------

    def count(self, kind):
        """How many places of a kind the action passes."""
        prepared = list(self.prepare())
        counter = Counter()
        with KINDS[kind][0](counter, RECIPES[self.recipe]):
            if self.action == "drop":
                del prepared[0]
            else:
                _made = self.act(prepared[0], prepared[1], prepared[3])  # kept: its end is not a part of this
        return counter.passed

    def fail(self, kind, at):
        """Fails at a place and judges what is left.

        Returns:
            `tuple[str, str]`: Where it failed, and how it ended: `"before"`, `"after"`, `"closed"`, `"not reached"`.

        Raises:
            Fault: If a rule does not hold afterwards.
        """
        watch, error = KINDS[kind]
        prepared = list(self.prepare())
        counter, made = Counter(error("injected"), at), None
        hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
        try:
            gc.disable()  # or other caches would be finalised under watch
            with watch(counter, RECIPES[self.recipe]):
                if self.action == "drop":
                    del prepared[0]  # the last reference
                else:
                    made = self.act(prepared[0], prepared[1].copy(), prepared[3])
        except BaseException as caught:
            if caught is not counter.error and counter.where is None:
                raise
            caught.__traceback__ = None
        else:
            if self.action == "drop" and counter.where is None:
                return "", "not reached"
        finally:
            gc.enable()
            sys.unraisablehook = hook
        del made
        if counter.where is None:
            return "", "not reached"
        counter.error.__traceback__ = counter.error.__context__ = None
        try:
            ended = self.judge(prepared)
        except Fault as fault:
            fault.where = counter.where
            raise
        except Exception as wrong:
            fault = Fault("later calls fail", f"{type(wrong).__name__}: {str(wrong)[:160]}")
            fault.where = counter.where
            raise fault from None
        return counter.where, ended

    def judge(self, prepared):
        """All rules; returns how the cache was left. Takes the only references out of the list."""
        if self.action == "drop":
            return self._judge_drop(prepared)
        cache, history, twin, folder = prepared
        prepared.clear()
        if self.action == "save":
            self._judge_file(folder)
        self._pages([cache, twin] if twin is not None else [cache], quietly=True)
        if twin is not None:
            got = self.answer(twin.fork(), history.copy(), self.others)
            _same(got, self.undisturbed["twin"], "fork harmed")
        ended = self._resume(cache, history)
        self._pages([cache, twin] if twin is not None else [cache])
        watched = [weakref.ref(arena) for arena in inside.arenas(cache)]
        keep = None if twin is None else inside.arenas(twin)
        del cache
        gc.collect()  # frames of what was interrupted may refer to each other, and to it
        if twin is not None:
            self._pages([twin])
            del keep, twin
        gc.collect()
        check(all(ref() is None for ref in watched), "arena kept alive")
        return ended

    def _judge_drop(self, prepared):
        """What raises while a cache is finalised reaches nobody, so only the fork can be looked at."""
        history, twin, _ = prepared
        prepared.clear()
        self._pages([twin])
        _same(self.answer(twin, history.copy(), self.others), self.undisturbed["twin"], "fork harmed")
        watched = [weakref.ref(arena) for arena in inside.arenas(twin)]
        del twin
        check(all(ref() is None for ref in watched), "arena kept alive")
        return "after"

    def _judge_file(self, folder):
        names = sorted(os.listdir(folder.name))
        check(names == ["cache"], "file left behind", str(names))
        data = Path(folder.name, "cache").read_bytes()
        whole = data == b"what was there" or len(data) == len(self.undisturbed["whole"])
        check(whole, "half a file", f"{len(data)} bytes")

    def _resume(self, cache, history):
        """Goes on with the cache as a caller would who caught the error."""
        before, after = self.undisturbed["length before"], self.undisturbed["length after"]
        seen = cache.get_seq_length()
        if self.action != "pass":
            return self._resume_other(cache, history)
        data = self.data[len(self.passes) - 1]
        number = len(self.passes) - 1
        if seen not in (before, after):
            try:
                self._pass(cache, history.copy(), data, number)
            except RuntimeError as error:  # a cache that had to be closed is empty
                check(not seen and "reset()" in str(error), "length", f"{seen}, not {before} or {after}")
                return self._after_words(error, cache, history, data, number)
            raise Fault("length", f"{seen}, not {before} or {after}")
        if seen == after != before:
            later = history.copy()
            later.append(data[1], data[2], torch.ones(self.batch, data[0][0].shape[2], dtype=torch.bool))
            try:
                got = self.answer(cache, later)
            except RuntimeError as error:
                return self._after_words(error, cache, history, data, number)
            return self._right(got, cache, later, "after")
        try:
            out = self._pass(cache, history, data, number)
        except RuntimeError as error:
            return self._after_words(error, cache, history, data, number)
        _same(out, self.undisturbed["action"], "wrong retry")
        _same(self.answer(cache, history), self.undisturbed["after"], "wrong answers after a retry")
        return "before"

    def _right(self, got, cache, history, ended):
        """Whether answers are those of the undisturbed run, or else right for what the cache holds.

        A pass that is whole may have been interrupted before it was packed. Packing then comes with a later pass, and
        answers until then differ a little: they must be those of a dense cache over what is held.
        """
        try:
            _same(got, self.undisturbed["after"], "wrong answers after it")
        except Fault as fault:
            if self.padded:
                raise
            entry = Entry(cache, history, RECIPES[self.recipe], self.limit is not None)
            try:
                self.world._check_held(entry)
                for data in self.others:
                    check(self.world._forward(entry, data[0][0].shape[2], None, False, data), "refused")
                    self.world._check_held(entry)
            except Fault as wrong:
                raise Fault(fault.kind, f"{fault}; {wrong}") from None
            return "packed later"
        return ended

    def _after_words(self, error, cache, history, data, number):
        """The cache said something: that a pass was taken back, or that it is closed."""
        words = str(error)
        spoken = any(word in words for word in ("stopped half way", "taken back", "emptied", "begin again", "reset()"))
        check(spoken, "unclear error", f"{type(error).__name__}: {words[:120]}")
        seen = cache.get_seq_length()
        if seen == self.undisturbed["length before"] and seen and "reset()" not in words:
            out = self._pass(cache, history, data, number)
            _same(out, self.undisturbed["action"], "wrong retry")
            _same(self.answer(cache, history), self.undisturbed["after"], "wrong answers after a retry")
            return "before"
        cache.reset()
        check(cache.get_seq_length() == 0, "reset does not open it again")
        history = History(SHAPES[self.shape].sources, self.batch)
        for each in range(len(self.passes)):
            self._pass(cache, history, self.data[each], each)
        _same(self.answer(cache, history), self.undisturbed["after"], "wrong answers after a reset")
        return "closed"

    def _resume_other(self, cache, history):
        later = history.copy()
        self._note(later)
        if self.action == "reset":
            later = History(SHAPES[self.shape].sources, self.batch)
            if cache.batch_size == -1 and cache.get_seq_length() == 0:
                try:
                    got = self.answer(cache, later)
                except RuntimeError as error:
                    check("reset()" in str(error), "unclear error", str(error)[:120])
                    cache.reset()
                    got = self.answer(cache, History(SHAPES[self.shape].sources, self.batch))
                _same(got, self.undisturbed["after"], "wrong answers after it")
                return "after"
        keeps = self.action in ("save", "load", "fork")
        try:
            twin = cache.fork()
        except RuntimeError as error:
            check("reset()" in str(error), "unclear error", str(error)[:120])
            return "closed"
        changed = cache.get_seq_length() != history.seen or cache.batch_size != self.batch
        if changed and not keeps:
            _same(self.answer(twin, later), self.undisturbed["after"], "wrong answers after it")
            return "after"
        recording = cache.is_recording_past(0)
        if recording:
            twin.stop_past_recording()
        got = self.answer(twin, history.copy())
        if not recording:
            _same(got, self.undisturbed["before"], "wrong answers after it")
        del twin
        if not keeps:
            self.act(cache, history, None)
            _same(self.answer(cache, later), self.undisturbed["after"], "wrong answers after a retry")
        return "before"

    def _pages(self, caches, quietly=False):
        """Page counts of all arenas; while a pass waits to be taken back, pages in no table may still be its own."""
        found = {}
        for cache in caches:
            for arena in inside.arenas(cache):
                found.setdefault(id(arena), (arena, []))
            for store in inside.stores(cache):
                found.setdefault(id(store.arena), (store.arena, []))[1].append(store)
        for arena, stores in found.values():
            if quietly:
                noted, real = inside.addresses(arena)
                check(noted == real, "slab addresses")
            else:
                self.world._check_pages(arena, stores)


def _same(got, wanted, kind):
    for layer, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        check(ours.shape == theirs.shape, kind, f"{tuple(ours.shape)} for {tuple(theirs.shape)}")
        error = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-6))
        check(error <= 1e-3, kind, f"output {layer}: {error:.1e} relative error")


def scenarios():
    """All of them; every action, and passes that pack, plan, copy shared pages, slide, and share."""
    many = [
        ("first prompt", "pass", "llama", "lossless", (21,), {}),
        ("first padded prompt", "pass", "llama", "kv-compress", (21,), {"padded": True}),
        ("chunk", "pass", "llama", "lossless", (21, 9), {}),
        ("chunk beside a fork", "pass", "llama", "k8v4", (21, 9), {"forked": True}),
        ("token", "pass", "llama", "lossless", (21, 1), {}),
        ("token that packs", "pass", "llama", "lossless", (21, 1, 1, 1, 1), {}),
        ("token that packs beside a fork", "pass", "llama", "k8v8", (21, 1, 1, 1, 1), {"forked": True}),
        ("token that plans", "pass", "llama", "h2o", (30, 1, 1, 1, 1), {}),
        ("token that plans beside a fork", "pass", "mixed", "kv-compress", (30, 1, 1, 1, 1), {"forked": True}),
        ("token with statistics beside a fork", "pass", "llama", "roco", (30, 1), {"forked": True}),
        ("chunk that lowers tiers", "pass", "llama", "auto", (40, 20), {}),
        ("chunk that lowers tiers beside a fork", "pass", "llama", "leankv", (60, 20), {"forked": True}),
        ("chunk behind a window", "pass", "sliding", "lossless", (21, 9), {"forked": True}),
        ("token behind a window", "pass", "sliding", "lossless", (21, 1, 1, 1, 1), {}),
        ("chunk of a shared model", "pass", "shared", "lossless", (21, 9), {"forked": True}),
        ("token of a shared model", "pass", "shared", "streaming", (30, 1, 1, 1, 1), {}),
        ("chunk under pressure", "pass", "llama", "kv-compress", (21, 9, 30), {"limit": 96 * 1024}),
        ("crop in the tail", "crop", "llama", "lossless-32", (21, 1, 1, 1, 1, 1), {"forked": True}),
        ("crop into pages", "crop", "llama", "lossless", (21, 1), {"forked": True}),
        ("select", "select", "mixed", "kv-compress", (30, 1), {}),
        ("select beside a fork", "select", "llama", "k4v4", (30, 1), {"forked": True}),
        ("fork", "fork", "llama", "h2o", (30, 1), {}),
        ("save", "save", "llama", "k8v4", (30, 1), {}),
        ("load", "load", "llama", "kv-compress", (30, 1), {}),
        ("reset", "reset", "mixed", "h2o", (30, 1), {"forked": True}),
        ("drop", "drop", "mixed", "k8v4", (30, 1), {"forked": True}),
        ("commit", "commit", "llama", "h2o", (30, 6), {}),
    ]
    return {name: (name, action, shape, recipe, passes, rest) for name, action, shape, recipe, passes, rest in many}


def scenario(name):
    """A scenario by its name."""
    name, action, shape, recipe, passes, rest = scenarios()[name]
    return Scenario(name, action, shape, recipe, passes, **rest)
