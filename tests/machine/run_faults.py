"""Every place of every scenario fails once: `python tests/machine/run_faults.py --output FILE`.

Kinds of places: every line of the package that the action runs (a KeyboardInterrupt there), every operation of torch
(out of memory), every call of the allocator, the kernels, the observers and plans, and the file system, before its work
and after. `--every n` tries each n-th place only, from `--first` on; instructions (`opcode`) are only tried when named
by `--kinds`. A run that is stopped, or has had its `--minutes`, records what it has tried.
"""

import argparse
import collections
import gc
import logging
import time
import warnings

import model_faults
import torch
from children import in_children
from faults import KINDS, Fault, scenario, scenarios
from record import heading, runs_in, until, write
from shapes import SHAPES


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--scenarios", nargs="*", default=[*scenarios(), *model_faults.scenarios()], help="names, all when left out"
    )
    parser.add_argument("--kinds", nargs="*", default=[kind for kind in KINDS if kind != "opcode"])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=1, help="the first place of each kind, counted from 1")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--workers", type=int, default=1)
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

    made = {}

    def subject(name):
        if name not in made:
            made.clear()
            if name in model_faults.scenarios():
                made[name] = model_faults.ModelScenario(*model_faults.scenarios()[name])
            else:
                made[name] = scenario(name)
        return made[name]

    def count(name):
        return {kind: subject(name).count(kind) for kind in subject(name).kinds if kind in options.kinds}

    def work(task):
        name, kind, at = task
        try:
            _, ended = subject(name).fail(kind, at)
        except Fault as fault:
            return {"fault": fault.kind, "says": str(fault)[:160], "where": fault.where}
        return {"ended": ended}

    started = time.time()
    stop = until(options.minutes, started)
    places = dict(in_children(count, options.scenarios, each=1))
    tasks = [
        (name, kind, at)
        for name, kinds in places.items()
        for kind, number in kinds.items()
        if isinstance(number, int)
        for at in range(options.first, number + 1, options.every)
    ]
    print(f"{len(tasks):,} places in {len(places)} scenarios", flush=True)
    ended, found, tried = collections.Counter(), {}, collections.Counter()
    for number, (task, result) in enumerate(in_children(work, tasks, options.workers, each=500)):
        if stop():
            break
        name, kind, at = task
        tried[kind] += 1
        if "ended" in result:
            ended[result["ended"]] += 1
        else:
            what = result.get("fault") or result.get("died") or "the harness itself"
            ended["fault"] += 1
            known = found.setdefault(what, {"times": 0, "kinds": {}, "where": {}})
            known["times"] += 1
            if known["times"] <= 3:
                print(f"{name}, {kind} {at}: {what}: {result.get('where')}: {result.get('says', '')}", flush=True)
            known["kinds"][kind] = known["kinds"].get(kind, 0) + 1
            place = result.get("where") or result.get("raised", "?").strip().splitlines()[-1][:120]
            if place not in known["where"] and len(known["where"]) < 400:
                known["where"][place] = f"{name}, {kind} {at}: {result.get('says', '')}"
        if number % 2000 == 1999:
            print(f"{number + 1:,} places, {time.time() - started:.0f} s, {dict(ended)}", flush=True)
    record = heading(
        "faults at every point",
        places=sum(tried.values()),
        every=options.every,
        first=options.first,
        tried=dict(tried),
        seconds=round(time.time() - started),
        workers=options.workers,
        scenarios=places,
        ended=dict(ended),
        found=found,
    )
    runs = [*runs_in(options.output), record]
    totals = {"places": sum(run["places"] for run in runs), "found": sum(len(run["found"]) for run in runs)}
    write(options.output, {"what": record.pop("what"), **totals, "runs": runs})
    for what, known in sorted(found.items(), key=lambda pair: -pair[1]["times"]):
        print(f"{what}: {known['times']} times at {len(known['where'])} places")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
