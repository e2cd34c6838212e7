"""Others at the same work, each in an environment of its own, beside ours.

    python benchmarks/peers/run.py kvpress                  # answers after compression, at measured bytes
    python benchmarks/peers/run.py openvino llama_cpp       # decoding: these, stock transformers and ours in turn
    python benchmarks/peers/run.py onnxruntime              # attention of one decoded token, one layer
    python benchmarks/peers/run.py tables                   # prints the tables of the pages in docs/ from the figures

The first use of a peer installs it and converts the model, which takes minutes; what is there is used again. Figures
go to benchmarks/results/, with machine, versions and date.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from environment import ROOT

RESULTS = ROOT / "benchmarks" / "results"
ENGINES = ("openvino", "llama_cpp")
NAMES = ("kvpress", *ENGINES, "onnxruntime", "tables")


def numbers(text: str) -> list[int]:
    """`512,2048` as a list."""
    return [int(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("peers", nargs="+", choices=NAMES, metavar="PEER", help=f"of {', '.join(NAMES)}")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--output", type=Path, help="file for the figures (default: in benchmarks/results)")
    answers = made.add_argument_group("kvpress")
    answers.add_argument("--contexts", type=int, default=8, help="how many (default: %(default)s)")
    answers.add_argument("--length", type=int, default=2000, help="tokens of each (default: %(default)s)")
    answers.add_argument(
        "--recipes", help="ours, as `kvcompress eval` takes them (default: every preset that compares)"
    )
    speed = made.add_argument_group("engines and onnxruntime")
    speed.add_argument("--stored", type=numbers, default=[512, 2048, 4096, 8192], help="tokens in the cache")
    speed.add_argument("--batch", type=numbers, default=[1, 4, 16])
    speed.add_argument("--turns", type=int, default=5, help="of every engine at every point, and one to warm up")
    speed.add_argument("--seconds", type=float, default=0.3, help="of a turn (default: %(default)s)")
    return made


def main() -> None:
    arguments = parser().parse_args()
    asked = set(arguments.peers)
    if "kvpress" in asked:
        from accuracy import RECIPES, Amount, measure_kvpress

        amount, recipes = Amount(arguments.contexts, arguments.length), arguments.recipes or RECIPES
        measure_kvpress(arguments.output or RESULTS / "peers_kvpress_smollm2.json", amount, arguments.threads, recipes)
    if engines := [name for name in ENGINES if name in asked]:
        from speed import Points, measure_engines

        points = Points(arguments.stored, arguments.batch, arguments.turns, arguments.seconds)
        output = arguments.output or RESULTS / "peers_decode_smollm2_cpu.json"
        measure_engines(engines, points, arguments.threads, output)
    if "onnxruntime" in asked:
        from speed import Points, measure_attention

        points = Points(arguments.stored, arguments.batch, arguments.turns, arguments.seconds)
        measure_attention(points, arguments.threads, arguments.output or RESULTS / "peers_attention_cpu.json")
    if "tables" in asked:
        from tables import print_tables

        print_tables(RESULTS)


if __name__ == "__main__":
    main()
