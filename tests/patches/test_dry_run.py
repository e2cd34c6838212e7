"""The dry run accepts every family in every dtype, and refuses every fault planted in the package in every dtype."""

import sys
from pathlib import Path

import pytest
import torch

from kvcompress_hf.errors import UnsupportedModelError
from kvcompress_hf.patches import is_patched, patch, patched, swap, unpatch
from kvcompress_hf.patches.dry_run import trial
from kvcompress_hf.patches.dry_run.stock import Notes, StockCache, behind_a_past
from kvcompress_hf.patches.generation import record_of

sys.path.insert(0, str(Path(__file__).parent))
from planted import FAULTS, in_attend, layer_keeps_to_itself, scaled

FAMILIES = (
    *("llama", "llama-mha", "mistral", "mistral-full", "qwen2", "qwen2-window", "qwen3", "gemma2", "gemma3", "gemma3n"),
    *("gemma4", "phi3", "phi3-longrope", "gpt-oss", "phimoe", "cohere2", "starcoder2", "mixtral", "qwen3-moe"),
    *("granite", "olmo2", "smollm3", "glm4", "stablelm", "gpt-neox", "exaone4", "gpt2"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
LLAMA = [("llama", "swap"), ("llama", "interface")]
MISTRAL = [("mistral", "swap"), ("mistral", "interface")]


@dtypes
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_accepted(family, dtype, build_model):
    assert is_patched(patch(build_model(family).to(dtype), "lossless"))


@dtypes
@pytest.mark.parametrize(
    ("family", "route"), [("llama", "interface"), ("mistral", "interface"), ("qwen3", "interface")]
)
def test_the_other_route_is_accepted(family, route, dtype, build_model):
    model = patch(build_model(family).to(dtype), "lossless", route=route)
    assert record_of(model).route == route


@dtypes
@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt-oss"))
def test_eager_and_sdpa_are_accepted(family, implementation, dtype, build_model):
    model = build_model(family).to(dtype)
    if implementation == "sdpa" and family != "llama":
        pytest.skip("transformers has no sdpa attention for this family: soft cap, sinks")
    model.set_attn_implementation(implementation)
    patch(model, "lossless")


@dtypes
def test_weights_as_small_as_untrained_ones(dtype, build_model):
    """Nearly uniform attention: the real queries and keys would hide everything."""
    patch(build_model("llama", initializer_range=0.02).to(dtype), "lossless")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_is_accepted(dtype, build_model):
    with torch.autocast("cpu", dtype=dtype):
        for family in ("llama", "gemma3"):
            patch(build_model(family), "lossless")


# -- planted faults ----------------------------------------------------------------------------------------------------

GEMMA2, GPT_OSS = [("gemma2", "interface")], [("gpt-oss", "interface")]
#: Fault: the models and routes that it concerns.
CONCERNED = {
    "no causal mask": [*LLAMA, *MISTRAL, *GEMMA2, *GPT_OSS],
    "window one too long": [*MISTRAL, *GEMMA2, *GPT_OSS, ("gemma3", "interface")],
    "window one too short": [*MISTRAL, *GEMMA2, *GPT_OSS, ("gemma3", "interface")],
    "window ignored": [*MISTRAL, *GEMMA2, *GPT_OSS],
    "soft cap ignored": GEMMA2,
    "sinks ignored": GPT_OSS,
    "scaling 2 % off": [*LLAMA, *MISTRAL, *GEMMA2, *GPT_OSS],
    "keys rotated twice": LLAMA,
    "layer answers without the cache": [*LLAMA, *MISTRAL, *GEMMA2],
    "layer never asks the cache": [*LLAMA, *MISTRAL, *GEMMA2],
    "values of another layer": [*LLAMA, *MISTRAL, *GEMMA2],
    "mask dropped at the cache": [*LLAMA, *MISTRAL, *GEMMA2],
    "mask dropped by a wrapper": [*LLAMA, *MISTRAL, *GEMMA2],
}
assert CONCERNED.keys() == FAULTS.keys()
CASES = [(fault, family, route) for fault, concerned in CONCERNED.items() for family, route in concerned]


@dtypes
@pytest.mark.parametrize(("fault", "family", "route"), CASES)
def test_planted_fault_is_refused(fault, family, route, dtype, build_model, snapshot, monkeypatch):
    model = build_model(family).to(dtype)
    before = snapshot(model)
    FAULTS[fault](monkeypatch)
    with pytest.raises(UnsupportedModelError, match="check=False"):
        patch(model, "lossless", route=route)
    assert snapshot(model) == before and not is_patched(model)


@dtypes
@pytest.mark.parametrize("initializer_range", (0.02, 0.2))
@pytest.mark.parametrize(
    ("fault", "family", "changes"),
    [
        ("scaling 2 % off", "llama", {}),
        ("soft cap ignored", "gemma2", {"attn_logit_softcapping": 50.0}),
        ("window one too long", "mistral", {"sliding_window": 512}),
        ("window one too short", "mistral", {"sliding_window": 512}),
        ("window one too short", "gemma3", {"sliding_window": 4096}),
    ],
)
def test_faults_that_real_weights_hide(fault, family, changes, initializer_range, dtype, build_model, monkeypatch):
    """Sizes as in trained models: a soft cap that logits seldom reach, windows of hundreds of tokens."""
    model = build_model(family, initializer_range=initializer_range, max_position_embeddings=8192, **changes).to(dtype)
    with patched(model, "lossless"):
        pass
    FAULTS[fault](monkeypatch)
    with pytest.raises(UnsupportedModelError, match="does not get the same"):
        patch(model, "lossless")


@pytest.mark.parametrize("by", (-1, 1))
def test_a_window_too_long_to_leave_is_compared_by_its_number(by, build_model, monkeypatch):
    model = build_model("mistral", sliding_window=trial.LONGEST_PAST + 1000, max_position_embeddings=20000)
    with patched(model, "lossless"):
        pass
    paged = swap._paged_attention
    monkeypatch.setattr(swap, "_paged_attention", lambda *args: paged(*args[:5], args[5] + by, *args[6:]))
    with pytest.raises(UnsupportedModelError, match="sliding window of 9192 tokens"):
        patch(model, "lossless", route="swap")


# -- what a refusal says, and leaving it out ---------------------------------------------------------------------------


def test_a_refusal_names_layer_fault_and_way_out(build_model, monkeypatch):
    in_attend(lambda call: scaled(call) if call["layer"] == 1 else None)(monkeypatch)
    with pytest.raises(UnsupportedModelError) as caught:
        patch(build_model("llama"), route="swap")
    said = str(caught.value)
    assert "model.layers.1.self_attn" in said and "model.layers.0" not in said
    assert "scaling" in said and "6 new tokens behind 12 others" in said and "patch(model, check=False)" in said


def test_a_layer_that_stores_nothing_is_named(build_model, monkeypatch):
    layer_keeps_to_itself(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=r"layers.1.self_attn never asks .* of 12 new tokens it stored 0"):
        patch(build_model("llama"), route="swap")


@pytest.mark.parametrize(("family", "route"), [*LLAMA, ("gemma3", "interface")])
def test_check_can_be_left_out(family, route, build_model, run_generate, monkeypatch):
    model = build_model(family)
    expected, forwards = run_generate(model, "padded", 8), []
    with monkeypatch.context() as context:
        in_attend(scaled)(context)
        hook = model.register_forward_hook(lambda *_: forwards.append(1))
        patch(model, "lossless", route=route, check=False)
        hook.remove()
        assert is_patched(model) and not forwards
    assert torch.equal(run_generate(model, "padded", 8), expected)
    with monkeypatch.context() as context:
        in_attend(scaled)(context)
        unpatch(model)
        with patched(model, "lossless", route=route, check=False):
            assert is_patched(model)
    assert not is_patched(model)


def test_what_the_config_shows_is_refused_all_the_same(build_model):
    with pytest.raises(UnsupportedModelError, match="head_dim"):
        patch(build_model("llama", head_dim=60), check=False)


# -- what a dry run leaves behind --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "route"), [*LLAMA, ("gemma3", "interface")])
def test_nothing_is_left_behind(family, route, build_model, monkeypatch, snapshot):
    """Random numbers, mode, hooks, gradients and implementation, after a refusal and after an acceptance."""
    model = build_model(family).train()
    seen = model.register_forward_hook(lambda *_: None)
    before, random = snapshot(model), torch.get_rng_state()
    with monkeypatch.context() as context:
        in_attend(scaled)(context)
        with pytest.raises(UnsupportedModelError):
            patch(model, route=route)
    assert snapshot(model) == before
    patch(model, route=route)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
    seen.remove()


def test_a_long_past_takes_the_memory_of_few_layers(build_model):
    """However many layers there are: those of one kind share their past."""
    model = build_model("mistral", num_hidden_layers=12, sliding_window=4096)
    notes = Notes(trial.reading(model), {})
    cache = StockCache(model.config, notes)
    with torch.no_grad():
        trial.run_pass(model, notes.trial, 0, cache)
    behind = trial.long_past(model)
    past = behind_a_past(model.config, Notes(behind, {}), notes.shapes)
    assert behind.past == 4096 and len({layer.keys.data_ptr() for layer in past.layers}) == 1
    before = past.layers[0].keys
    with torch.no_grad():
        trial.run_pass(model, behind, 0, past)
    assert all(layer.keys is before and layer.get_seq_length() == 4096 for layer in past.layers)


def test_ids_are_none_that_the_config_names(build_model):
    model = build_model("llama", pad_token_id=100, eos_token_id=[60, 70])
    ids = trial.reading(model).ids
    assert not set(ids.flatten().tolist()) & {1, 60, 70, 100} and len(ids.unique()) > 20
