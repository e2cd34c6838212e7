"""Caches as files: what is loaded goes on with the very same logits, whatever the recipe, batch and model."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import kvcompress_hf as kvc
from kvcompress_hf.compat import find_cache
from kvcompress_hf.kernels import CpuBackend
from kvcompress_hf.patches.second_reading import read_again

_BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "eos_token_id": None,
    "initializer_range": 0.2,
}


def build(prefix="Llama", seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(**(_BASE | changes))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).to(dtype).eval()
    return kvc.patch(model, "lossless")


@pytest.fixture(scope="module")
def model():
    return build()


def tokens(batch, count, seed=0):
    return torch.randint(3, 96, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, cache, mask=None):
    return model(ids, past_key_values=cache, attention_mask=mask, use_cache=True).logits


def filled(model, recipe, prompt=300, decoded=20, batch=2, pads=(), **kwargs):
    """A cache with a packed past and a tail, and the mask of what it has seen."""
    cache = kvc.CompressedPagedCache(model.config, recipe, **kwargs)
    cache.belongs_to(model)
    ids = tokens(batch, prompt + decoded)
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    mask = mask if pads else None
    logits(model, ids[:, :prompt], cache, None if mask is None else mask[:, :prompt])
    read_again(model, cache, ids[:, :prompt], None if mask is None else mask[:, :prompt])
    for i in range(prompt, prompt + decoded):
        logits(model, ids[:, i : i + 1], cache, None if mask is None else mask[:, : i + 1])
    return cache, mask


def goes_on_alike(model, cache, loaded, mask=None, steps=40):
    """Chunk and single tokens: the same logits to the last bit, and the same file at the end."""
    batch = cache.batch_size
    more = tokens(batch, 9 + steps, seed=5)
    for part in (more[:, :9], *more[:, 9:].split(1, dim=1)):
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(part)], dim=1)
        assert torch.equal(logits(model, part, loaded, mask), logits(model, part, cache, mask))
        for each in (loaded, cache):
            if each.awaits_second_reading:
                read_again(model, each, part, mask)
    assert loaded.get_seq_length() == cache.get_seq_length()
    for mine, other in zip(loaded.slots(), cache.slots(), strict=True):
        assert torch.equal(mine, other)


# auto-kvzip plans while decoding, for which the prompt must have been read again; these caches are filled without.
PRESETS = [name for name in kvc.presets() if name != "auto-kvzip"]


@pytest.mark.parametrize(
    ("recipe", "pads"), [*((name, (0, 23)) for name in PRESETS), ("lossless", ()), ("auto", ()), ("h2o", ())]
)
def test_a_loaded_cache_goes_on_with_the_very_same_logits(model, recipe, pads, tmp_path):
    cache, mask = filled(model, recipe, pads=pads)
    path = tmp_path / "cache.kvc.safetensors"
    cache.save(path)
    before = path.read_bytes()
    loaded = kvc.CompressedPagedCache.load(path, model)
    assert loaded.recipe == cache.recipe and loaded.get_seq_length() == 320
    goes_on_alike(model, cache, loaded, mask)
    assert path.read_bytes() == before  # what was written into mapped pages stayed in memory
    cache.save(tmp_path / "one")
    loaded.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_pages_need_not_be_of_the_size_that_is_chosen_now(model, tmp_path, monkeypatch):
    """As in files of before pages suited the tiers that slots stay in."""
    recipe = kvc.get_preset("auto").with_overrides(budget=1 / 16)
    with monkeypatch.context() as patched:
        patched.setattr(kvc.RateDistortion, "resting_tiers", kvc.plans.base.Plan.resting_tiers)
        cache, _ = filled(model, recipe, prompt=600)
    cache.save(tmp_path / "cache")
    loaded = kvc.CompressedPagedCache.load(tmp_path / "cache", model)
    fresh, _ = filled(model, recipe, prompt=600)
    sizes = [each.inspect().stores[0].layout.page_bytes for each in (cache, loaded, fresh)]
    assert sizes[0] == sizes[1] != sizes[2]
    goes_on_alike(model, cache, loaded)
    rows = [{"preset": "auto", "budget": budget} for budget in (1 / 16, 1 / 4)]
    both, _ = filled(model, rows, prompt=600)
    assert both.inspect().stores[0].layout.page_bytes == sizes[0]  # one of the rows needs every tier


MODELS = {
    "mistral": ("Mistral", {"sliding_window": 32}),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_hidden_layers": 3,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
}


@pytest.mark.parametrize("recipe", ["lossless", "k4v2", "auto", "roco"])
@pytest.mark.parametrize("family", list(MODELS))
def test_models_with_windows_and_several_stores(family, recipe, tmp_path):
    prefix, changes = MODELS[family]
    if prefix == "GPT2":
        config = transformers.GPT2Config(vocab_size=96, eos_token_id=None, bos_token_id=None, **changes)
        torch.manual_seed(0)
        model = kvc.patch(transformers.GPT2LMHeadModel(config).eval(), "lossless")
    else:
        model = build(prefix, **changes)
    cache, mask = filled(model, recipe, prompt=120, pads=(0, 40))
    assert len(cache.inspect().stores) == (2 if family == "gemma2" else 1)
    cache.save(tmp_path / "cache")
    loaded = kvc.CompressedPagedCache.load(tmp_path / "cache", model)
    assert len(loaded.inspect().stores) == len(cache.inspect().stores)
    goes_on_alike(model, cache, loaded, mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["lossless", "auto"])
def test_half_precision(recipe, dtype, tmp_path):
    model = build(dtype=dtype)
    cache, _ = filled(model, recipe)
    cache.save(tmp_path / "cache")
    goes_on_alike(model, cache, kvc.CompressedPagedCache.load(tmp_path / "cache", model))


def test_several_tiers_are_really_there(model, tmp_path):
    changes = dict(tiers=("k8v4", "k4v4", "k4v2"), plan=kvc.RateDistortion())
    recipe = kvc.get_preset("auto").with_overrides(observer=kvc.WindowScores(mean=True, value=True), **changes)
    cache, _ = filled(model, recipe, prompt=600)
    cache.save(tmp_path / "cache")
    rows = kvc.CompressedPagedCache.load(tmp_path / "cache", model).rows()
    assert sum(sum(row.slots[tier] > 0 for row in rows) > 0 for tier in ("k8v4", "k4v4", "k4v2")) >= 2


def test_states_that_are_not_at_rest(model, tmp_path):
    """Empty, right after the prompt, and while tokens are held back for assisted decoding."""
    path = tmp_path / "cache"
    empty = kvc.CompressedPagedCache(model.config, "k8v4")
    empty.save(path)
    loaded = kvc.CompressedPagedCache.load(path, model)
    assert loaded.get_seq_length() == 0 and loaded.recipe == empty.recipe
    ids = tokens(1, 50)
    assert torch.equal(logits(model, ids, loaded), logits(model, ids, empty))
    empty.save(path)
    goes_on_alike(model, empty, kvc.CompressedPagedCache.load(path, model))
    recording, _ = filled(model, "k4v4", batch=1)
    recording.activate_past_recording()
    logits(model, tokens(1, 12, seed=3), recording)
    recording.save(path)
    loaded = kvc.CompressedPagedCache.load(path, model)
    for cache in (recording, loaded):
        cache.crop(-7)
        cache.stop_past_recording()
    goes_on_alike(model, recording, loaded)
    observing, _ = filled(model, "h2o", batch=1)
    observing.activate_past_recording()
    logits(model, tokens(1, 12, seed=3), observing)
    with pytest.raises(RuntimeError, match=r"call crop\(0\)"):
        observing.save(path)
    observing.crop(-7)
    observing.save(path)
    loaded = kvc.CompressedPagedCache.load(path, model)
    assert loaded.is_recording_past(0)
    goes_on_alike(model, observing, loaded)


def test_rows_of_a_batch_with_recipes_of_their_own(model, tmp_path):
    recipes = [{"preset": "kv-compress", "budget": 0.5}, {"preset": "kv-compress", "budget": 0.125}]
    cache, mask = filled(model, recipes, prompt=600, pads=(0, 30))
    cache.reorder_cache(torch.tensor([1, 0]))
    mask = mask.flip(0)
    cache.save(tmp_path / "cache")
    loaded = kvc.CompressedPagedCache.load(tmp_path / "cache", model)
    assert loaded.inspect().recipes == cache.inspect().recipes
    kept = [sum(row.kept for row in loaded.rows() if row.sequence == i) for i in (0, 1)]
    assert 2 * kept[0] < kept[1]
    goes_on_alike(model, cache, loaded, mask)


def test_a_chunked_prompt_can_be_continued_from_the_file(model, tmp_path):
    ids = tokens(1, 400)
    whole = kvc.CompressedPagedCache(model.config, "kv-compress", prompt_tokens=400)
    for part in ids.split(100, dim=1):
        logits(model, part, whole)
        whole.save(tmp_path / "cache")
        whole = kvc.CompressedPagedCache.load(tmp_path / "cache", model)
    control = kvc.CompressedPagedCache(model.config, "kv-compress", prompt_tokens=400)
    for part in ids.split(100, dim=1):
        logits(model, part, control)
    goes_on_alike(model, control, whole)


def test_the_file_is_plain_safetensors_and_holds_the_pages_as_they_are(model, tmp_path):
    cache, _ = filled(model, "k8v4", prompt=2000)
    cache.save(tmp_path / "cache")
    with safe_open(tmp_path / "cache", "pt") as file:
        metadata = file.metadata()
        pages = file.get_tensor("store.0.pages")
        assert metadata["format"] == "kvcompress_hf.cache" and metadata["tokens"] == "2020"
        assert {"checksums", "model.weights", "store.0.lengths", "store.0.table.0"} <= set(file.keys())
    store = cache.inspect().stores[0]
    assert pages.shape == (store.usage().pages, store.layout.page_bytes)
    assert torch.equal(pages, store.arena.read(store.live_ids()))
    memory = cache.memory()
    extra = os.path.getsize(tmp_path / "cache") - (memory.payload + memory.metadata + memory.slack)
    assert extra < memory.tail + memory.tables + 16384  # header and weights' checksums


def test_shared_pages_are_written_once_and_shared_again(model, tmp_path):
    cache, _ = filled(model, "k8v4", prompt=2000, batch=1)
    cache.save(tmp_path / "one")
    cache.batch_repeat_interleave(8)
    cache.save(tmp_path / "eight")
    with safe_open(tmp_path / "one", "pt") as one, safe_open(tmp_path / "eight", "pt") as eight:
        assert torch.equal(one.get_tensor("store.0.pages"), eight.get_tensor("store.0.pages"))
    loaded = kvc.CompressedPagedCache.load(tmp_path / "eight", model)
    assert loaded.memory().payload == cache.memory().payload
    for step in range(40):  # sequences diverge, long enough to pack a shared page
        more = tokens(8, 1, seed=step)
        assert torch.equal(logits(model, more, loaded), logits(model, more, cache))


@pytest.mark.parametrize("recipe", ["k8v4", "h2o"])
def test_a_fork_makes_the_file_of_its_parent_and_leaves_it_alone(model, recipe, tmp_path):
    cache, _ = filled(model, recipe)
    cache.save(tmp_path / "before")
    for fork in (cache.fork(), kvc.CompressedPagedCache.load(tmp_path / "before", model).fork()):
        fork.save(tmp_path / "fork")
        assert (tmp_path / "fork").read_bytes() == (tmp_path / "before").read_bytes()
        logits(model, tokens(2, 70, seed=8), fork)
    cache.save(tmp_path / "after")
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()


def test_pages_of_another_order_are_converted(model, tmp_path, monkeypatch):
    cache, _ = filled(model, "auto")
    with monkeypatch.context() as patch:
        patch.setattr(CpuBackend, "page_order", "private")  # as a backend whose order is not a file's
        cache.save(tmp_path / "canonical")
    cache.save(tmp_path / "own")
    with safe_open(tmp_path / "own", "pt") as own, safe_open(tmp_path / "canonical", "pt") as canonical:
        assert '"order": "canonical"' in canonical.metadata()["state"]
        assert not torch.equal(own.get_tensor("store.0.pages"), canonical.get_tensor("store.0.pages"))
    loaded = kvc.CompressedPagedCache.load(tmp_path / "canonical", model)
    own_again = kvc.CompressedPagedCache.load(tmp_path / "own", model)
    own_again.save(tmp_path / "own2")
    loaded.save(tmp_path / "own3")
    assert (tmp_path / "own3").read_bytes() == (tmp_path / "own2").read_bytes() == (tmp_path / "own").read_bytes()
    goes_on_alike(model, cache, loaded)


def test_layers_on_several_devices_get_stores_of_their_own(model, tmp_path, monkeypatch):
    """`cpu:0` stands in for a second device: to the cache it is another one."""
    cache, mask = filled(model, "auto", pads=(0, 9))
    cache.batch_repeat_interleave(2)
    mask = mask.repeat_interleave(2, 0)
    cache.save(tmp_path / "cache")
    monkeypatch.setattr("kvcompress_hf.cache.layer_devices", lambda *_: [torch.device("cpu:0"), torch.device("cpu")])
    loaded = kvc.CompressedPagedCache.load(tmp_path / "cache", model)
    assert len(loaded.inspect().stores) == len(loaded.inspect().arenas) == 2
    for step in range(40):
        more = tokens(4, 1, seed=step)
        mask = torch.cat([mask, torch.ones_like(more)], dim=1)
        torch.testing.assert_close(logits(model, more, loaded, mask), logits(model, more, cache, mask))


def test_a_device_map_says_where_layers_live():
    from accelerate import cpu_offload

    from kvcompress_hf.io import layer_devices, model_identity

    model = LlamaForCausalLM(LlamaConfig(**_BASE))
    assert layer_devices(model, 2) == [torch.device("cpu")] * 2
    identity = model_identity(model.config, model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    assert layer_devices(model, 2) == [torch.device("cpu")] * 2
    offloaded = model_identity(model.config, model)  # weights that are elsewhere are not compared
    assert set(offloaded.weights) == {-1} and identity.difference(offloaded) is None


def test_memory_counts_mapped_pages_as_what_they_are(model, tmp_path, held_bytes):
    cache, _ = filled(model, "kv-compress", prompt=2000)
    cache.save(tmp_path / "cache")
    loaded = kvc.CompressedPagedCache.load(tmp_path / "cache", model)
    total = loaded.memory().total
    assert total == held_bytes(loaded) <= cache.memory().total
    assert loaded.memory().payload == cache.memory().payload and loaded.memory().dense == cache.memory().dense
    for step in range(70):
        logits(model, tokens(2, 1, seed=step), loaded)
        assert loaded.memory().total == held_bytes(loaded)
    loaded.reset()
    assert loaded.memory().total == held_bytes(loaded) == 0


def test_pages_are_mapped_not_read(model, tmp_path):
    """Loading touches header and tables only; Linux tells which pages of a mapping are in this process's memory."""
    cache, _ = filled(model, "lossless", prompt=6000, batch=1)
    cache.save(tmp_path / "cache")
    size = os.path.getsize(tmp_path / "cache")
    assert size > 2**21
    loaded = kvc.CompressedPagedCache.load(tmp_path / "cache", model)
    assert _resident(tmp_path / "cache") < size / 4
    expected = logits(model, tokens(1, 1), cache)
    assert torch.equal(logits(model, tokens(1, 1), loaded), expected)
    assert _resident(tmp_path / "cache") > size / 2


