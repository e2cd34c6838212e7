"""Every kernel on a GPU against the reference in float64 on the CPU, on the same bytes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvcompress_hf.kernels import Logits, ReferenceBackend, Rotation, Rows, Tail, page_layout
from kvcompress_hf.kernels.cuda import CudaBackend, launcher_for

pytestmark = pytest.mark.gpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TIERS = [(0, 0), (8, 8), (8, 4), (4, 4), (4, 2), (2, 2)]
LIMIT = {F32: 1e-5, F16: 1e-3, BF16: 5e-3}  # relative error of an output vector
EXACT = ReferenceBackend(compute=torch.float64)
SLAB_PAGES = 64


@dataclasses.dataclass
class Case:
    """A cache on the CPU and its copy on the GPU."""

    rows: Rows
    tail: Tail
    gpu_rows: Rows
    gpu_tail: Tail
    kv_heads: int
    group: int
    batch: int

    def randn(self, heads, tokens):
        shape = (self.batch, tokens, heads, self.rows.layout.head_dim)
        return torch.randn(shape).to(self.rows.layout.dtype).transpose(1, 2)

    def check_tail(self):
        for name in ("lengths", "positions"):
            assert torch.equal(getattr(self.gpu_tail, name).cpu(), getattr(self.tail, name))
        for b, n in enumerate(self.tail.lengths.tolist()):
            assert torch.equal(self.gpu_tail.k[b, :, :n].cpu(), self.tail.k[b, :, :n])


def to_gpu(rows: Rows, tail: Tail) -> tuple[Rows, Tail]:
    slabs = [slab.cuda() for slab in rows.slabs]
    addresses = torch.tensor([slab.data_ptr() for slab in slabs], dtype=torch.int64, device="cuda")
    tables, lengths = [t.cuda() for t in rows.tables], [t.cuda() for t in rows.lengths]
    fields = None if tail.fields is None else tail.fields.cuda()
    gpu_tail = Tail(tail.k.cuda(), tail.v.cuda(), tail.lengths.cuda(), tail.positions.cuda(), fields)
    return Rows(rows.layout, slabs, addresses, rows.slab_shift, tables, lengths), gpu_tail


def make(tiers, head_dim, dtype, *, most=700, batch=2, kv_heads=4, group=4, capacity=40, fields=("position", "sum")):
    torch.manual_seed(head_dim)
    layout = page_layout(head_dim, dtype, tiers, fields)
    count = batch * kv_heads
    room = most + 40
    tables, used = [], 0
    for tier in layout.tiers:
        pages = -(-room // tier.slots)
        tables.append(torch.arange(used, used + count * pages, dtype=torch.int32).view(count, pages))
        used += count * pages
    order = torch.randperm(used).int()
    tables = [order[table.long()] for table in tables]
    slabs = [torch.full((SLAB_PAGES, layout.page_bytes), 255, dtype=torch.uint8) for _ in range(used // SLAB_PAGES + 1)]
    addresses = torch.tensor([slab.data_ptr() for slab in slabs], dtype=torch.int64)
    lengths = [torch.zeros(count, dtype=torch.int32) for _ in tiers]
    rows = Rows(layout, slabs, addresses, SLAB_PAGES.bit_length() - 1, tables, lengths)
    tail = Tail(
        torch.randn(batch, kv_heads, capacity, head_dim).to(dtype),
        torch.randn(batch, kv_heads, capacity, head_dim).to(dtype),
        torch.tensor([5, 0] * (batch // 2), dtype=torch.int32),
        torch.zeros(batch, capacity, dtype=torch.int32) + 2 * room,
        torch.zeros(len(fields), batch, kv_heads, capacity, dtype=torch.int32),
    )
    return Case(rows, tail, *to_gpu(rows, tail), kv_heads, group, batch)


def fill(case, gpu, most=700):
    """Packs random tokens on both sides; the pages must agree byte for byte."""
    layout = case.rows.layout
    for tier in range(len(layout.tiers)):
        k, v = case.randn(case.kv_heads, most), case.randn(case.kv_heads, most)
        counts = torch.randint(0, most + 1, (case.batch, case.kv_heads), dtype=torch.int32)
        counts[0, 0] = 0
        shape = (case.batch, case.kv_heads, most)
        fields = {"position": torch.arange(most, dtype=torch.int32).expand(shape), "sum": torch.rand(shape)}
        fields = {name: fields[name] for name in layout.fields}
        expected = EXACT.pack(case.rows, tier, k, v, counts, None, fields)
        moved = {name: x.cuda() for name, x in fields.items()}
        assert gpu.pack(case.gpu_rows, tier, k.cuda(), v.cuda(), counts.cuda(), None, moved) == expected
        case.rows.lengths[tier] += counts.flatten()
        case.gpu_rows.lengths[tier] += counts.flatten().cuda()
    same_pages(case)


def same_pages(case):
    for got, wanted in zip(case.gpu_rows.slabs, case.rows.slabs, strict=True):
        assert torch.equal(got.cpu(), wanted)


def close(got, wanted, dtype):
    got, wanted = got.cpu().double(), wanted.double()
    norm, error = wanted.norm(dim=-1), (got - wanted).norm(dim=-1)
    assert torch.isfinite(error).all()
    assert (error <= LIMIT[dtype] * norm + 1e-12).all(), float((error / norm.clamp_min(1e-30)).max())


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("tiers", [TIERS[:4], TIERS[3:]], ids=["high", "low"])
def test_storage(gpu, tiers, head_dim, dtype):
    case = make(tiers, head_dim, dtype, most=200)
    fill(case, gpu, 200)
    n = 50
    row = torch.full((n,), 3, dtype=torch.int32)
    slots = torch.randperm(200)[: 2 * n].int()
    for rows in (case.rows, case.gpu_rows):
        for length in rows.lengths:
            length[3] = 200
    for tier in range(len(tiers)):  # fills what is read below
        k, v = case.randn(4, 200), case.randn(4, 200)
        counts = torch.zeros(2, 4, dtype=torch.int32)
        counts[0, 3] = 200
        fields = {"position": torch.zeros(2, 4, 200, dtype=torch.int32), "sum": torch.rand(2, 4, 200)}
        for backend, rows, on in ((EXACT, case.rows, "cpu"), (gpu, case.gpu_rows, "cuda")):
            rows.lengths[tier][3] = 0
            moved = {name: x.to(on) for name, x in fields.items()}
            backend.pack(rows, tier, k.to(on), v.to(on), counts.to(on), None, moved)
            rows.lengths[tier][3] = 200
    for tier in range(len(tiers)):
        other = (tier + 1) % len(tiers)
        EXACT.move(case.rows, tier, row, slots[:n], slots[n:])
        gpu.move(case.gpu_rows, tier, row.cuda(), slots[:n].cuda(), slots[n:].cuda())
        expected = EXACT.retier(case.rows, row, tier, slots[:n], other, slots[n:])
        assert gpu.retier(case.gpu_rows, row.cuda(), tier, slots[:n].cuda(), other, slots[n:].cuda()) == expected
    same_pages(case)
    for tier in range(len(tiers)):
        got, wanted = gpu.read_slots(case.gpu_rows, tier, 210), EXACT.read_slots(case.rows, tier, 210)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)
        got, wanted = gpu.read_field(case.gpu_rows, tier, "sum", 99), EXACT.read_field(case.rows, tier, "sum", 99)
        torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("tiers", [[tier] for tier in TIERS] + [[(8, 4), (4, 2), (0, 0)]])
@pytest.mark.parametrize("group", [4, 12, 20])
def test_decode(gpu, group, tiers, head_dim, dtype):
    case = make(tiers, head_dim, dtype, group=group)
    fill(case, gpu)
    plan = gpu.plan_decode(case.gpu_rows, case.gpu_tail, logits=Logits(0.1), q_heads=4 * group, sum_field="sum")
    for position in range(2000, 2003):
        q, k, v = case.randn(4 * group, 1), case.randn(4, 1), case.randn(4, 1)
        options = dict(position=position, logits=Logits(0.1), sum_field="sum")
        wanted = EXACT.decode_attention(q, k, v, case.rows, case.tail, **options)
        close(plan.run(q.cuda(), k.cuda(), v.cuda(), position), wanted, dtype)
    case.check_tail()
    for tier in range(len(tiers)):
        got = gpu.read_field(case.gpu_rows, tier, "sum", 700).cpu()
        torch.testing.assert_close(got, EXACT.read_field(case.rows, tier, "sum", 700), rtol=3e-3, atol=1e-5)


@pytest.mark.parametrize("bulk_copies", [True, False])
@pytest.mark.parametrize("tier", [(8, 4), (4, 4), (4, 2), (2, 2)])
def test_decode_of_long_rows(gpu, tier, bulk_copies):
    case = make([tier], 128, F16, most=40_000, fields=())  # every warp has some pages, one after the other
    fill(case, gpu, most=40_000)
    q, k, v = case.randn(16, 1), case.randn(4, 1), case.randn(4, 1)
    options = dict(position=90_000, logits=Logits(0.1))
    wanted = EXACT.decode_attention(q, k, v, case.rows, case.tail, **options)
    backend = CudaBackend(launcher_for(0, bulk_copies))
    for _ in range(3):  # what is left of a launch must not hurt the next
        got = backend.decode_attention(q.cuda(), None, None, case.gpu_rows, case.gpu_tail, **options, append=False)
        assert torch.isfinite(got).all()
    got = backend.decode_attention(q.cuda(), k.cuda(), v.cuda(), case.gpu_rows, case.gpu_tail, **options)
    close(got, wanted, F16)


@pytest.mark.parametrize("head_dim, dtype", [(16, F32), (64, F32), (80, F16), (96, BF16)])
def test_decode_of_other_shapes(gpu, head_dim, dtype):
    case = make([(8, 4), (0, 0)], head_dim, dtype)
    fill(case, gpu)
    q, k, v = case.randn(16, 1), case.randn(4, 1), case.randn(4, 1)
    wanted = EXACT.decode_attention(q, k, v, case.rows, case.tail, position=9, logits=Logits(0.1, softcap=5.0))
    got = gpu.decode_attention(
        q.cuda(), k.cuda(), v.cuda(), case.gpu_rows, case.gpu_tail, position=9, logits=Logits(0.1, softcap=5.0)
    )
    close(got, wanted, dtype)


@pytest.mark.parametrize("head_dim, dtype", [(64, F32), (80, F16), (128, BF16)])
def test_chunk_and_scores(gpu, head_dim, dtype):
    case = make([(8, 4), (4, 2)], head_dim, dtype, most=300)
    fill(case, gpu, 300)
    q, k, v = case.randn(16, 33), case.randn(4, 33), case.randn(4, 33)
    on_gpu = (q.cuda(), k.cuda(), v.cuda())
    options = dict(position=900, logits=Logits(0.1, window=700))
    wanted = EXACT.chunk_attention(q, k, v, case.rows, case.tail, **options)
    got = gpu.chunk_attention(*on_gpu, case.gpu_rows, case.gpu_tail, **options)
    close(got, wanted, dtype)
    wanted = EXACT.window_scores(q, k, case.rows, case.tail, key_position=900, exclude=2, **options)
    got = gpu.window_scores(*on_gpu[:2], case.gpu_rows, case.gpu_tail, key_position=900, exclude=2, **options)
    for a, b in [*zip(got.past, wanted.past, strict=True), (got.tail, wanted.tail), (got.fresh, wanted.fresh)]:
        torch.testing.assert_close(a.cpu(), b, rtol=3e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("n_q, n_k", [(3, 3), (16, 16), (120, 120), (20, 200)])
def test_chunk_and_scores_on_tensor_cores(gpu, head_dim, dtype, n_q, n_k):
    case = make([*TIERS[:3], (4, 2)], head_dim, dtype)
    fill(case, gpu)
    q, k, v = case.randn(16, n_q), case.randn(4, n_k), case.randn(4, n_k)
    options = dict(position=2500 + n_k - n_q, key_position=2500)
    for more in (dict(), dict(window=2100), dict(softcap=20.0, sinks=torch.linspace(-3, 3, 16))):
        there = more | {name: x.cuda() for name, x in more.items() if isinstance(x, torch.Tensor)}
        chosen, on_gpu = (options | {"logits": Logits(head_dim**-0.5, **each)} for each in (more, there))
        for masks in [{}] if "window" in more else [{}, dict(allowed=torch.rand(2, n_q, n_k) < 0.5)]:
            wanted = EXACT.chunk_attention(q, k, v, case.rows, case.tail, **chosen, **masks)
            moved = {name: x.cuda() for name, x in masks.items()}
            for _ in range(2):  # the same again: what blocks share is in order afterwards
                got = gpu.chunk_attention(q.cuda(), k.cuda(), v.cuda(), case.gpu_rows, case.gpu_tail, **on_gpu, **moved)
                close(got, wanted, dtype)
        wanted = EXACT.column_scores(q, k, case.rows, case.tail, exclude=2, **chosen)
        found = gpu.column_scores(q.cuda(), k.cuda(), case.gpu_rows, case.gpu_tail, exclude=2, **on_gpu)
        for got, exactly in zip(found, wanted, strict=True):
            parts = [*zip(got.past, exactly.past, strict=True), (got.tail, exactly.tail), (got.fresh, exactly.fresh)]
            for a, b in parts:
                torch.testing.assert_close(a.cpu(), b, rtol=3e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group, n", [(1, 5), (4, 700), (8, 130)])
def test_the_second_look(gpu, group, n, head_dim, dtype):
    q, k = (torch.randn(2, n, heads, head_dim).to(dtype).transpose(1, 2) for heads in (2 * group, 2))
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[1, : n // 3] = False
    inv_freq = 1e4 ** -(torch.arange(0, head_dim, 2) / head_dim)
    for turns in (Rotation(inv_freq), Rotation(inv_freq[:16], start=8), Rotation(inv_freq, interleaved=True)):
        for mask in (None, valid):
            asked = dict(logits=Logits(head_dim**-0.5, softcap=9.0), rotation=turns)
            wanted = EXACT.non_causal_scores(q, k, **asked, valid=mask)
            got = gpu.non_causal_scores(q.cuda(), k.cuda(), **asked, valid=None if mask is None else mask.cuda()).cpu()
            assert (got - wanted).norm() <= 2e-4 * wanted.norm() and torch.equal(got == 0, wanted == 0)


def test_another_stream(gpu):
    case = make([(8, 4)], 128, F16)
    fill(case, gpu)
    q, k, v = (x.cuda() for x in (case.randn(16, 1), case.randn(4, 1), case.randn(4, 1)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = gpu.decode_attention(q, k, v, case.gpu_rows, case.gpu_tail, position=9, logits=Logits(0.1))
    stream.synchronize()
    wanted = EXACT.decode_attention(q.cpu(), k.cpu(), v.cpu(), case.rows, case.tail, position=9, logits=Logits(0.1))
    close(got, wanted, F16)


@pytest.mark.parametrize("head_dim", [128, 80])
def test_a_step_in_a_cuda_graph(gpu, head_dim):
    case = make([(8, 4)], head_dim, F16)
    fill(case, gpu)
    plan = gpu.plan_decode(case.gpu_rows, case.gpu_tail, logits=Logits(0.1, window=1500), q_heads=16, sum_field="sum")
    options = dict(logits=Logits(0.1, window=1500), sum_field="sum")
    static = [torch.empty(2, heads, 1, head_dim, dtype=F16, device="cuda") for heads in (16, 4, 4)]
    graph, out = torch.cuda.CUDAGraph(), None
    for position in range(2000, 2006):
        new = [case.randn(heads, 1) for heads in (16, 4, 4)]
        for x, y in zip(static, new, strict=True):
            x.copy_(y)
        if position == 2001:
            with torch.cuda.graph(graph):
                out = plan.run(*static, position)
        if position in (2000, 2004):
            got = plan.run(*static, position)
        else:
            graph.replay()
            got = out
        close(got, EXACT.decode_attention(*new, case.rows, case.tail, position=position, **options), F16)
    case.check_tail()
    fields = (gpu.read_field(case.gpu_rows, 0, "sum", 700).cpu(), EXACT.read_field(case.rows, 0, "sum", 700))
    torch.testing.assert_close(*fields, rtol=3e-3, atol=1e-5)


@pytest.mark.parametrize("preset", ["lossless", "k8v4", "kv-compress", "leankv", "roco", "auto", "kvzip"])
def test_generate(gpu, preset):
    from transformers import LlamaConfig, LlamaForCausalLM

    import kvcompress_hf as kvc

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().cuda().half()
    ids = torch.randint(3, 101, (2, 300), device="cuda")
    options = dict(max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    stock = model.generate(ids, **options).sequences
    budgets = {"kv-compress": 0.3, "auto": 0.3, "kvzip": 0.3, "roco": 64}
    changes = {"budget": budgets[preset]} if preset in budgets else {}
    with kvc.patched(model, preset, **changes):
        result = model.generate(ids, **options)
    assert result.sequences.shape == stock.shape
    if preset == "lossless":
        assert (result.sequences == stock).float().mean() > 0.95  # fp16: near ties may part
    else:
        assert kvc.cache_of(result).memory().total < kvc.cache_of(result).memory().dense
