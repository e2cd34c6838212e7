"""The product of few rows with a weight, against plain torch in float64."""

import threading

import pytest
import torch
import torch.nn.functional as F

from kvcompress_hf.kernels import MOST_ROWS, CpuBackend, LinearPlan, ReferenceBackend

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def made(out_features, in_features, dtype=BF16, rows=1, bias=False, seed=0):
    """x, weight and bias."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((rows, in_features), (out_features, in_features), (out_features,))
    x, weight, b = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    return x, weight, b if bias else None


def rounding(dtype):
    """Half of a unit in the last place."""
    return torch.finfo(dtype).eps / 2


def check(backend, exact, x, weight, bias=None):
    """Sums in float32 differ from exact ones by much less than the one rounding at the end."""
    found = backend.plan_linear(weight, bias).run(x)
    assert found.dtype == x.dtype and found.shape == (*x.shape[:-1], weight.shape[0])
    y, w = x.double(), weight.double()
    b = torch.zeros(weight.shape[0]).double() if bias is None else bias.double()
    expected, terms = y @ w.T + b, y.abs() @ w.abs().T + b.abs()
    error = (found.double() - expected).abs()
    tiny = torch.finfo(x.dtype).smallest_normal
    assert (error <= 1.01 * rounding(x.dtype) * expected.abs() + 2e-6 * terms + tiny).all()
    same = exact.plan_linear(weight, bias).run(x)
    torch.testing.assert_close(found, same, rtol=1.01 * torch.finfo(x.dtype).eps, atol=2e-6 * float(terms.max()))
    return found


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "out_features, in_features",
    [(576, 576), (192, 576), (64, 1536), (1, 1), (3, 7), (4, 31), (5, 32), (7, 33), (9, 8), (130, 1000), (17, 2050)],
)
def test_shapes(backend, exact, out_features, in_features, rows, bias, dtype):
    check(backend, exact, *made(out_features, in_features, dtype, rows, bias))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rows_of_the_weight_apart(backend, exact, dtype):
    x, weight, bias = made(50, 120, dtype, 2, True)
    for part in (weight[:, :77], weight[:, 3:100], weight[::3], weight[5:6]):
        check(backend, exact, x[:, : part.shape[1]].contiguous(), part, bias[: part.shape[0]].contiguous())


@pytest.mark.parametrize("shape", [(64,), (1, 64), (1, 1, 64), (2, 2, 64), (4, 1, 64), (1, 3, 64)])
def test_leading_dimensions(backend, exact, shape):
    _, weight, bias = made(20, 64, bias=True)
    check(backend, exact, torch.randn(shape).to(BF16), weight, bias)


def test_x_not_contiguous(backend, exact):
    _, weight, _ = made(20, 64)
    x = torch.randn(64, 3).to(BF16).T
    assert torch.equal(check(backend, exact, x, weight), check(backend, exact, x.contiguous(), weight))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_long_sums_stay_exact(backend, exact, dtype):
    """Sums of 16 bits would stop growing at 256 and 2,048."""
    x, weight = torch.ones(1, 12_000, dtype=dtype), torch.ones(8, 12_000, dtype=dtype)
    assert torch.equal(check(backend, exact, x, weight), torch.full((1, 8), 12_000.0).to(dtype))


def test_error_against_float32(backend):
    """No more than that of a float32 product rounded once."""
    x, weight, _ = made(400, 3000, rows=4)
    expected = x.double() @ weight.double().T
    ours = backend.plan_linear(weight).run(x).double() - expected
    theirs = F.linear(x.float(), weight.float()).to(BF16).double() - expected
    assert ours.norm() <= 1.02 * theirs.norm()


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows(backend, value, dtype):
    x, weight, _ = made(9, 40, dtype, 2)
    weight[3, 39] = value
    found = backend.plan_linear(weight).run(x)
    assert not found[:, 3].isfinite().any()
    assert found[:, [0, 1, 2, 4, 5, 6, 7, 8]].isfinite().all()


def test_nothing_behind_the_end_is_read(backend, exact):
    x, weight, bias = made(6, 45, rows=2, bias=True)
    framed, more = torch.full((6, 64), torch.nan, dtype=BF16), torch.full((2, 64), torch.nan, dtype=BF16)
    framed[:, :45], more[:, :45] = weight, x
    assert torch.equal(
        check(backend, exact, more[:, :45], framed[:, :45], bias), check(backend, exact, x, weight, bias)
    )


def test_threads_change_nothing(backend, threads):
    x, weight, bias = made(1001, 300, rows=3, bias=True)
    plan = backend.plan_linear(weight, bias)
    found = plan.run(x)
    torch.set_num_threads(1)
    assert torch.equal(found, plan.run(x))


def test_threads_share_a_plan(backend):
    _, weight, _ = made(300, 200)
    plan, wrong = backend.plan_linear(weight), []

    def work(seed):
        x = made(1, 200, seed=seed)[0]
        expected = F.linear(x.double(), weight.double())
        for _ in range(100):
            if (plan.run(x).double() - expected).abs().max() > 1e-2 * expected.abs().max():
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_plan_knows_whose_it_is(dtype):
    x, weight, bias = made(8, 16, dtype, bias=True)
    plan = CpuBackend().plan_linear(weight, bias)
    assert plan.is_of(weight, bias)
    weight.mul_(2)
    assert plan.is_of(weight, bias)
    torch.testing.assert_close(plan.run(x), F.linear(x, weight, bias))
    assert not plan.is_of(weight, None) and not plan.is_of(weight.clone(), bias)
    kept = weight.data
    weight.data = weight.data[:4]
    assert not plan.is_of(weight, bias)
    weight.data = kept
    assert plan.is_of(weight, bias)
    bias.data = bias.data.clone()
    assert not plan.is_of(weight, bias)


def test_float32_is_plain_torch(exact):
    x, weight, bias = made(8, 16, F32, 4, True)
    plan = CpuBackend().plan_linear(weight, bias)
    assert type(plan) is LinearPlan
    torch.testing.assert_close(plan.run(x), exact.plan_linear(weight, bias).run(x))


@pytest.mark.parametrize("which", ["cpu", "reference"])
@pytest.mark.parametrize(
    "weight, bias, message",
    [
        (torch.zeros(4, 8, dtype=torch.float64), None, "weight must be"),
        (torch.zeros(4, dtype=BF16), None, "weight must have shape"),
        (torch.zeros(4, 0, dtype=BF16), None, "weight must have in_features"),
        (torch.zeros(8, 4, dtype=BF16).T, None, "weight must be contiguous in its last dimension"),
        (torch.zeros(4, 8, dtype=BF16), torch.zeros(5, dtype=BF16), "bias must have shape"),
        (torch.zeros(4, 8, dtype=BF16), torch.zeros(4), "bias must be"),
    ],
)
def test_mistakes_are_named(which, weight, bias, message):
    backend = CpuBackend() if which == "cpu" else ReferenceBackend()
    with pytest.raises(ValueError, match=message):
        backend.plan_linear(weight, bias)


@pytest.mark.parametrize("which", ["cpu", "reference"])
@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(MOST_ROWS + 1, 8, dtype=BF16), "x must have shape"),
        (torch.zeros(0, 8, dtype=BF16), "x must have shape"),
        (torch.zeros(1, 7, dtype=BF16), "x must have shape"),
        (torch.zeros((), dtype=BF16), "x must have shape"),
        (torch.zeros(1, 8), "x must be torch.bfloat16"),
        (torch.zeros(1, 8, dtype=F16), "x must be torch.bfloat16"),
    ],
)
def test_wrong_inputs_are_named(which, x, message):
    backend = CpuBackend() if which == "cpu" else ReferenceBackend()
    plan = backend.plan_linear(torch.zeros(4, 8, dtype=BF16))
    plan.run(torch.zeros(1, 8, dtype=BF16))
    with pytest.raises(ValueError, match=message):
        plan.run(x)