def _resident(path):
    total, inside = 0, False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            if "-" in line.split()[0] and ":" not in line.split()[0]:
                inside = line.rstrip().endswith(str(path))
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


def test_saving_over_the_file_a_cache_was_loaded_from(model, tmp_path):
    cache, _ = filled(model, "k8v4")
    path = tmp_path / "cache"
    cache.save(path)
    loaded = kvc.CompressedPagedCache.load(path, model)
    loaded.save(path)
    other, _ = filled(model, "lossless", prompt=10)
    other.save(path)
    path.unlink()
    goes_on_alike(model, cache, loaded)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(model, tmp_path, monkeypatch):
    cache, _ = filled(model, "k8v4")
    path = tmp_path / "cache"
    cache.save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("kvcompress_hf.paging.arena.Arena.read", full)
        with pytest.raises(OSError, match="No space left"):
            cache.save(path)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="No space left"):
            cache.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"] and path.read_bytes() == before
    with pytest.raises(FileNotFoundError):
        cache.save(tmp_path / "nowhere" / "cache")
    goes_on_alike(model, kvc.CompressedPagedCache.load(path, model), cache)


def test_saving_between_steps_of_generate_changes_nothing(model, tmp_path):
    ids = tokens(2, 100)
    plain = model.generate(ids, max_new_tokens=50, do_sample=False, kvcompress="kv-compress")
    files = []

    def save(input_ids, scores, **kwargs):
        cache = find_cache(kwargs) or caches[0]
        files.append(tmp_path / f"step{len(files)}")
        cache.save(files[-1])
        return torch.zeros(2, dtype=torch.bool)

    caches = [kvc.CompressedPagedCache(model.config, "kv-compress", prompt_tokens=100)]
    out = model.generate(
        ids,
        max_new_tokens=50,
        do_sample=False,
        kvcompress=caches[0],
        stopping_criteria=transformers.StoppingCriteriaList([save]),
    )
    assert torch.equal(out, plain)
    loaded = kvc.CompressedPagedCache.load(files[24], model)
    resumed = model.generate(
        plain[:, : loaded.get_seq_length() + 1], max_new_tokens=25, do_sample=False, kvcompress=loaded
    )
    assert torch.equal(resumed, plain)


