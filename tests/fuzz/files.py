"""Feeds cache files that were made wrong on purpose to `CompressedPagedCache.load`, and uses what it accepts.

    python tests/fuzz/files.py --count 100000 --seed 0 --output benchmarks/results/fuzz_files.json
    python tests/fuzz/files.py --count 1 --first 4711 --seed 0          # one mutation again
    python tests/fuzz/files.py --count 10000 --sanitize --output ...    # the native library under AddressSanitizer

What must hold for each file: the process lives; loading takes no more memory than the file's size and 64 MiB, and no
more than a second of processor time; what is raised is a `CacheFormatError`; and a cache that is accepted names only
pages that are there, can be read, decoded with, forked, saved and loaded again. Work is done in child processes whose
address space is limited while they load; a child that dies is noted and replaced.
"""

import argparse
import collections
import contextlib
import datetime
import functools
import json
import os
import platform
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
from mutations import mutate  # noqa: E402

MOST_BYTES = 64 * 2**20  # beyond the file's size
MOST_SECONDS = 1.0
SILENCE = 60  # seconds of processor time without an answer after which a child counts as hanging
# Large blocks come from the system and go back to it at once, so that the peak of one load does not hide in what an
# earlier one has freed.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MALLOC_MMAP_THRESHOLD_": "65536"}
# What using a hostile but harmless cache may raise: its pages are damaged, or it does not fit the model's keys.
CLEAR = ("CacheFormatError", "CacheMemoryError", "UnsupportedFeatureError", "ValueError")
SANITIZED = ROOT / "build" / "sanitize"


# -- the child ---------------------------------------------------------------------------------------------------------


class Child:
    """Loads and uses one mutation after the other; prints a line of JSON for each."""

    def __init__(self, folder, library):
        import torch
        from transformers import Gemma2Config, Gemma2ForCausalLM

        import kvcompress_hf as kvc
        from kvcompress_hf.kernels import library as native

        if library:
            native.library_path = lambda: Path(library)
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        warnings.filterwarnings("ignore")
        self.torch, self.kvc = torch, kvc
        self.path, self.sanitized = Path(folder) / "mutated", bool(library)
        torch.manual_seed(0)
        # One layer with a window and one without, so that there are two stores.
        config = Gemma2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=32,
            layer_types=["sliding_attention", "full_attention"],
            eos_token_id=None,
            initializer_range=0.2,
        )
        self.model = kvc.patch(Gemma2ForCausalLM(config).eval(), "lossless")
        # What is read of the model is the same each time, and takes longer than the rest.
        for name in ("model_identity", "layer_devices", "weights_fingerprint"):
            self._remember(name)
        self.files = self._good_files(Path(folder) / "good")
        for name, data in self.files.items():
            outcome, _ = self.load(data)
            if outcome != "loaded":
                raise SystemExit(f"The good file {name} was refused: {outcome}")
            outcome = self.use(much=True, full=True)
            if outcome != "used":
                raise SystemExit(f"The good file {name} was loaded, but: {outcome}")

    @staticmethod
    def _remember(name):
        from kvcompress_hf import cache

        function, known = getattr(cache, name), {}

        def remembering(*args):
            if len(args) not in known:
                known[len(args)] = function(*args)
            return known[len(args)]

        setattr(cache, name, remembering)

    def tokens(self, batch, count):
        return self.torch.randint(3, 64, (batch, count), generator=self.torch.Generator().manual_seed(count))

    def feed(self, cache, ids, mask=None):
        self.model(ids, past_key_values=cache, attention_mask=mask, use_cache=True)

    def _good_files(self, path):
        """Several tiers, statistics, padding, shared pages, recipes per row, a recorded tail, and an empty cache."""
        files = {}
        rows = [{"preset": "kv-compress", "budget": 0.5}, {"preset": "kv-compress", "budget": 0.25}]
        for recipe in ("auto", "roco", "k8v4", "lossless", rows, None):
            cache = self.kvc.CompressedPagedCache(self.model.config, recipe)
            cache.belongs_to(self.model)
            mask = self.torch.ones(2, 106, dtype=self.torch.long)
            mask[1, :13] = 0
            if recipe is not None:
                self.feed(cache, self.tokens(2, 100), mask[:, :100])
            if recipe == "lossless":
                cache.activate_past_recording()
            for i in range(100, 106) if recipe is not None else ():
                self.feed(cache, self.tokens(2, 1), mask[:, : i + 1])
            if recipe in ("auto", "k8v4"):
                cache.batch_select_indices(self.torch.tensor([0, 1, 0]))
            cache.save(path)
            files[str(recipe)[:20]] = path.read_bytes()
        return files

    def load(self, data):
        """Loads a file: what came of it, and what it cost."""
        self.path.write_bytes(data)
        self.cache = None
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        before = self._rss("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        if not self.sanitized:
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_BYTES + 3 * len(data), hard))
        started, cpu = time.perf_counter(), time.process_time()
        try:
            self.cache = self.kvc.CompressedPagedCache.load(self.path, self.model)
            outcome = "loaded"
        except self.kvc.CacheFormatError as error:
            outcome = "refused" if len(str(error)) < 2000 + len(str(self.path)) else "a message without end"
        except Exception as error:
            outcome = f"{type(error).__name__}: {str(error)[:200]}"
        seconds, wall = time.process_time() - cpu, time.perf_counter() - started
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        return outcome, {"seconds": seconds, "wall": wall, "extra": self._rss("VmHWM") - before - len(data)}

    @staticmethod
    def _rss(name):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"no {name}")

    def use(self, much, full):
        """Does what reads pages, tables and fields: `much` decodes, `full` also copies, reorders, saves and loads."""
        cache, self.cache = self.cache, None
        batch = max(cache.batch_size, 1)
        wrong = wrong_tables(cache)
        if wrong:
            return wrong
        if batch > 64:
            return "loaded, and too large to use here"
        try:
            cache.rows()
            if much or full:
                self.feed(cache, self.tokens(batch, 1))
            if full:
                self.feed(cache, self.tokens(batch, 3))
                fork = cache.fork()
                self.feed(fork, self.tokens(batch, 40))
                self.feed(cache, self.tokens(batch, 1))
                cache.reorder_cache(self.torch.arange(batch).flip(0))
                cache.memory()
                if cache.is_recording_past(0):
                    cache.crop(-1)
                    cache.stop_past_recording()
                cache.save(self.path)
                again = self.kvc.CompressedPagedCache.load(self.path, self.model)
                if again.get_seq_length() != cache.get_seq_length():
                    return "came back from its file with another length"
        except Exception as error:
            name = type(error).__name__
            return f"used: {name}" if name in CLEAR else f"{name} while used: {str(error)[:200]}"
        return "used"

    def run(self, seed, first, count, where):
        with open(where, "r+b") as at:
            for index in range(first, first + count):
                os.pwrite(at.fileno(), index.to_bytes(8, "little"), 0)
                kind, name, data = mutate(self.files, seed, index)
                outcome, cost = self.load(data)
                bad = outcome not in ("loaded", "refused")
                if outcome == "loaded":
                    outcome = self.use(much=index % 2 == 0, full=index % 20 == 0)
                    bad = not outcome.startswith(("used", "loaded"))
                line = {"index": index, "kind": kind, "file": name, "size": len(data), "outcome": outcome, "bad": bad}
                print(json.dumps(line | cost), flush=True)


