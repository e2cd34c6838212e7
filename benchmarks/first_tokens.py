"""The kernel for chunks over new tokens alone, beside torch's attention: when prompts are to go through it.

    python benchmarks/first_tokens.py [--isa avx2] [--threads 1] [--json FILE]
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/first_tokens.py --isa avx2

Forms take turns; printed are medians, how many times as fast ours is (`CpuBackend.reads_prompts` goes by it), and the
relative error of both against float64. The second line has torch do without AVX512 as well.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import machine

from kvcompress_hf.kernels import CpuBackend, Logits, Rows, page_layout

SHAPES = [(9, 3, 64), (32, 8, 128), (4, 1, 256)]  # query heads, KV heads, head_dim: SmolLM2, Llama 3, Gemma 3


def no_rows(kv_heads: int, head_dim: int, dtype: torch.dtype) -> Rows:
    """Rows of a cache that holds nothing."""
    layout = page_layout(head_dim, dtype, [(0, 0)], ["position"])
    return Rows(
        layout=layout,
        slabs=[],
        slab_addresses=torch.zeros(0, dtype=torch.int64),
        slab_shift=0,
        tables=[torch.zeros(kv_heads, 0, dtype=torch.int32)],
        lengths=[torch.zeros(kv_heads, dtype=torch.int32)],
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", help="instruction set of our kernel; the best there is if left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backend, results = CpuBackend(args.isa), []
    print(f"{'dtype':<10}{'heads':>12}{'tokens':>8}{'torch us':>10}{'ours us':>10}{'x':>7}{'error':>19}")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for q_heads, kv_heads, dim in SHAPES:
            rows, logits = no_rows(kv_heads, dim, dtype), Logits(dim**-0.5)
            for tokens in (32, 128, 512, 2048):
                q, k, v = (
                    torch.randn(1, tokens, heads, dim).to(dtype).transpose(1, 2)
                    for heads in (q_heads, kv_heads, kv_heads)
                )
                forms = {
                    "torch": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(
                        q, k, v, is_causal=True, enable_gqa=True
                    ).transpose(1, 2),
                    "ours": lambda q=q, k=k, v=v, rows=rows, logits=logits: backend.chunk_attention(
                        q, k, v, rows, None, position=0, logits=logits
                    ),
                }
                times: dict[str, list[float]] = {name: [] for name in forms}
                for _ in range(args.rounds + 1):
                    for name, form in forms.items():
                        started = time.perf_counter()
                        form()
                        times[name].append(1e6 * (time.perf_counter() - started))
                us = {name: statistics.median(each[1:]) for name, each in times.items()}
                exact = forms["torch"](q.double(), k.double(), v.double())
                error = {name: float((form() - exact).norm() / exact.norm()) for name, form in forms.items()}
                shape = f"{q_heads}/{kv_heads}x{dim}"
                results.append({"dtype": str(dtype)[6:], "shape": shape, "tokens": tokens, "us": us, "error": error})
                print(
                    f"{str(dtype)[6:]:<10}{shape:>12}{tokens:>8}{us['torch']:>10.0f}{us['ours']:>10.0f}"
                    f"{us['torch'] / us['ours']:>7.2f}{error['torch']:>10.1e}{error['ours']:>9.1e}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "isa": backend.isa, "results": results}) + "\n")


if __name__ == "__main__":
    main()