def test_in_the_middle_of_a_forward_pass_saving_is_refused(model, tmp_path):
    cache, _ = filled(model, "k8v4")
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: cache.save(tmp_path / "cache"))
    try:
        with pytest.raises(RuntimeError, match="between two forward passes"):
            logits(model, tokens(2, 1), cache)
    finally:
        handle.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "of its 21 parameters have other values"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, not 2"),
        ({"head_dim": 32}, "head_dim is 32, not 16"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, not 2"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope parameters are .*500000"),
        ({"dtype": torch.bfloat16}, "dtype is bfloat16, not float32"),
        ({"prefix": "Mistral", "sliding_window": 64}, "model_type is 'mistral', not 'llama'"),
    ],
)
def test_another_model_is_refused_by_name(model, changes, message, tmp_path):
    cache, _ = filled(model, "k8v4", prompt=40)
    cache.save(tmp_path / "cache")
    with pytest.raises(kvc.CacheFormatError, match=f"belongs to another model.*{message}"):
        kvc.CompressedPagedCache.load(tmp_path / "cache", build(**changes))


def test_another_sliding_window_is_refused(tmp_path):
    cache, _ = filled(build("Mistral", sliding_window=32), "k8v4", prompt=40)
    cache.save(tmp_path / "cache")
    with pytest.raises(kvc.CacheFormatError, match="sliding_window is 48, not 32"):
        kvc.CompressedPagedCache.load(tmp_path / "cache", build("Mistral", sliding_window=48))


