"""Re-indexed positions: what is kept looks as near to the next query as if what was evicted had never been."""

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument
from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.layers import layer_windows
from kvcompress_hf.paging.key_turn import newer_evicted, turn_keys
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.rotary import key_frequencies

PROMPT = 40
BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "initializer_range": 0.2,
}
STREAMING = kvc.get_preset("streaming").with_overrides(positions="reindexed", budget=16, when={"every": 4})
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}


def build(prefix="Llama", dtype=torch.float32, **changes):
    values = {**BASE, **changes}
    if prefix == "GPTNeoX":
        del values["num_key_value_heads"]
    torch.manual_seed(0)
    config = getattr(transformers, prefix + "Config")(**values)
    return getattr(transformers, prefix + "ForCausalLM")(config).eval().to(dtype)


@pytest.fixture(scope="module")
def stock():
    return build(num_hidden_layers=3, head_dim=16)


@pytest.fixture(scope="module")
def model(stock):
    return kvc.patch(copy.deepcopy(stock), STREAMING)


def tokens(batch, count, seed=0):
    return torch.randint(3, 96, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, cache, mask=None):
    where = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(ids, **as_argument(model, cache), attention_mask=mask, position_ids=where, use_cache=True).logits


def kept(cache):
    """Positions that each row keeps, by layer, sequence and head."""
    return {(row.layer, row.sequence, row.head): row.positions for row in cache.rows()}