def wrong_tables(cache):
    """What is wrong with the page tables of a loaded cache, looked at without the package's own checks; or `None`."""
    import torch

    counts = {}
    for store in cache.inspect().stores:
        named = counts.setdefault(store.arena, torch.zeros_like(store.arena.references))
        for tier, (table, lengths) in enumerate(zip(store.tables, store.lengths, strict=True)):
            pages = -(-lengths // store.layout.tiers[tier].slots)
            row, column = torch.nonzero(torch.arange(table.shape[1]) < pages[:, None], as_tuple=True)
            if int(pages.sum()) != row.numel():
                return "a table is narrower than its rows are long"
            ids = table[row, column]
            if bool(((ids < 0) | (ids >= named.numel())).any()):
                return "a table names pages that are not there"
            named.index_add_(0, ids, torch.ones_like(ids))
            # Sequences may share a page, but only at one place of one layer and head.
            per_layer, heads = store.rows_per_layer, store.geometry.kv_heads
            place = (row // per_layer * heads + row % heads) * table.shape[1] + column
            if torch.unique(torch.stack((ids, place)), dim=1).shape[1] != torch.unique(ids).numel():
                return "a table names a page in two places"
    for arena, named in counts.items():
        if not torch.equal(named, arena.references.clamp(min=0)):
            return "pages are counted otherwise than tables name them"
    return None


# -- the parent --------------------------------------------------------------------------------------------------------


class Tally:
    """What came of the mutations."""

    def __init__(self):
        self.outcomes = collections.defaultdict(collections.Counter)
        self.violations = []
        self.most = {"seconds": 0.0, "wall": 0.0, "extra": 0}
        self.count = 0

    def add(self, line, sanitized):
        self.count += 1
        outcome = line["outcome"]
        self.outcomes[line["kind"]]["violation" if line["bad"] else outcome] += 1
        for name in self.most:
            self.most[name] = max(self.most[name], line[name])
        # A sanitizer slows everything and keeps what was freed, so it says nothing of time and memory.
        too_slow = line["seconds"] > MOST_SECONDS and not sanitized
        too_large = line["extra"] > MOST_BYTES and not sanitized
        if line["bad"] or too_slow or too_large:
            self.violations.append(line)

    def died(self, index, how, seed):
        self.count += 1
        self.violations.append({"index": index, "seed": seed, "outcome": how})

    def result(self, seconds):
        return {
            "mutations": self.count,
            "violations": self.violations[:50],
            "violations_in_all": len(self.violations),
            "most_processor_seconds": round(self.most["seconds"], 3),
            "most_wall_seconds": round(self.most["wall"], 3),
            "most_mib_beyond_the_file": round(self.most["extra"] / 2**20, 1),
            "outcomes": {kind: dict(counts.most_common()) for kind, counts in sorted(self.outcomes.items())},
            "took_seconds": round(seconds),
        }


def run_children(seed, first, count, sanitized, batch, folder, report):
    """Runs mutations in child processes, one after the other; reports what there is after each."""
    tally, index, started = Tally(), first, time.perf_counter()
    where = Path(folder) / "at"
    while index < first + count:
        where.write_bytes(index.to_bytes(8, "little"))
        size = min(batch, first + count - index)
        command = [sys.executable, __file__, "--child", str(where), "--seed", str(seed), "--first", str(index)]
        command += ["--count", str(size), *(["--sanitize"] if sanitized else [])]
        environment = os.environ | ENVIRONMENT | {"TMPDIR": str(folder)}
        if sanitized:
            environment |= {"LD_PRELOAD": sanitizer_libraries(), "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=16"}
        errors = Path(folder) / "errors"
        with (
            open(errors, "wb") as stderr,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment) as child,
        ):
            done = 0
            while answers(child):
                line = child.stdout.readline()
                if not line:
                    break
                tally.add(json.loads(line) | {"seed": seed}, sanitized)
                done += 1
            else:
                child.kill()
            child.wait()
        if done < size:
            at = int.from_bytes(where.read_bytes(), "little")
            text = errors.read_text(errors="replace")[-1500:]
            if not done and at == index and child.returncode > 0:
                raise SystemExit(f"The child could not start:\n{text}")
            tally.died(at, f"the process ended with {child.returncode}: {text}", seed)
            index = at + 1
        else:
            index += size
        if index < first + count:
            report(tally.result(time.perf_counter() - started), final=False)
    return tally.result(time.perf_counter() - started)


def answers(child):
    """Waits for the next line of a child; False if it hangs. On a busy machine it may get no processor for a while."""
    before = processor_seconds(child)
    for _ in range(60):
        if select.select([child.stdout], [], [], SILENCE)[0]:
            return True
        if processor_seconds(child) - before > SILENCE:
            return False
    return False


def processor_seconds(child):
    """What a child has used so far."""
    with contextlib.suppress(OSError):
        ticks = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return 0.0


def sanitizer_libraries():
    """What must be loaded before Python."""
    compiler = os.environ.get("CXX", "g++")
    names = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return " ".join(names)


def build_sanitized():
    """Builds the native library with AddressSanitizer and UndefinedBehaviorSanitizer."""
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(SANITIZED), "-DKVC_SANITIZE=ON"], check=True, stdout=2)
    subprocess.run(["cmake", "--build", str(SANITIZED), "--parallel"], check=True, stdout=2)


