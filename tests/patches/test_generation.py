"""Everything a person does with a patched model: options per call, pipelines, own caches, speculation, threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, pipeline

from kvcompress_hf import get_preset, report
from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import as_argument, cache_argument, cache_of
from kvcompress_hf.patches import is_patched, last_run_report, patch, patched, prefill, unpatch


@pytest.fixture(params=[("llama", "swap"), ("qwen3", "interface")], ids=["swap", "interface"])
def model(request, build_model):
    family, route = request.param
    return patch(build_model(family), "lossless", route=route)


def _cache(model, prompt, new_tokens=4, tokens=80, **kwargs):
    out = model.generate(
        prompt(tokens=tokens), max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, **kwargs
    )
    return cache_of(out)


def test_a_fresh_cache_per_call(model, prompt):
    first, second = _cache(model, prompt), _cache(model, prompt)
    assert isinstance(first, CompressedPagedCache) and first is not second
    assert first.get_seq_length() == second.get_seq_length() == 83


def test_options_per_call(model, prompt):
    evicting = get_preset("kv-compress")
    assert _cache(model, prompt, kvcompress="k4v4").recipe == get_preset("k4v4")
    assert _cache(model, prompt, kvcompress={"tiers": "k8v8"}).recipe.tiers == ("k8v8",)
    assert _cache(model, prompt, kvcompress=evicting).recipe == evicting
    assert _cache(model, prompt, kvcompress=evicting.to_dict()).recipe == evicting
    half = _cache(model, prompt, kvcompress={"preset": "kv-compress", "budget": 0.5}).recipe
    assert half == evicting.with_overrides(budget=0.5)
    config = GenerationConfig(kvcompress={"tiers": "k4v2"}, max_new_tokens=2)
    out = model.generate(prompt(), generation_config=config, return_dict_in_generate=True)
    assert cache_of(out).recipe.tiers == ("k4v2",)
    # None, and no word at all, mean the recipe of the patch; nothing of a call stays.
    assert _cache(model, prompt, kvcompress=None).recipe == get_preset("lossless")
    assert _cache(model, prompt).recipe == get_preset("lossless")
    assert "kvcompress" not in model.generation_config.to_json_string()


def test_budget_per_call_is_kept(model, prompt):
    """A smaller budget really leaves fewer slots."""
    patch(model, "kv-compress", budget=0.9)

    def slots(budget, **kwargs):
        cache = _cache(model, prompt, tokens=400, kvcompress={"budget": budget}, **kwargs)
        return sum(int(layer.sum()) for layer in cache.slots())

    assert slots(0.9) > slots(0.5) > slots(0.25)
    assert slots(0.25, prefill_chunk_size=64) <= 1.2 * slots(0.25)


def test_prompt_length_reaches_the_cache(model, prompt, padded, monkeypatch):
    seen = []
    init = CompressedPagedCache.__init__

    def noting(self, config, recipe=None, *, prompt_tokens=None, **kwargs):
        seen.append(prompt_tokens)
        init(self, config, recipe, prompt_tokens=prompt_tokens, **kwargs)

    monkeypatch.setattr(CompressedPagedCache, "__init__", noting)
    for inputs in (
        {"inputs": prompt(tokens=37)},
        {"inputs": prompt(tokens=37), "prefill_chunk_size": 10},
        padded,
        {"inputs": prompt(2, 9), "num_beams": 2},
        {"inputs_embeds": torch.randn(1, 11, model.config.hidden_size)},
    ):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert seen == [37, 37, 40, 9, 11]


@pytest.mark.parametrize(
    ("option", "error", "words"),
    [
        ("no-such", ValueError, "no-such"),
        ({"budget": 0.5}, ValueError, "observer"),
        ({"preset": "kv-compress", "budget": 1.5}, ValueError, r"\(0, 1\]"),
        ({"bits": 2}, ValueError, "bits"),
        (3, TypeError, "int"),
        ([], ValueError, "empty"),
        (["k4v4", "k8v4"], ValueError, "Row 1 asks for tiers"),
        (["k4v4", "k4v4", 3], TypeError, "int"),
        (
            ["kv-compress", {"preset": "kv-compress", "budget": 0.5}],
            ValueError,
            "2 recipes were given for a batch of 1",
        ),
    ],
)
def test_wrong_options_per_call(model, option, error, words, prompt, run_generate):
    expected = run_generate(model, "greedy", 8)
    with pytest.raises(error, match=words):
        model.generate(prompt(), max_new_tokens=2, kvcompress=option)
    assert torch.equal(run_generate(model, "greedy", 8), expected)


@pytest.mark.parametrize("conflict", ({"use_cache": False}, {"cache_implementation": "static"}))
def test_contradicting_arguments(model, conflict, prompt):
    with pytest.raises(ValueError, match="different caches"):
        model.generate(prompt(), max_new_tokens=2, kvcompress={"tiers": "k4v4"}, **conflict)


@pytest.mark.parametrize("arguments", ({}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}))
def test_settings_per_row(model, arguments, prompt):
    """A row with settings of its own gives what it gives alone with these settings, beams and all."""
    settings = [
        {"preset": "kv-compress", "budget": 0.5},
        {"preset": "kv-compress", "budget": 0.15, "protect": {"recent": 16}},
        {"preset": "kv-compress", "budget": 60},
    ]
    ids = prompt(tokens=300).view(3, 100).repeat(1, 2)
    kwargs = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True, **arguments}
    together = model.generate(ids, kvcompress=settings, **kwargs)
    answers = together.sequences.view(3, -1, together.sequences.shape[1])
    kept = [layer.view(3, -1, layer.shape[1]) for layer in cache_of(together).slots()]
    for row, setting in enumerate(settings):
        alone = model.generate(ids[row : row + 1], kvcompress=setting, **kwargs)
        assert torch.equal(alone.sequences, answers[row])
        for mine, theirs in zip(cache_of(alone).slots(), kept, strict=True):
            assert torch.equal(mine.sum(1), theirs[row].sum(1))
    sizes = [sum(int(layer[row].sum()) for layer in kept) for row in range(3)]
    assert sizes[0] > 1.3 * sizes[2] and sizes[2] > 1.2 * sizes[1]


def test_option_is_unknown_to_an_unpatched_model(model, prompt):
    unpatch(model)
    with pytest.raises(ValueError, match="kvcompress"):
        model.generate(prompt(), max_new_tokens=2, kvcompress={"tiers": "k4v4"})


def test_a_cache_passed_in_wins(model, prompt):
    mine = CompressedPagedCache(model.config, "k8v8")
    assert _cache(model, prompt, kvcompress=mine) is mine
    mine = CompressedPagedCache(model.config, "k8v8")
    assert _cache(model, prompt, kvcompress="k4v4", **as_argument(model, mine)) is mine
    assert mine.recipe == get_preset("k8v8")
    assert last_run_report(model) is mine.run_report


def test_a_passed_cache_that_does_not_fit(model, prompt, build_model, run_generate):
    expected = run_generate(model, "greedy", 8)
    config = build_model("llama", num_hidden_layers=1).config
    with pytest.raises(ValueError, match="1 layers"):
        model.generate(prompt(), max_new_tokens=2, kvcompress=CompressedPagedCache(config, "lossless"))
    mine = CompressedPagedCache(model.config, "lossless")
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(prompt(), max_new_tokens=2, kvcompress=mine, use_cache=False)
    assert mine.get_seq_length() == 0
    # A batch of another size: the cache stays what it was, and so does everything else.
    torch.manual_seed(0)
    first = model.generate(prompt(), max_new_tokens=4, do_sample=False, kvcompress=mine)
    slots = [layer.tolist() for layer in mine.slots()]
    with pytest.raises(ValueError, match="sequences"):
        model.generate(prompt(2, 60), max_new_tokens=2, kvcompress=mine)
    assert [layer.tolist() for layer in mine.slots()] == slots
    more = model.generate(first, max_new_tokens=4, do_sample=False, kvcompress=mine)
    assert torch.equal(more, model.generate(first, max_new_tokens=4, do_sample=False))
    assert torch.equal(run_generate(model, "greedy", 8), expected)


@pytest.mark.parametrize("past", [((torch.zeros(1),),), object(), {"past": 1}], ids=["tuple", "object", "dict"])
def test_past_of_no_known_kind(model, past, prompt, run_generate):
    expected = run_generate(model, "greedy", 8)
    with pytest.raises(TypeError, match=type(past).__name__):
        model.generate(prompt(), max_new_tokens=2, **{cache_argument(model): past})
    assert torch.equal(run_generate(model, "greedy", 8), expected)


def test_conversation_in_one_cache(model, prompt):
    """Turn after turn in the same cache, with all ids or only the new ones, as in one go."""
    first, second = prompt(tokens=30, seed=2), prompt(tokens=9, seed=3)
    with torch.no_grad():
        opening = model.generate(first, max_new_tokens=12, do_sample=False)
        whole = torch.cat([opening, second], 1)
        expected = model.generate(whole, max_new_tokens=12, do_sample=False)
    cache = CompressedPagedCache(model.config, "lossless")
    assert torch.equal(model.generate(first, max_new_tokens=12, do_sample=False, kvcompress=cache), opening)
    branch = cache.fork()
    assert torch.equal(model.generate(whole, max_new_tokens=12, do_sample=False, kvcompress=cache), expected)
    new = whole[:, branch.get_seq_length() :]
    out = model.generate(
        new,
        attention_mask=torch.ones_like(whole),
        max_new_tokens=12,
        do_sample=False,
        kvcompress=branch,
    )
    assert torch.equal(out[:, new.shape[1] :], expected[:, whole.shape[1] :])


@pytest.mark.parametrize("chunk_size", (None, 7))
def test_prefill_once_use_often(model, padded, chunk_size):
    question = torch.full((3, 2), 9)
    ids = torch.cat([padded["input_ids"], question], 1)
    mask = torch.cat([padded["attention_mask"], torch.ones_like(question)], 1)
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **arguments)
    cache = prefill(model, padded["input_ids"], attention_mask=padded["attention_mask"], chunk_size=chunk_size)
    assert cache.get_seq_length() == padded["input_ids"].shape[1] and cache.recipe == get_preset("lossless")
    for _ in range(2):
        assert torch.equal(model.generate(ids, kvcompress=cache.fork(), **arguments), expected)


def test_prefill_of_an_unpatched_model(model, prompt, snapshot):
    unpatch(model)
    before = snapshot(model)
    cache = prefill(model, prompt(), "k4v4", when={"every": 64})
    assert cache.recipe == get_preset("k4v4").with_overrides(when={"every": 64})
    assert not is_patched(model) and snapshot(model) == before


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": torch.ones(4, dtype=torch.long)},
        {"input_ids": torch.ones(1, 0, dtype=torch.long)},
        {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 5)},
        {"input_ids": torch.ones(1, 4, dtype=torch.long), "chunk_size": 0},
    ],
)
def test_prefill_of_nothing_sensible(model, arguments):
    with pytest.raises(ValueError):
        prefill(model, **arguments)


@pytest.mark.parametrize("ids", ["a text", [[1, 2, 3]], {"input_ids": torch.ones(1, 4, dtype=torch.long)}])
def test_prefill_of_what_is_no_tensor(model, ids):
    with pytest.raises(TypeError, match=rf"input_ids is a {type(ids).__name__}; .*prefill\(model, \*\*inputs\)"):
        prefill(model, ids)


def test_prefill_of_ids_that_are_no_integers(model):
    with pytest.raises(TypeError, match="input_ids holds torch.float32"):
        prefill(model, torch.ones(1, 4))


def test_a_model_in_place_of_its_config(model):
    with pytest.raises(TypeError, match=r"got \w+; write CompressedPagedCache\(model\.config, recipe\)"):
        CompressedPagedCache(model, "k8v4")


@pytest.mark.parametrize("assistant_is_patched", (False, True))
def test_assisted_generation(model, assistant_is_patched, build_model, prompt):
    ids = prompt()
    expected = model.generate(ids, max_new_tokens=32, do_sample=False)
    helper = build_model("llama", seed=3)
    if assistant_is_patched:
        patch(helper, "lossless")
    assert torch.equal(model.generate(ids, max_new_tokens=32, do_sample=False, assistant_model=helper), expected)
    # A copy of the model itself: every candidate is accepted.
    with patched(model, "lossless"):
        assert torch.equal(model.generate(ids, max_new_tokens=32, do_sample=False, assistant_model=model), expected)


def test_report_of_the_last_run(model, prompt, padded):
    assert report(model) is None
    model.generate(prompt(tokens=50), max_new_tokens=8, do_sample=False)
    assert (report(model).tokens, report(model).batch) == (57, 1)
    out = model.generate(**padded, max_new_tokens=8, do_sample=False, kvcompress="k4v4", return_dict_in_generate=True)
    assert last_run_report(model).recipe == get_preset("k4v4")
    assert (report(model).tokens, report(model).batch) == (47, 3)
    assert report(model).memory.total == cache_of(out).memory().total > 0
    unpatch(model)
    with pytest.raises(ValueError, match="not patched"):
        report(model)


@torch.no_grad()
def test_two_caches_never_touch(model, prompt):
    """Two sequences grow in turns; each is what it is alone."""
    ids = [prompt(tokens=40, seed=4), prompt(2, 23, seed=5)]

    def steps(cache, ids):
        for start in range(0, 20, 5):
            yield model(ids[:, start : start + 5], past_key_values=cache).logits

    alone = [list(steps(CompressedPagedCache(model.config, "k8v4"), x)) for x in ids]
    caches = [CompressedPagedCache(model.config, "k8v4") for _ in ids]
    together = list(zip(*(steps(cache, x) for cache, x in zip(caches, ids, strict=True)), strict=True))
    for turn, logits in enumerate(together):
        for expected, got in zip((a[turn] for a in alone), logits, strict=True):
            assert torch.equal(got, expected)


def test_threads(model, prompt):
    inputs = [prompt(1 + i % 2, 30 + i, seed=i) for i in range(4)]

    def run(ids):
        return model.generate(ids, max_new_tokens=24, do_sample=False)

    expected = [run(ids) for ids in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            for got, want in zip(pool.map(run, inputs), expected, strict=True):
                assert torch.equal(got, want)


def test_attentions_are_not_returned(model, prompt):
    out = model.generate(prompt(), max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)
    assert isinstance(cache_of(out), CompressedPagedCache)
    assert all(len(step) == 0 for step in out.attentions)


def test_hidden_states_scores_and_streaming(model, prompt):
    arguments = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    got = model.generate(prompt(), output_hidden_states=True, **arguments)
    unpatch(model)
    expected = model.generate(prompt(), output_hidden_states=True, **arguments)
    for a, b in zip(got.scores, expected.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    for a, b in zip(got.hidden_states[-1], expected.hidden_states[-1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "<s>", "</s>", "[UNK]"] + [f"w{i}" for i in range(156)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="[UNK]",
        padding_side="left",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )


@pytest.mark.parametrize("family", ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt-oss"))
def test_pipeline(family, build_model, tokenizer, monkeypatch):
    model = build_model(family)
    prompts = [" ".join(f"w{(7 * i * i + j) % 150}" for i in range(12 + 9 * j)) for j in range(3)]
    settings = {"max_new_tokens": 12, "do_sample": False}
    plain = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = [{"role": "user", "content": prompts[0]}]
    expected = [plain(prompts, **settings), plain(prompts, batch_size=3, **settings), plain(chat, **settings)]
    caches = []
    init = CompressedPagedCache.__init__
    patch(model, "lossless")
    monkeypatch.setattr(
        CompressedPagedCache, "__init__", lambda self, *a, **kw: (caches.append(self), init(self, *a, **kw))[1]
    )
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert pipe.model is model
    assert pipe(prompts, **settings) == expected[0] and len(caches) == 3
    assert pipe(prompts, batch_size=3, **settings) == expected[1] and len(caches) == 4
    assert pipe(chat, **settings) == expected[2] and len(caches) == 5
    pipe(prompts[0], kvcompress={"tiers": "k4v4"}, **settings)
    assert caches[-1].recipe.tiers == ("k4v4",)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, kvcompress="k8v8")
    pipe(prompts[0], **settings)
    assert caches[-1].recipe == get_preset("k8v8")
