"""Instructions of a warp per 16 slots of the tensor-core decode, counted from machine code; no GPU is needed.

    python benchmarks/sass_counts.py [--unit decode128_8] [--tiers k8v4 k4v2]

Needs NVRTC 13.0 (`pip install nvidia-cuda-nvrtc==13.0.*`) and nvdisasm (`pip install nvidia-cuda-nvdisasm`). Each tier
is compiled by itself. Counted is the longest way through the innermost loop that has all products of a step, without
what most steps leave out: soft caps (a reciprocal), slots that are not seen (minus infinity), logits kept for
statistics (generic stores), and moves of the reference point (exchanges between lanes that are `BFLY`). Once per page a
step also opens the next one: both ways are counted, and the mean over a page without slot fields. In the kernels with
bulk copies (`..._bulk`) that is to ask for a whole page and to wait, once, for another.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kvcompress_hf.kernels import page_layout
from kvcompress_hf.kernels.cuda import nvrtc

TIERS = {"native": (16, 16), "k8v8": (8, 8), "k8v4": (8, 4), "k4v4": (4, 4), "k4v2": (4, 2), "k2v2": (2, 2)}
# Of keys and of values; with codes, each tile of eight heads has one more, for the sum of the probabilities.
PRODUCTS = {"decode64_8": 8, "decode64_16": 16, "decode128_8": 16, "decode128_16": 32, "decode256_8": 32}
PRODUCTS |= {"decode64_8_bulk": 8, "decode256_8_bulk": 32}
PRODUCTS |= {unit: 16 for unit in nvrtc.SOURCES if unit.startswith("decode128_8_")}  # most know one tier with codes
RARE = r"MUFU\.RCP|-INF|\bST\.E|SHFL\.BFLY|COLLECTIVE"
# In a block without products: the address of the next page's slab, or a wait for a page.
PAGE = r"LDG\.E\.64\b|SYNCS\.PHASECHK"


@dataclass(frozen=True)
class Counts:
    """Instructions of a warp per 16 slots.

    Args:
        within: Of a step that stays on its page.
        opening: Of one that opens the next page.
        mean: Over all steps of a page.
        way: The instructions of the first.
        opening_way: The instructions of the second.
        registers: Of the kernel.
    """

    within: int
    opening: int
    mean: float
    way: list[str]
    opening_way: list[str]
    registers: int


def find_nvdisasm() -> str | None:
    """nvdisasm on the path, or where pip puts it."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    found = [str(path) for folder in folders for path in sorted(folder.glob("*/bin/nvdisasm"))]
    return shutil.which("nvdisasm") or next(iter(found), None)


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
    goes_on = not re.search(r"\b(BRA|EXIT|RET)\b", last) or re.search(r"^@|BRA\.DIV|BRA\S* !?U?P\d", last)
    if goes_on and index + 1 < count:
        yield index + 1


def _loop(head: int, end: int, followers: list[list[int]]) -> set[int]:
    """The blocks of the loop that goes from its end back to its head; none where that jump closes no loop."""
    before: dict[int, list[int]] = {}
    for i, after in enumerate(followers):
        for to in after:
            before.setdefault(to, []).append(i)
    inside, todo = {head, end}, [end]
    while todo:
        block = todo.pop()
        for i in before.get(block, ()) if block != head else ():
            if i not in inside:
                inside.add(i)
                todo.append(i)
    return inside if head == 0 or 0 not in inside else set()


def _forward(head: int, followers: list[list[int]], left_out: list[bool]) -> list[int]:
    """What can be reached from a block, in an order in which all ways but those of loops lead forward."""
    order: list[int] = []
    seen, stack = {head}, [(head, iter(followers[head]))]
    while stack:
        block, after = stack[-1]
        for to in after:
            if to not in seen and not left_out[to]:
                seen.add(to)
                stack.append((to, iter(followers[to])))
                break
        else:
            order.append(block)
            stack.pop()
    return order[::-1]


