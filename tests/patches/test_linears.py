"""Linear layers of patched 16-bit models on a CPU: who takes the kernel, when, and what is left of it afterwards."""

import copy
import functools
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import as_argument
from kvcompress_hf.kernels.cpu.linear import CpuLinearPlan
from kvcompress_hf.patches import linears, patch, patched, unpatch

BF16, F16 = torch.bfloat16, torch.float16
DTYPES = [BF16, F16]


@pytest.fixture(autouse=True)
def pays(monkeypatch):
    """The kernel is taken to be quicker, whatever runs beside the tests."""
    monkeypatch.setattr(linears, "_pays", lambda rows, dtype, threads: True)


@pytest.fixture
def shapes(monkeypatch):
    """Shapes of everything that the kernel has multiplied."""
    seen, run = [], CpuLinearPlan.run

    def noted(self, x):
        seen.append((tuple(x.shape), self.out_features))
        return run(self, x)

    monkeypatch.setattr(CpuLinearPlan, "run", noted)
    return seen


def ours(model):
    """Names of the layers that have our `forward`."""
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def layers(model):
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def look(model):
    return [(name, type(module), {**vars(module)}.keys()) for name, module in model.named_modules()]


@torch.no_grad()
def logits(model, new=1, batch=1, past=20, recipe="lossless"):
    """Of `new` tokens after a prompt, on a compressed cache."""
    ids = torch.arange(3, 3 + (past + new) * batch).view(batch, -1) % 150
    cache = CompressedPagedCache(model.config, recipe)
    model(ids[:, :past], **as_argument(model, cache))
    return model(ids[:, past:], **as_argument(model, cache)).logits


def error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family, route", [("llama", "swap"), ("llama-mha", "swap"), ("qwen3", "interface")])
def test_a_step_is_as_exact_as_stock(family, route, dtype, build_model, shapes):
    exact = build_model(family).to(dtype).double()
    model = build_model(family).to(dtype)
    patch(model, "lossless", route=route, linears="stock")
    stock = logits(model)
    assert not shapes and not ours(model)
    patch(model, "lossless", route=route)
    found = logits(model)
    assert len(shapes) == len(layers(model))  # at the one token, not at the prompt's 20
    with torch.no_grad():
        expected = exact(torch.arange(3, 24)[None]).logits[:, 20:]
    assert error(found, expected) <= 1.3 * error(stock, expected) + 1e-4


@pytest.mark.parametrize("new, batch, used", [(1, 1, True), (1, 4, True), (4, 1, True), (1, 5, False), (5, 1, False)])
def test_few_rows_alone(new, batch, used, build_model, shapes):
    model = patch(build_model("llama").to(BF16), "lossless", check=False)
    found = logits(model, new, batch)
    assert bool(shapes) is used
    unpatch(model)
    patch(model, "lossless", check=False, linears="stock")
    assert error(found, logits(model, new, batch)) < 0.05


def test_float32_models_are_left_alone(build_model, snapshot):
    model = build_model("llama")
    patch(model, "lossless")
    assert not ours(model)


def test_what_the_kernel_is_not_for(build_model, shapes):
    model = patch(build_model("llama").to(BF16), "lossless", check=False)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(1, layer.in_features).to(BF16)
    with torch.no_grad():
        layer(x)
    assert len(shapes) == 1
    stock = functools.partial(nn.Linear.forward, layer)
    x.requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad(stock(x).sum(), x)[0])
    with torch.no_grad():
        with torch.autocast("cpu", BF16):
            assert layer(x.float()).dtype == BF16
        traced = torch.jit.trace(layer, x, check_trace=False)
        assert torch.equal(traced(2 * x), stock(2 * x))
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), stock(x))
        assert layer(x[:0]).shape == (0, layer.out_features)
        for wrong in (x.float(), x[:, 1:]):
            with pytest.raises(RuntimeError) as theirs:
                stock(wrong)
            with pytest.raises(RuntimeError) as raised:
                layer(wrong)
            assert str(raised.value) == str(theirs.value)
    assert len(shapes) == 1


