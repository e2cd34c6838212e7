"""Runs every CUDA kernel once on a library built with sanitizers; `test_sanitizer.py` starts it.

python sanitized.py <library> [broken | askew]
"""

import sys
from pathlib import Path

import torch
from conftest import _make

from kvcompress_hf.kernels import Logits, Rotation
from kvcompress_hf.kernels.host_shim import shim_backend

backend = shim_backend(Path(sys.argv[1]), "shuffled")
through_rings = shim_backend(Path(sys.argv[1]), "shuffled", bulk_copies=True)
SHAPES = [
    (64, 3, torch.float16, [(8, 4), (4, 2), (0, 0)]),
    (64, 9, torch.bfloat16, [(8, 8), (4, 4), (2, 2)]),
    (128, 10, torch.bfloat16, [(8, 8), (4, 4), (2, 2)]),
    (128, 4, torch.float16, [(8, 4), (4, 2), (0, 0)]),
    (128, 5, torch.bfloat16, [(8, 4), (0, 0)]),
    (256, 2, torch.float16, [(0, 0), (8, 4), (4, 2)]),
    (256, 12, torch.bfloat16, [(8, 8), (4, 4), (2, 2)]),
    (80, 3, torch.float32, [(0, 0), (8, 2)]),
]
for head_dim, group, dtype, tiers in SHAPES[:1] if sys.argv[2:] else SHAPES:
    twins = _make(tiers=tiers, head_dim=head_dim, dtype=dtype, group=group, capacity=9, tail_lengths=(5, 0))
    rows, tail = twins.rows, twins.tail
    k, v, q = twins.randn(2, 7).clone(), twins.randn(2, 7).clone(), twins.randn(2 * group, 7).clone()
    counts = torch.tensor([[7, 0], [3, 7]], dtype=torch.int32)
    fields = {name: torch.zeros(2, 2, 7).to(rows.layout.field_dtype(name)) for name in rows.layout.fields}
    row, src, dst = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3], [6, 5], [0, 0]))
    for tier in range(len(tiers)):
        backend.pack(rows, tier, k, v, counts, None, fields)
        rows.lengths[tier] += counts.flatten()
        backend.move(rows, tier, row, dst, src)
        backend.retier(rows, row, tier, src, (tier + 1) % len(tiers), dst)
        backend.read_slots(rows, tier, 50)
        backend.slot_sums(rows, tier, torch.ones(4, 300, dtype=torch.bool))
        backend.write_field(rows, tier, "sum", torch.zeros(4, 50))
    backend.chunk_attention(q, k, v, rows, tail, position=900, logits=Logits(0.1))
    backend.chunk_attention(q[:, :, :1], k, v, rows, tail, position=900, logits=Logits(0.1, window=99))
    many = [twins.randn(heads, 70) for heads in (6, 2, 2)]
    backend.chunk_attention(*many, rows, None, position=900, logits=Logits(0.1))
    backend.window_scores(q, k, rows, tail, position=900, key_position=900, logits=Logits(0.1, window=99), exclude=2)
    valid = torch.arange(70) > 20 * row[:, None]
    for turns in (Rotation(torch.full((channels,), 0.1)) for channels in (head_dim // 2, 3)):
        backend.non_causal_scores(many[0], many[1], logits=Logits(0.1), rotation=turns, valid=valid)
    backend.append(tail, k[:, :, :3], v[:, :, :3], 900)
    token = (x[:, :, :1] for x in (q, k, v))
    statistics = dict(sum_field="sum", square_field="square")
    backend.decode_attention(*token, rows, tail, position=903, logits=Logits(0.1, window=800), **statistics)
    token = twins.randn(2 * group, 1)
    through_rings.decode_attention(token, None, None, rows, tail, position=904, logits=Logits(0.1), append=False)
    if "askew" in sys.argv:
        rows.slab_addresses += 2
        backend.decode_attention(q[:, :, :1], None, None, rows, tail, position=904, logits=Logits(0.1), append=False)
    if "broken" in sys.argv:
        rows.slab_addresses += 2 * rows.layout.page_bytes  # reaches behind the slabs
        for tier in range(len(tiers)):
            backend.read_slots(rows, tier, 50)
sys.stdout.write("clean\n")
