"""What the kernels' integer arithmetic loses, against what the stored codes have lost already."""

from __future__ import annotations

import pytest
import torch

from kvcompress_hf.kernels import Logits, Rows, Tail, page_layout

CONTEXT, HEAD_DIM, HEADS, GROUP = 700, 128, 2, 4


def attention(q, k, v, scale):
    """Dense attention of one query per head, in float64: `[q_heads, head_dim]`."""
    k, v = (x.double().repeat_interleave(GROUP, 0) for x in (k, v))
    p = torch.softmax(scale * (k @ q.double().unsqueeze(-1)).squeeze(-1), -1)
    return (p.unsqueeze(1) @ v).squeeze(1)


def distribution(name, generator):
    """Queries, keys, values and the scale of the logits."""
    q = torch.randn(HEADS * GROUP, HEAD_DIM, generator=generator)
    k = torch.randn(HEADS, CONTEXT, HEAD_DIM, generator=generator)
    v = torch.randn(HEADS, CONTEXT, HEAD_DIM, generator=generator)
    scale = HEAD_DIM**-0.5
    if name == "flat":
        scale = 1e-3
    if name == "sharp":
        scale = 0.25
    if name == "sink":  # a first token with nearly all of the probability and nearly nothing to say
        k[:, 0] = 1.5 * q.view(HEADS, GROUP, HEAD_DIM).mean(1)
        v[:, 0] *= 0.02
    if name == "outliers":  # channels as rotary embeddings leave them
        q[:, :4] *= 12.0
        k[:, :4] += 8.0
    return q, k, v, scale


@pytest.mark.parametrize("name", ["normal", "flat", "sharp", "sink", "outliers"])
@pytest.mark.parametrize("tier", [(8, 8), (8, 4), (8, 2), (4, 8), (4, 4), (4, 2), (2, 2)])
def test_arithmetic_adds_little_to_the_error_of_the_codes(backend, tier, name):
    q, k, v, scale = distribution(name, torch.Generator().manual_seed(5))
    layout = page_layout(HEAD_DIM, torch.float32, [tier])
    pages = -(-CONTEXT // layout.tiers[0].slots)
    slab = torch.zeros(HEADS * pages, layout.page_bytes, dtype=torch.uint8)
    table = torch.arange(HEADS * pages, dtype=torch.int32).view(HEADS, pages)
    lengths = torch.zeros(HEADS, dtype=torch.int32)
    rows = Rows(layout, [slab], torch.tensor([slab.data_ptr()]), 20, [table], [lengths])
    backend.pack(rows, 0, k[None], v[None], torch.full((1, HEADS), CONTEXT, dtype=torch.int32))
    lengths.fill_(CONTEXT)
    empty = torch.zeros(1, HEADS, 0, HEAD_DIM)
    tail = Tail(empty, empty, torch.zeros(1, dtype=torch.int32), torch.zeros(1, 0, dtype=torch.int32))
    actual = backend.decode_attention(
        q[None, :, None], None, None, rows, tail, position=CONTEXT, logits=Logits(scale), append=False
    ).view(HEADS * GROUP, HEAD_DIM)
    stored_k, stored_v = backend.read_slots(rows, 0, CONTEXT)
    stored = attention(q, stored_k, stored_v, scale)
    codes_error = (stored - attention(q, k, v, scale)).norm()
    assert (actual.double() - stored).norm() <= codes_error / 6
