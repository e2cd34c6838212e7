"""Every preset through a whole model: sequences of a batch as if alone, and RoCo's scope in fp16."""

import pytest
import torch

import kvcompress_hf as kvc
from kvcompress_hf.paging.slots import StorePart, gather_slots
from kvcompress_hf.patches import patched

PADS, TOKENS, NEW = (0, 23), 120, 36


@pytest.fixture(scope="module")
def model(build_model):
    return build_model("llama", num_hidden_layers=2)


def rows_of(cache, sequence, padding):
    """Positions of every row of one sequence, sorted, counted from its first real token."""
    (store,) = cache.inspect().stores
    heads, found = store.geometry.kv_heads, []
    for row in range(store.layers * store.batch * heads):
        if row % store.rows_per_layer // heads == sequence:
            stored = [store.read_field(t, "position")[row, : int(n)] for t, n in enumerate(store.lengths[:, row])]
            found.append([sorted((positions - padding).tolist()) for positions in stored])
    return found


# A draw depends on the position, padding included.
ALIKE = sorted(set(kvc.presets()) - {"random"})


@pytest.mark.parametrize("preset", [name for name in ALIKE if kvc.get_preset(name).plan is not None])
def test_a_padded_batch_equals_each_sequence_alone(preset, model, prompt):
    ids = prompt(batch=2, tokens=TOKENS)
    mask = torch.ones_like(ids)
    for row, pads in enumerate(PADS):
        ids[row, :pads], mask[row, :pads] = 0, 0
    arguments = dict(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    overrides = {} if kvc.get_preset(preset).budget is None else {"budget": 0.6}
    with patched(model, preset, **overrides):
        both = model.generate(input_ids=ids, attention_mask=mask, **arguments)
        for row, pads in enumerate(PADS):
            alone = model.generate(input_ids=ids[row : row + 1, pads:], **arguments)
            assert torch.equal(both.sequences[row, pads:], alone.sequences[0])
            assert rows_of(kvc.cache_of(both), row, pads) == rows_of(kvc.cache_of(alone), 0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_invert_the_scope_of_roco(dtype, build_model, prompt):
    """Squares of most probabilities are below what fp16 can hold; in EasyKV they made the deviation NaN, which put
    sinks and recent tokens in reach of eviction."""
    model = build_model("llama", num_hidden_layers=2, initializer_range=0.25)
    ids = prompt(tokens=600)
    recipe = kvc.get_preset("roco").with_overrides(budget=200, plan={"protect_unsettled": 20})
    kept = {}
    for kind in (torch.float32, dtype):
        model.to(kind)
        with patched(model, recipe):
            cache = kvc.CompressedPagedCache(model.config, recipe)
            with torch.no_grad():
                for part in ids.split(100, dim=1):
                    model(part, past_key_values=cache)
        (store,) = cache.inspect().stores
        slots = gather_slots([StorePart(store, (0, 1), (2, 2))], recipe.observer.fields, 600, 600)
        mean, spread = recipe.observer.importance(slots), recipe.observer.spread(slots)
        flushed = (mean.square() < 6e-8).float().mean()
        assert flushed > 0.02  # of what is left, so many would have a negative variance
        assert (slots.fields["square"] > 0).all() and not spread.isnan().any() and (spread >= 0).all()
        kept[kind] = [set(row.tolist()) for row in slots.positions[0]]
        for row in kept[kind]:
            assert {*range(4), *range(590, 600)} <= row and len(row) == 200
    for exact, half in zip(kept[torch.float32], kept[dtype], strict=True):
        assert len(exact & half) / len(exact | half) > (0.8 if dtype is torch.float16 else 0.6)
