"""Few rows times the 16-bit weight of a linear layer, as in decoding: the kernel of `plan_linear` against torch.

    python benchmarks/one_row.py [--threads 1 2] [--rows 1 2 4] [--dtype bfloat16] [--json FILE]

Forms: torch as it comes (oneDNN in bfloat16), torch with `torch.backends.mkldnn` off, ours, and a plain read of the
weight (a sum over int64), which is the floor. They take turns. Every call gets another weight, so many that the
last-level cache is of no help: in a model the others come in between. Printed: median and least microseconds, how many
times as fast as the better of torch's two ours is (medians), and its share of the speed of the plain read. With
`--clock processor` it is this process's time, which on a busy machine is the fairest (with one thread).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import machine
from torch import Tensor

from kvcompress_hf.kernels import get_backend

#: Out and in features: of SmolLM2-135M, and of a Llama with 1 billion parameters.
SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576)]
SHAPES += [(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)]
BYTES = 160 << 20  # of weights that take turns
MOST_CALLS = 64  # per form and turn
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}

Form = Callable[[int], object]


def forms_of(weights: list[Tensor], x: Tensor) -> dict[str, Form]:
    """All forms; each is given the number of a weight."""
    plans = [get_backend("cpu").plan_linear(weight) for weight in weights]
    for plan in plans:
        plan.run(x)  # the first call with a shape is slower
    numbers = [weight.view(-1).view(torch.int64) for weight in weights]
    return {
        "torch": lambda i: F.linear(x, weights[i]),
        "mkldnn off": lambda i: F.linear(x, weights[i]),
        "ours": lambda i: plans[i].run(x),
        "read": lambda i: numbers[i].sum(),
    }


@torch.no_grad()
def measure(
    shape: tuple[int, int], rows: int, dtype: torch.dtype, seconds: float, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Median and least microseconds per call of each form."""
    out_features, in_features = shape
    count = max(3, -(-BYTES // (2 * out_features * in_features)))
    weights = [torch.randn(out_features, in_features).to(dtype) for _ in range(count)]
    x = torch.randn(rows, in_features).to(dtype)
    forms = forms_of(weights, x)
    times: dict[str, list[float]] = {name: [] for name in forms}
    calls = min(count, MOST_CALLS)
    turn, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end or turn < 4:
        for name, form in forms.items():
            which = [(turn * calls + i) % count for i in range(calls)]
            turn += 1
            with torch.backends.mkldnn.flags(enabled=name != "mkldnn off"):
                started = clock()
                for i in which:
                    form(i)
                times[name].append((clock() - started) / calls * 1e6)
    return {name: {"median_us": statistics.median(t), "min_us": min(t)} for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=4.0, help="measuring time per shape, rows and threads")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--json", type=Path, help="file to write the results to")
    arguments = parser.parse_args()
    results = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for rows in arguments.rows:
            print(f"\n{rows} row(s), {arguments.dtype}, {threads} thread(s); us: median (least)")
            print(f"{'weight':>12}{'torch':>16}{'mkldnn off':>16}{'ours':>16}{'read':>16}{'x torch':>9}{'of floor':>9}")
            for shape in SHAPES:
                dtype, clock = getattr(torch, arguments.dtype), CLOCKS[arguments.clock]
                figures = measure(shape, rows, dtype, arguments.seconds, clock)
                medians = {name: each["median_us"] for name, each in figures.items()}
                speedup = min(medians["torch"], medians["mkldnn off"]) / medians["ours"]
                share = medians["read"] / medians["ours"]
                columns = (f"{each['median_us']:.0f} ({each['min_us']:.0f})" for each in figures.values())
                line = "".join(f"{column:>16}" for column in columns)
                print(f"{'x'.join(map(str, shape)):>12}{line}{speedup:8.2f}x{share:9.0%}", flush=True)
                results.append(
                    {"weight": shape, "rows": rows, "threads": threads, "speedup": speedup, "share_of_floor": share}
                    | figures
                )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        header = machine() | {"dtype": arguments.dtype, "clock": arguments.clock}
        arguments.json.write_text(json.dumps({"machine": header, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