def longest_way(
    blocks: list[list[str]], followers: list[list[int]], products: int, opening: bool = True
) -> list[str] | None:
    """The longest common way around the innermost loop that has all products.

    Args:
        blocks: The kernel's instructions.
        followers: Which blocks may follow each.
        products: Of a step.
        opening: Whether the way opens a page.

    Returns:
        Its instructions; `None` = there is no such way.
    """
    has = [sum("HMMA" in x for x in block) for block in blocks]
    rare = [any(re.search(RARE, x) for x in block) for block in blocks]
    parts = [sum("UBLKCP" in x for x in block) > 1 for block in blocks]  # of a page, where a way begins or ends
    rare = [r or part or block == ["YIELD"] for r, part, block in zip(rare, parts, blocks, strict=True)]
    # A block that only decides whether something rare is done belongs to it.
    kept = [any(re.search(r"\bST\.E", x) for x in block) for block in blocks]
    rare = [r or (len(blocks[i]) < 12 and i + 1 < len(blocks) and kept[i + 1]) for i, r in enumerate(rare)]
    opens = [not has[i] and any(re.search(PAGE, x) for x in block) for i, block in enumerate(blocks)]
    left_out = rare if opening else [r or o for r, o in zip(rare, opens, strict=True)]
    loops = []
    for head, end in ((to, i) for i, after in enumerate(followers) for to in after):
        inside = _loop(head, end, followers)
        order = _forward(head, followers, [out or i not in inside for i, out in enumerate(left_out)])
        place = {block: n for n, block in enumerate(order)}
        ways: dict[int, tuple[int, int, list[int]]] = {head: (has[head], len(blocks[head]), [head])}
        for i in order if inside else ():
            for to in followers[i]:
                if i in ways and place.get(to, -1) > place[i]:
                    found, length, way = ways[i]
                    new = (found + has[to], length + len(blocks[to]), [*way, to])
                    ways[to] = max(ways.get(to, new), new)
        loops += [ways[end]] if inside and end in ways and ways[end][0] == products else []
    best = min(loops, key=lambda way: way[1], default=None)
    return None if best is None else [x for i in best[2] for x in blocks[i]]


def count(unit: str, tier: str, arch: str, nvdisasm: str) -> Counts:
    """Compiles a tier of a unit and counts.

    Args:
        unit: A name in `PRODUCTS`.
        tier: A name in `TIERS`.
        arch: A real architecture.
        nvdisasm: The command.

    Returns:
        What was counted.

    Raises:
        ValueError: The loop was not found.
    """
    compiled = compile_tier(unit, tier, arch)
    code = basic_blocks(compiled.cubin, nvdisasm)
    products = PRODUCTS[unit] + (0 if tier == "native" else 2 if unit.endswith("_16") else 1)
    within, opening = (longest_way(*code, products, way) for way in (False, True))
    if opening is None:
        raise ValueError(f"{unit} has no loop with {products} products for {tier}")
    within = within or opening  # a page of 16 slots
    head_dim = int(unit.removeprefix("decode").split("_")[0])
    bits = [x % 16 for x in TIERS[tier]]
    steps = page_layout(head_dim, torch.float16, [(bits[0], bits[1])], ()).tiers[0].slots // 16
    mean = len(within) + (len(opening) - len(within)) / steps
    return Counts(len(within), len(opening), mean, within, opening, compiled.kernels[0].registers)


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvdisasm", default=find_nvdisasm() or "nvdisasm")
    parser.add_argument("--unit", default="decode128_8", choices=PRODUCTS)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--tiers", nargs="+", default=list(TIERS), choices=TIERS)
    args = parser.parse_args()
    for tier in args.tiers:
        found = count(args.unit, tier, args.arch, args.nvdisasm)
        kinds = {kind: sum(kind in x for x in found.way) for kind in ("LDG", "LOP3", "PRMT", "HFMA2", "HADD2", "IMAD")}
        print(
            f"{tier:8}{found.mean:6.0f} instructions: {found.within} on a page {kinds}, {found.opening} opening one; "
            f"{found.registers} registers",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
