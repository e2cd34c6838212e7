"""The long run of the state machine: `python tests/machine/run.py --steps 1000000 --seed 0 --output FILE`.

World `n` of a run follows from the seed and `n` alone, so `--first n --steps 1` does it again. Worlds run in child
processes: one that dies in native code is a finding like any other. Each finding is shortened to the steps it needs.
"""

import argparse
import collections
import gc
import logging
import time
import warnings

import torch
from children import in_children
from drive import kind_of, replay, shorten, world_of
from record import heading, runs_in, until, write
from shapes import SHAPES


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--length", type=int, default=40, help="steps of one world")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first world")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="stop after so long, however many steps that were")
    parser.add_argument("--output", help="JSON file; a run is added to those that it holds already")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for shape in SHAPES.values():
        shape.model()
    gc.collect()
    gc.freeze()

    def work(number):
        made_of, steps = world_of(options.seed, number, options.length)
        error, done = replay(made_of, steps)
        result = {"done": done, "operations": collections.Counter(name for name, _ in steps[:done])}
        if error is not None:
            kind = kind_of(error)
            fewer = shorten(made_of, steps[:done], kind)
            result["fault"] = {"kind": kind, "says": str(error)[:200], "made of": made_of, "steps": fewer}
        return result

    started, seen, done, operations, found = time.time(), 0, 0, collections.Counter(), {}
    stop = until(options.minutes, started)
    worlds = range(options.first, options.first + max(1, options.steps // options.length))
    for number, result in in_children(work, worlds, options.workers):
        seen += 1
        done += result.get("done", 0)
        operations.update(result.get("operations", {}))
        fault = result.get("fault")
        if "died" in result or "raised" in result:
            kind = result.get("died") or "the machine itself: " + result["raised"].splitlines()[-1]
            fault = {"kind": kind, "says": result.get("raised", "")[-300:], "made of": None, "steps": []}
        if fault:
            known = found.setdefault(fault["kind"], {"times": 0, "world": number, **fault})
            known["times"] += 1
            if len(fault["steps"]) < len(known["steps"]):
                known.update(fault, world=number)
            if known["times"] == 1:
                print(f"world {number}: {fault['kind']}: {fault['says']}", flush=True)
        if seen % 100 == 0:
            print(f"{done:,} steps, {time.time() - started:.0f} s, {len(found)} kinds of faults", flush=True)
        if stop():
            break
    record = heading(
        "state machine over whole caches",
        seed=options.seed,
        worlds=seen,
        steps=done,
        seconds=round(time.time() - started),
        workers=options.workers,
        operations=dict(sorted(operations.items())),
        found=list(found.values()),
    )
    runs = [*runs_in(options.output), record]
    totals = {"steps": sum(run["steps"] for run in runs), "found": sum(len(run["found"]) for run in runs)}
    write(options.output, {"what": record.pop("what"), **totals, "runs": runs})
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