class Plain:
    """A Llama whose keys are kept un-rotated and rotated anew at each step, by their place among what is kept."""

    def __init__(self, model):
        self.model = model
        self.past = {}  # by layer, sequence and head: unrotated keys, values, positions
        self.seen = 0

    @torch.no_grad()
    def step(self, ids):
        model, config = self.model.model, self.model.config
        batch, count = ids.shape
        hidden = model.embed_tokens(ids)
        for i, layer in enumerate(model.layers):
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            shape = (batch, count, -1, config.head_dim)
            q, k, v = (p(x).view(shape).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            group = q.shape[1] // k.shape[1]
            mixed = torch.empty_like(q)
            for row in range(batch):
                for head in range(k.shape[1]):
                    new = (k[row, head], v[row, head], torch.arange(self.seen, self.seen + count))
                    past = self.past.get((i, row, head))
                    keys, values, positions = new if past is None else map(torch.cat, zip(past, new, strict=True))
                    self.past[i, row, head] = keys, values, positions
                    total = len(keys)
                    cos, sin = model.rotary_emb(keys, torch.arange(total)[None])
                    mine = q[row, head * group : (head + 1) * group]
                    _, keys = apply_rotary_pos_emb(keys[None, None], keys[None, None], cos, sin)
                    mine, _ = apply_rotary_pos_emb(mine[None], mine[None], cos[:, -count:], sin[:, -count:])
                    scores = mine[0] @ keys[0].mT * attention.scaling
                    hide = torch.ones(count, total, dtype=torch.bool).triu(total - count + 1)
                    weights = scores.masked_fill(hide, -torch.inf).softmax(-1)
                    mixed[row, head * group : (head + 1) * group] = weights @ values
            hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.seen += count
        return self.model.lm_head(model.norm(hidden))

    def keep(self, positions):
        for row, (keys, values, old) in self.past.items():
            chosen = torch.isin(old, positions[row])
            self.past[row] = keys[chosen], values[chosen], old[chosen]


def recipe_of(preset, **overrides):
    return kvc.get_preset(preset).with_overrides(**{"positions": "reindexed", "when": {"every": 4}, **overrides})


@pytest.mark.parametrize("pieces", [(PROMPT, *(1,) * 40), (24, 16, *(1,) * 10, 13, *(1,) * 6)])
@pytest.mark.parametrize(
    "recipe",
    [
        STREAMING,
        recipe_of("random", budget=20, protect={"recent": 3}),
        recipe_of("keydiff", budget=24, protect={"recent": 6}),
        recipe_of("h2o", budget=24, protect={"recent": 6}),
        recipe_of("kv-compress", budget=24, protect={"recent": 4}),
    ],
    ids=lambda recipe: recipe.name,
)
def test_logits_are_those_of_keys_rotated_by_their_place_among_what_is_kept(stock, model, recipe, pieces):
    ids, plain = tokens(2, sum(pieces)), Plain(stock)
    cache = kvc.CompressedPagedCache(model.config, recipe)
    for part in ids.split(list(pieces), dim=1):
        torch.testing.assert_close(logits(model, part, cache), plain.step(part), atol=1e-4, rtol=1e-4)
        plain.keep(kept(cache))
    assert cache.inspect().statistics.plans > 3
    assert cache.inspect().statistics.evicted_slots > 30
    if recipe is STREAMING:
        for positions in kept(cache).values():
            assert positions[:4].tolist() == [0, 1, 2, 3]
            assert positions[4:].tolist() == list(range(sum(pieces) - len(positions) + 4, sum(pieces)))


@pytest.mark.parametrize("preset", ["keydiff", "kv-compress"])
def test_evictions_under_memory_pressure_re_index_too(stock, model, preset):
    ids, plain = tokens(2, PROMPT + 90), Plain(stock)
    recipe = recipe_of(preset, budget="1GiB", protect={"recent": 6}, when={"every": 16})
    cache = kvc.CompressedPagedCache(model.config, recipe, max_bytes=160_000)
    for part in ids.split([PROMPT, *(1,) * 30, 20, *(1,) * 40], dim=1):
        found = logits(model, part, cache)
        if part.shape[1] > 1:
            plain.keep(kept(cache))  # room for a chunk is made before it attends
        torch.testing.assert_close(found, plain.step(part), atol=1e-4, rtol=1e-4)
        plain.keep(kept(cache))
    assert cache.inspect().statistics.evicted_slots > 900


def test_absolute_positions_give_other_logits(stock, model):
    ids, plain = tokens(1, PROMPT + 1), Plain(stock)
    cache = kvc.CompressedPagedCache(model.config, STREAMING.with_overrides(positions="absolute"))
    logits(model, ids[:, :PROMPT], cache), plain.step(ids[:, :PROMPT])
    plain.keep(kept(cache))
    differ = logits(model, ids[:, PROMPT:], cache) - plain.step(ids[:, PROMPT:])
    assert differ.abs().max() > 0.01


@pytest.mark.parametrize("preset", ["streaming", "kv-compress", "roco"])
def test_tokens_are_the_stock_ones_when_nothing_is_evicted(stock, model, preset):
    ids = tokens(2, PROMPT)
    plain = stock.generate(ids, max_new_tokens=30, do_sample=False)
    assert torch.equal(
        model.generate(ids, max_new_tokens=30, do_sample=False, kvcompress=recipe_of(preset, budget=200)), plain
    )


def run(model, ids, cache, pieces, mask=None):
    outputs, end = [], 0
    for part in ids.split(list(pieces), dim=1):
        end += part.shape[1]
        outputs.append(logits(model, part, cache, None if mask is None else mask[:, :end]))
    return torch.cat(outputs, dim=1)


def fresh(model, recipe=STREAMING):
    return kvc.CompressedPagedCache(model.config, recipe)


@pytest.mark.parametrize("recipe", [STREAMING, recipe_of("keydiff", budget=16, protect={"recent": 6})])
def test_a_padded_sequence_is_as_it_is_alone(model, recipe):
    ids, mask = tokens(3, 70), torch.ones(3, 70, dtype=torch.long)
    for row, pads in enumerate((0, 9, 23)):
        mask[row, :pads] = 0
    together = run(model, ids, fresh(model, recipe), (PROMPT, *(1,) * 30), mask)
    for row, pads in enumerate((0, 9, 23)):
        alone = run(model, ids[row : row + 1, pads:], fresh(model, recipe), (PROMPT - pads, *(1,) * 30))
        torch.testing.assert_close(together[row, pads:], alone[0], atol=1e-4, rtol=1e-4)


def test_forks_and_copies_of_sequences_do_not_turn_each_others_keys(model):
    ids, others = tokens(2, 70), tokens(2, 70, seed=1)
    others[:, :PROMPT] = ids[:, :PROMPT]
    steps = (PROMPT, *(1,) * 30)
    expected = [run(model, each, fresh(model), steps)[:, PROMPT:] for each in (ids, others)]

    first = fresh(model)
    logits(model, ids[:, :PROMPT], first)
    second, twice = first.fork(), first.fork()
    twice.batch_repeat_interleave(2)
    mixed = torch.stack((ids, others), dim=1).flatten(0, 1)
    at_once = run(model, mixed[:, PROMPT:], twice, steps[1:])
    found = [run(model, each[:, PROMPT:], cache, steps[1:]) for each, cache in ((ids, first), (others, second))]
    for mine, theirs, both in zip(found, expected, (at_once[::2], at_once[1::2]), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(both, theirs, atol=1e-4, rtol=1e-4)


def test_a_saved_cache_goes_on_alike(model, tmp_path):
    ids = tokens(1, 70)
    cache = fresh(model)
    run(model, ids[:, :50], cache, (PROMPT, *(1,) * 10))
    cache.save(tmp_path / "cache.safetensors")
    loaded = kvc.CompressedPagedCache.load(tmp_path / "cache.safetensors", model)
    assert loaded.recipe.positions == "reindexed"
    steps = (1,) * 20
    assert torch.equal(run(model, ids[:, 50:], loaded, steps), run(model, ids[:, 50:], cache, steps))


def test_looked_up_drafts_give_the_tokens_of_plain_decoding(model):
    ids = tokens(1, 10).repeat(1, 4)
    plain = model.generate(ids, max_new_tokens=40, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=3), plain)


# -- stored keys -------- ----------------------------------------------------------------------------------------------


def attend(cache, key):
    """Gives a cache of one layer some keys, rotated at their absolute positions, and anything else."""
    key, _ = cache.update(key, torch.zeros_like(key), 0)
    batch, _, count, dim = key.shape
    query = torch.randn((batch, 4, count, dim), generator=torch.Generator().manual_seed(count)).to(key.dtype)
    cache.attend(
        0, query, key, torch.zeros_like(key), None, scaling=0.25, dense=lambda: query.transpose(1, 2).contiguous()
    )


def stored(cache):
    """Keys and positions of the packed slots of each row, oldest first, and how many slots are in its tail."""
    store = cache.inspect().stores[0]
    width = int(store.lengths.max())
    keys, _ = store.backend.read_slots(store.rows(), 0, width)
    positions, tails = store.read_field(0, "position"), store.tail_lengths.flatten().repeat_interleave(2)
    for row, (length, tail) in enumerate(zip(store.lengths[0].tolist(), tails.tolist(), strict=True)):
        order = positions[row, :length].argsort()
        yield keys[row, order], positions[row, order].long(), tail


def drift(config, recipe, dtype, steps, head_dim=16, batch=2):
    """Largest distance of a stored key from the original rotated to where it now is, relative to its length."""
    cache = kvc.CompressedPagedCache(config, recipe)
    inv_freq = cache.inspect().inv_freq
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn((batch, 2, PROMPT + steps, head_dim), generator=generator)
    places = torch.arange(PROMPT + steps).repeat(batch * 2)
    rotated = turn_keys(raw.reshape(-1, head_dim), places, inv_freq, places).view_as(raw).to(dtype)
    worst = 0.0
    for part in rotated.split([PROMPT, *(1,) * steps], dim=2):
        attend(cache, part)
        seen = cache.get_seq_length()
        for row, (keys, positions, tail) in enumerate(stored(cache)):
            newer = torch.arange(len(positions) - 1, -1, -1) + tail
            expected = turn_keys(raw.flatten(0, 1)[row, positions], seen - 1 - newer, inv_freq, newer)
            distance = (keys - expected).norm(dim=-1) / expected.norm(dim=-1)
            worst = max(worst, float(distance.max()))
    return worst, cache


@pytest.mark.parametrize("family", ["Llama", "Phi"])
@pytest.mark.parametrize("preset", ["streaming", "random", "keydiff", "kv-compress"])
def test_after_any_plan_a_key_is_the_original_rotated_to_its_place_among_what_is_kept(preset, family):
    config = getattr(transformers, family + "Config")(**{**BASE, "num_hidden_layers": 1})
    recipe = recipe_of(preset, budget=24, protect={"recent": 3})
    worst, cache = drift(config, recipe, torch.float32, 40)
    assert worst < 1e-5
    assert cache.inspect().statistics.evicted_slots > 60


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.04), (torch.float16, 0.008), (torch.float32, 2e-5)])
def test_rounding_adds_up_slowly_over_a_hundred_plans(dtype, bound):
    config = LlamaConfig(**{**BASE, "num_hidden_layers": 1, "head_dim": 64})
    worst, cache = drift(config, STREAMING.with_overrides(when={"every": 1}), dtype, 100, head_dim=64, batch=1)
    assert cache.inspect().statistics.plans >= 100
    assert worst < bound