def test_the_same_model_is_known_again_however_it_is_held(model, tmp_path):
    cache, _ = filled(model, "k8v4", prompt=40)
    cache.save(tmp_path / "cache")
    model.save_pretrained(tmp_path / "model")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    copied = kvc.unpatch(copy.deepcopy(model))
    interface = kvc.patch(copy.deepcopy(model), "lossless", route="interface")
    for other in (again, copied, interface):
        loaded = kvc.CompressedPagedCache.load(tmp_path / "cache", other)
        assert loaded.get_seq_length() == 60
        loaded.save(tmp_path / "again")
    # Made by hand, the cache never saw its model: architecture and rope are compared, weights cannot be.
    by_hand = kvc.CompressedPagedCache(model.config, "k8v4")
    logits(model, tokens(1, 30), by_hand)
    by_hand.save(tmp_path / "by_hand")
    kvc.CompressedPagedCache.load(tmp_path / "by_hand", again)
    with pytest.raises(kvc.CacheFormatError, match="num_hidden_layers"):
        kvc.CompressedPagedCache.load(tmp_path / "by_hand", build(num_hidden_layers=3))


def test_an_adapter_is_another_model(model, tmp_path):
    cache, _ = filled(model, "k8v4", prompt=40)
    cache.save(tmp_path / "cache")
    adapted = copy.deepcopy(model)
    adapted.model.layers[0].self_attn.k_proj.register_parameter("lora", torch.nn.Parameter(torch.zeros(4)))
    with pytest.raises(kvc.CacheFormatError, match="other names or shapes"):
        kvc.CompressedPagedCache.load(tmp_path / "cache", adapted)