def test_others_forwards_and_subclasses_are_left_alone(build_model, shapes):
    class Other(nn.Linear):
        pass

    model = build_model("llama").to(BF16)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.__class__ = Other
    own = mlp.down_proj.forward = functools.partial(nn.Linear.forward, mlp.down_proj)
    mlp.gate_proj.weight = nn.Parameter(mlp.gate_proj.weight.detach().clone().T.contiguous().T)
    before = look(model)
    patch(model, "lossless", check=False)
    assert "forward" not in mlp.up_proj.__dict__ and "forward" not in mlp.gate_proj.__dict__
    assert mlp.down_proj.forward is own
    logits(model)
    assert len(shapes) == len(layers(model)) - 2
    unpatch(model)
    assert look(model) == before and mlp.down_proj.forward is own


def test_hooks_are_called(build_model, shapes):
    model = patch(build_model("llama").to(BF16), "lossless", check=False)
    seen = []
    layer = model.model.layers[1].self_attn.q_proj
    layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    layer.register_forward_pre_hook(lambda module, args: (0 * args[0],))
    with torch.no_grad():
        assert not layer(torch.ones(1, 1, layer.in_features, dtype=BF16)).any()
    assert seen == [(1, 1, layer.out_features)] and shapes


# -- asking for it -----------------------------------------------------------------------------------------------------


def test_unknown_linears(build_model):
    model = build_model("llama")
    for call in (patch, lambda *args, **kwargs: patched(*args, **kwargs).__enter__()):
        with pytest.raises(ValueError, match="linears is 'quick'; it must be 'auto' or 'stock'"):
            call(model, "lossless", linears="quick")


@pytest.mark.parametrize("route", ["swap", "interface"])
def test_taken_off_without_a_trace(route, build_model):
    model = build_model("llama").to(BF16)
    before = look(model)
    patch(model, "k8v4", route=route)
    assert ours(model)[:-1] and set(layers(model)) <= {*ours(model)}
    logits(model, recipe="k8v4")
    unpatch(model)
    assert look(model) == before


def test_patching_again_changes_it(build_model):
    model = patch(build_model("llama").to(BF16), "lossless", check=False, linears="stock")
    record = model._kvcompress_patch
    assert not ours(model)
    patch(model, "k8v4")
    assert set(layers(model)) <= {*ours(model)} and model._kvcompress_patch is record
    patch(model, "k8v4", linears="stock")
    assert not ours(model) and model._kvcompress_patch is record


def test_blocks_inside_each_other(build_model):
    model = build_model("llama").to(BF16)
    with patched(model, "lossless", check=False):
        assert ours(model)
        with patched(model, "lossless", linears="stock"):
            assert not ours(model)
            with patched(model, "k8v4"):
                assert ours(model)
            assert not ours(model)
        assert ours(model)
    assert not ours(model)
    patch(model, "lossless", check=False, linears="stock")
    with patched(model, "lossless"):
        assert ours(model)
    assert not ours(model)


def test_a_block_of_another_thread_keeps_what_it_has(build_model):
    model = build_model("llama").to(BF16)
    inside, over = threading.Event(), threading.Event()

    def other():
        with patched(model, "lossless", check=False, linears="stock"):
            inside.set()
            over.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(30)
    with patched(model, "lossless"):
        assert not ours(model)
        over.set()
        thread.join()
    assert not ours(model)
    with patched(model, "lossless", check=False):
        assert ours(model)


def test_a_model_that_becomes_16_bit_is_patched_again(build_model, shapes):
    model = patch(build_model("llama"), "lossless", check=False)
    model.to(BF16)
    logits(model)
    assert not shapes
    patch(model, "lossless")
    logits(model)
    assert shapes
    model.float()
    shapes.clear()
    logits(model)
    assert not shapes