@pytest.mark.parametrize("by", [1.0, 0.1, 1e-4])
def test_a_key_turned_a_thousand_times_is_where_it_would_be_if_turned_once(by):
    keys = torch.randn((500, 2), generator=torch.Generator().manual_seed(0))
    turned, one = keys.bfloat16(), torch.ones(500, dtype=torch.int32)
    for time in range(1000):
        turned = turn_keys(turned, one, torch.tensor([by]), time * one + torch.arange(500))
    angle = torch.view_as_complex(turned.float()).angle() - torch.view_as_complex(keys).angle() - 1000 * by
    assert (torch.polar(torch.ones(500), angle).mean() - 1).abs() < 0.02  # rounding to nearest: 0.36 with 1.0


def test_what_is_newer_and_goes_is_counted_per_row():
    generator = torch.Generator().manual_seed(0)
    positions = torch.stack([torch.randperm(40, generator=generator)[:30] for _ in range(6)]).int()
    filled, gone = (torch.rand((6, 30), generator=generator) < share for share in (0.8, 0.5))
    counts = newer_evicted(positions, filled, gone)
    for row in range(6):
        for slot in range(30):
            newer = filled[row] & gone[row] & (positions[row] > positions[row, slot])
            stays = filled[row, slot] and not gone[row, slot]
            assert counts[row, slot] == (newer.sum() if stays else 0)