def main(argv=None):
    """Runs the command; returns 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="mutations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--batch", type=int, default=5000, help="mutations per child process")
    parser.add_argument("--output", type=Path, help="JSON file; what another kind of run left in it stays")
    parser.add_argument("--sanitize", action="store_true", help="the native library under AddressSanitizer")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") and not args.child else None)
    try:
        if args.child:
            (Path(folder) / "good").touch()
            library = SANITIZED / "libkvc_cpu.so" if args.sanitize else None
            Child(folder, library).run(args.seed, args.first, args.count, args.child)
            return 0
        if args.sanitize:
            build_sanitized()
        tell = functools.partial(report, args)
        result = run_children(args.seed, args.first, args.count, args.sanitize, args.batch, folder, tell)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    tell(result)
    return int(result["violations_in_all"] > 0)


def report(args, result, final=True):
    """Adds to the output file; in the end prints a line, and what did not hold."""
    from importlib.metadata import version

    from kvcompress_hf.cli.info import processor

    which = "address_sanitizer" if args.sanitize else "plain"
    line = (
        f"{result['mutations']:,} mutated cache files ({which}, seed {args.seed}): {result['violations_in_all']} "
        f"violations; at most {result['most_processor_seconds']} s and "
        f"{result['most_mib_beyond_the_file']} MiB beyond the file"
    )
    if final:
        print(line)
        for violation in result["violations"]:
            print(json.dumps(violation))
    if args.output is None:
        return
    old = {}
    with contextlib.suppress(OSError, ValueError):
        old = json.loads(args.output.read_text())
    names = ("kvcompress-hf", "torch", "transformers")
    entry = {
        "summary": line,
        "command": f"python tests/fuzz/files.py --count {result['mutations']} --seed {args.seed} --first {args.first}"
        + (" --sanitize" if args.sanitize else ""),
        "date": datetime.date.today().isoformat(),
        "cpu": processor(),
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
        **result,
    }
    args.output.write_text(json.dumps(old | {which: entry}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