def test_limits_and_misuse(model, tmp_path):
    cache, _ = filled(model, "lossless")
    cache.save(tmp_path / "cache")
    with pytest.raises(kvc.CacheMemoryError, match="max_bytes of 50.0 KiB"):
        kvc.CompressedPagedCache.load(tmp_path / "cache", model, max_bytes="50KiB")
    with pytest.raises(TypeError, match="got LlamaConfig"):
        kvc.CompressedPagedCache.load(tmp_path / "cache", model.config)
    with pytest.raises(FileNotFoundError):
        kvc.CompressedPagedCache.load(tmp_path / "none", model)
    limited = kvc.CompressedPagedCache.load(tmp_path / "cache", model, max_bytes=cache.memory().total + 8192)
    with pytest.raises(kvc.CacheMemoryError):
        logits(model, tokens(2, 200), limited)
    assert limited.get_seq_length() == cache.get_seq_length()


def test_a_new_process_goes_on_with_the_same_tokens(model, tmp_path):
    ids = tokens(1, 200)
    cache = kvc.prefill(model, ids, "auto")
    cache.save(tmp_path / "cache")
    model.save_pretrained(tmp_path / "model")
    question = torch.cat([ids, tokens(1, 6, seed=2)], dim=1)
    expected = model.generate(question, kvcompress=cache, max_new_tokens=20, do_sample=False)
    code = (
        "import sys, torch, transformers, kvcompress_hf as kvc\n"
        "torch.set_num_threads(1)\n"
        "folder, *ids = sys.argv[1:]\n"
        "model = kvc.patch(transformers.LlamaForCausalLM.from_pretrained(folder + '/model'))\n"
        "cache = kvc.CompressedPagedCache.load(folder + '/cache', model)\n"
        "ids = torch.tensor([[int(i) for i in ids]])\n"
        "print(*model.generate(ids, kvcompress=cache, max_new_tokens=20, do_sample=False)[0].tolist())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), *map(str, question[0].tolist())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [int(i) for i in done.stdout.split()] == expected[0].tolist()


def test_rows_tell_what_each_head_keeps(model):
    cache, _ = filled(model, "auto", prompt=600, pads=(0, 100))
    rows = cache.rows()
    assert [(r.layer, r.sequence, r.head) for r in rows] == [(l, s, h) for l in (0, 1) for s in (0, 1) for h in (0, 1)]
    slots = torch.stack(cache.slots())
    layout = cache.inspect().stores[0].layout
    for row in rows:
        assert row.kept == int(slots[row.layer, row.sequence, row.head]) == row.positions.numel()
        assert row.pages == sum(-(-row.slots[t] // layout.tiers[i].slots) for i, t in enumerate(cache.recipe.tiers))
        assert row.nbytes == row.pages * layout.page_bytes + row.tail * (2 * 16 * 4 + 4 * len(layout.fields))
        assert bool((row.positions.diff() > 0).all()) and int(row.positions.max()) == 619
        assert int(row.positions.min()) == (100 if row.sequence else 0)  # the sinks; padding is never kept
        assert f"layer {row.layer}, sequence {row.sequence}, head {row.head}" in str(row) and "KiB" in str(row)
    assert sum(row.pages for row in rows) == cache.inspect().stores[0].usage().pages
    plain = filled(model, "k8v4")[0].rows()
    assert plain[0].positions is None and plain[0].slots == {"k8v4": 300} and plain[0].tail == 20


def test_rows_of_several_stores_come_in_the_order_of_layers():
    prefix, changes = MODELS["gemma2"]
    rows = filled(build(prefix, **changes), "lossless", prompt=120, batch=1)[0].rows()
    assert [row.layer for row in rows] == [0, 0, 1, 1, 2, 2]
    assert rows[2].kept == 140 and rows[0].kept < 70 and rows[0].positions is not None


def test_repr_says_what_is_held_and_memory_how_much(model):
    """transformers formats caches into warnings at every call, so `repr` walks nothing; `memory()` has the bytes."""
    cache = filled(model, "kv-compress")[0]
    for part in ("recipe='kv-compress'", "layers=2", "tokens=320", "batch=2"):
        assert part in repr(cache)
    assert "KiB" in str(cache.memory())


@pytest.mark.parametrize(
    ("kind", "changes", "shape"),
    [
        ("Llama", {}, (2, 16)),
        ("Gemma2", {"head_dim": 32}, (2, 32)),
        ("GPTNeoX", {"head_dim": None, "hidden_size": 64}, (4, 16)),
        ("Falcon", {"multi_query": True, "hidden_size": 64, "new_decoder_architecture": False}, (1, 16)),
        ("GPTBigCode", {"multi_query": True}, (1, 16)),
    ],
)
def test_the_shape_of_keys_is_read_from_the_config(kind, changes, shape):
    from kvcompress_hf.io import model_identity

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    wanted = {name: value for name, value in (sizes | changes).items() if value is not None}
    if kind in ("GPTNeoX", "Falcon", "GPTBigCode"):
        del wanted["num_key_value_heads"]
        wanted.pop("head_dim", None)
    identity = model_identity(getattr(transformers, kind + "Config")(**wanted))
    assert identity.shape_difference(*shape) is None
    if kind != "GPTBigCode":  # says neither in words that are known
        assert "channels, not 48" in identity.shape_difference(shape[0], 48)
        assert "KV heads, not 7" in identity.shape_difference(7, shape[1])


def test_the_shape_of_keys_in_a_process_of_several():
    import dataclasses

    from kvcompress_hf.io import model_identity

    config = transformers.LlamaConfig(num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    part = dataclasses.replace(model_identity(config), shards=2)
    assert part.shape_difference(2, 16) is None
    assert "KV heads, not 1" in part.shape_difference(1, 16)