# -- which models and recipes ------------------------------------------------------------------------------------------

PLAIN_FAMILIES = ["Arcee", "Gemma", "Granite", "Llama", "Mistral", "Mixtral", "Olmo", "Olmo2", "Qwen2", "Qwen2Moe"]
PLAIN_FAMILIES += ["Qwen3", "Qwen3Moe", "Starcoder2", "GPTNeoX", "Phi", "Phi3", "StableLm"]
SMALL = {
    "Mistral": {"sliding_window": None},
    "Qwen2Moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
    "Qwen3Moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
    "Mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "Phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
}


@pytest.mark.parametrize(
    "family, changes",
    [(family, SMALL.get(family, {})) for family in PLAIN_FAMILIES]
    + [("Llama", {"rope_parameters": rope, "head_dim": 32}) for rope in (YARN, LLAMA3, LINEAR)]
    + [("StableLm", {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}})],
)
@torch.no_grad()
def test_turned_keys_are_those_that_the_stock_model_makes_further_on(family, changes):
    model = build(family, **changes)
    inv_freq = key_frequencies(model.config, STREAMING, layer_windows(model.config))
    ids, shift = tokens(1, 12), 37
    caches = []
    for start in (0, shift):
        caches.append(DynamicCache(config=model.config))
        where = torch.arange(start, start + 12)[None]
        model(ids, **as_argument(model, caches[-1]), position_ids=where, attention_mask=torch.ones(1, 12))
    for here, there in zip(*(cache.layers for cache in caches), strict=True):
        keys = here.keys.flatten(0, 2)
        by = torch.full((len(keys),), shift)
        turned = turn_keys(keys, by, inv_freq, by)
        torch.testing.assert_close(turned, there.keys.flatten(0, 2), atol=2e-4, rtol=1e-4)
        assert (turned - keys).abs().max() > 0.1


@pytest.mark.parametrize(
    "family, changes, reason",
    [
        ("GPT2", {}, "gpt2 models"),
        ("Glm", {}, "glm models"),
        ("SmolLM3", {}, "smollm3 models"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}, "axes"),
        ("Mistral", {"sliding_window": 16}, "sliding window"),
    ],
)
def test_other_models_are_refused_with_the_reason(family, changes, reason):
    config = getattr(transformers, family + "Config")(**{**BASE, **changes})
    with pytest.raises(UnsupportedFeatureError, match=f"positions='reindexed' is not available.*{reason}"):
        kvc.CompressedPagedCache(config, STREAMING)
    kvc.CompressedPagedCache(config, STREAMING.with_overrides(positions="absolute"))


def test_patch_refuses_before_it_changes_anything():
    model = build("Mistral", sliding_window=16)
    with pytest.raises(UnsupportedFeatureError, match="sliding window"):
        kvc.patch(model, "streaming", positions="reindexed")
    kvc.patch(model, "streaming")
    with pytest.raises(UnsupportedFeatureError, match="sliding window"):
        kvc.patch(model, "streaming", positions="reindexed")
    assert model.generate(tokens(1, 8), max_new_tokens=2, do_sample=False).shape == (1, 10)


def test_recipes_say_what_positions_they_take():
    assert Recipe.from_json(STREAMING.to_json()) == STREAMING
    older = {name: value for name, value in STREAMING.to_dict().items() if name != "positions"}
    assert Recipe.from_dict(older).positions == "absolute"
    with pytest.raises(ValueError, match="positions is 'relative'; it must be one of absolute, reindexed"):
        STREAMING.with_overrides(positions="relative")
    with pytest.raises(ValueError, match="tiers='native'"):
        STREAMING.with_overrides(tiers="k8v8")
    with pytest.raises(ValueError, match="no plan"):
        kvc.get_preset("lossless").with_overrides(positions="reindexed")
    with pytest.raises(ValueError, match="centre_keys"):
        STREAMING.with_overrides(centre_keys=True)
    with pytest.raises(ValueError, match="positions"):
        kvc.CompressedPagedCache(LlamaConfig(**BASE), [STREAMING, STREAMING.with_overrides(positions="absolute")])
