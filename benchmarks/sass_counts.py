"""Instructions of a warp per 16 slots of the tensor-core decode, counted from machine code; no GPU is needed.

    python benchmarks/sass_counts.py --nvdisasm path/to/nvdisasm [--unit decode128_8] [--tiers k8v4 k4v2]

Needs NVRTC 13.0 (`pip install nvidia-cuda-nvrtc==13.0.*`) and nvdisasm (`pip install nvidia-cuda-nvdisasm`). Each tier
is compiled by itself. Counted is the longest way through the loop that has all products of a step, without what most
steps leave out: soft caps (a reciprocal), slots that are not seen (minus infinity), logits kept for statistics (generic
stores), and moves of the reference point (exchanges between lanes that are `BFLY`).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from kvcompress_hf.kernels.cuda import nvrtc

TIERS = {"native": (16, 16), "k8v8": (8, 8), "k8v4": (8, 4), "k4v4": (4, 4), "k4v2": (4, 2), "k2v2": (2, 2)}
PRODUCTS = {"decode64_8": 8, "decode64_16": 16, "decode128_8": 16, "decode128_16": 32, "decode256_8": 32}
PRODUCTS |= {unit: 16 for unit in nvrtc.SOURCES if unit.startswith("decode128_8_")}  # each knows one tier with codes
RARE = r"MUFU\.RCP|-INF|\bST\.E|SHFL\.BFLY"


def compile_tier(unit: str, tier: str, arch: str) -> nvrtc.Compiled:
    """A unit of `decode.cu` with one tier and one dtype."""
    texts = dict(nvrtc.source_texts())
    source = texts["decode.cu"].replace("KVC_DECODE(true, _bf16)\n", "")
    for name, (key, value) in TIERS.items():
        if name != tier:
            source = source.replace(f"    KVC_TIER({key}, {value})\n", "")
    texts["decode.cu"] = source
    plain = nvrtc.source_texts
    nvrtc.source_texts = lambda: texts
    try:
        return nvrtc.compile_source(unit, arch)
    finally:
        nvrtc.source_texts = plain


def basic_blocks(code: bytes, nvdisasm: str) -> tuple[list[list[str]], list[list[int]]]:
    """The kernel's instructions in blocks that run from end to end, and which blocks may follow each."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            if blocks[-1]:
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            blocks[-1].append(instruction[1])
            if re.search(r"\b(BRA|EXIT|RET)\b", instruction[1]):
                blocks.append([])
    return blocks, [list(_followers(i, block, labels, len(blocks))) for i, block in enumerate(blocks)]


def _followers(index: int, block: list[str], labels: dict[str, int], count: int) -> Iterator[int]:
    last = block[-1] if block else ""
    jump = re.search(r"\bBRA\b.*?(\.L_\w+)", last)
    if jump and jump[1] in labels:
        yield labels[jump[1]]
    goes_on = not re.search(r"\b(BRA|EXIT|RET)\b", last) or last.startswith("@") or re.search(r"BRA\S* !?U?P\d", last)
    if goes_on and index + 1 < count:
        yield index + 1


def longest_way(blocks: list[list[str]], followers: list[list[int]], products: int) -> list[str] | None:
    """The instructions of the longest common way around the loop that has all products; `None` = there is no such."""
    has = [sum("HMMA" in x for x in block) for block in blocks]
    rare = [any(re.search(RARE, x) for x in block) for block in blocks]
    # A block that only decides whether something rare is done belongs to it.
    kept = [any(re.search(r"\bST\.E", x) for x in block) for block in blocks]
    rare = [r or (len(blocks[i]) < 12 and i + 1 < len(blocks) and kept[i + 1]) for i, r in enumerate(rare)]
    best: list[int] | None = None
    for head in {to for i, after in enumerate(followers) for to in after if to <= i}:
        ways: dict[int, tuple[int, int, list[int]]] = {head: (has[head], len(blocks[head]), [head])}
        for i in range(head, len(blocks)):
            for to in followers[i] if i in ways else ():
                if to > i and not rare[to]:
                    found, length, way = ways[i]
                    new = (found + has[to], length + len(blocks[to]), [*way, to])
                    ways[to] = max(ways.get(to, new), new)
        for end, (found, length, way) in ways.items():
            longer = best is None or length > sum(len(blocks[i]) for i in best)
            if head in followers[end] and found == products and longer:
                best = way
    return None if best is None else [x for i in best for x in blocks[i]]


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvdisasm", default="nvdisasm")
    parser.add_argument("--unit", default="decode128_8", choices=PRODUCTS)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--tiers", nargs="+", default=list(TIERS), choices=TIERS)
    args = parser.parse_args()
    for tier in args.tiers:
        compiled = compile_tier(args.unit, tier, args.arch)
        way = longest_way(*basic_blocks(compiled.cubin, args.nvdisasm), PRODUCTS[args.unit])
        kinds = {kind: sum(kind in x for x in way or ()) for kind in ("LDG", "LOP3", "PRMT", "HFMA2", "HADD2", "IMAD")}
        print(f"{tier:8}{len(way or ()):6} instructions {kinds}, {compiled.kernels[0].registers} registers", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