# -- weights that change, models that are copied -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.data.mul_(2),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().flip(0))),
        lambda layer: setattr(layer.weight, "data", layer.weight.data.flip(0)),
        lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(layer.out_features, dtype=BF16))),
        lambda layer: setattr(layer.weight, "data", layer.weight.data.T.contiguous().T),
        lambda layer: setattr(layer.weight, "data", layer.weight.data[:7]),
        lambda layer: setattr(layer.weight, "data", layer.weight.data[::2]),
    ],
)
def test_weights_that_change(change, build_model):
    model = patch(build_model("llama").to(BF16), "lossless", check=False)
    layer = model.model.layers[0].self_attn.k_proj
    x = torch.randn(1, 1, layer.in_features).to(BF16)
    with torch.no_grad():
        layer(x)
        change(layer)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_have_their_own(how, build_model):
    model = patch(build_model("llama").to(BF16), "lossless", check=False)
    expected = logits(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(other), expected)
    assert ours(other) == ours(model)
    unpatch(other)
    assert not ours(other) and ours(model)


def test_adapters(build_model, shapes):
    peft = pytest.importorskip("peft")
    base = build_model("llama").to(BF16)
    before = look(base)
    patch(base, "lossless", check=False)
    settings = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, r=4)
    model = peft.get_peft_model(base, settings).eval()
    found = logits(model)
    assert shapes
    patch(model, "lossless", linears="stock")
    assert error(found, logits(model)) < 0.05
    patch(model, "lossless")
    model.merge_and_unload()
    assert error(logits(base), found) < 0.1
    unpatch(base)
    assert look(base) == before


def test_quantised_after_the_patch(build_model, shapes):
    torchao = pytest.importorskip("torchao.quantization")
    model = patch(build_model("llama").to(BF16), "lossless", check=False)
    torchao.quantize_(
        model, torchao.Int8WeightOnlyConfig(), lambda module, name: "mlp" in name and type(module) is nn.Linear
    )
    found = logits(model)
    assert len(shapes) == len(layers(model)) - 9
    unpatch(model)
    patch(model, "lossless", check=False, linears="stock")
    assert error(found, logits(model)) < 0.05


def test_a_hook_of_accelerate_around_ours(build_model):
    accelerate = pytest.importorskip("accelerate")
    model = patch(build_model("llama").to(BF16), "lossless", check=False)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, layer.in_features).to(BF16)
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    unpatch(model)
    assert layer._old_forward == nn.Linear.forward.__get__(layer)
    assert layer.forward.__wrapped__ == layer._old_forward
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight))
    accelerate.hooks.remove_hook_from_module(layer)
    assert set(ours(model)) == {"model.layers.0.self_attn.q_proj"}  # the stock method, which accelerate leaves
    assert layer.forward == nn.Linear.forward.__get__(layer)


# -- the trial ---------------------------------------------------------------------------------------------------------


def test_the_trial_is_made_once(monkeypatch):
    monkeypatch.undo()
    linears._pays.cache_clear()
    tried = []
    run = CpuLinearPlan.run
    monkeypatch.setattr(CpuLinearPlan, "run", lambda self, x: tried.append(x.shape) or run(self, x))
    first = linears._pays(1, BF16, torch.get_num_threads())
    assert isinstance(first, bool) and tried
    tried.clear()
    assert linears._pays(1, BF16, torch.get_num_threads()) is first and not tried


def test_where_it_does_not_pay_nothing_is_another(monkeypatch, build_model, shapes):
    monkeypatch.setattr(linears, "_pays", lambda rows, dtype, threads: rows > 1)
    model = patch(build_model("llama").to(BF16), "lossless", check=False)
    found = logits(model)
    assert not shapes
    patch(model, "lossless", linears="stock")
    assert torch.equal(found, logits(model))
