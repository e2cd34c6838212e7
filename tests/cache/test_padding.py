"""Padding wherever it lies counts for nothing: a row of a batch keeps the tokens that it keeps alone."""

import pytest
import torch

from kvcompress_hf import CompressedPagedCache, get_preset, patch, presets
from kvcompress_hf.compat import as_argument
from kvcompress_hf.runtime.padding import cut_runs, padding_first, runs_of, with_runs

PRESETS = sorted(name for name in presets() if get_preset(name).observer is not None)
#: Lengths of what two conversations say turn by turn, and how many tokens of padding come behind the shorter one.
TURNS = {
    "middle": [((96, 96), 0), ((4, 24), 0)],
    "right": [((96, 80), 16), ((10, 24), 14)],
    "split": [((96, 90), 3), ((24, 10), 7), ((12, 12), 0)],
    "silent": [((96, 96), 0), ((20, 0), 0), ((9, 16), 2)],
}


@pytest.fixture(scope="module")
def model(tiny_llama):
    return patch(tiny_llama(initializer_range=0.02, vocab_size=160, pad_token_id=0), "lossless", check=False)


def _turn(lengths, behind, seed):
    """Ids and mask `[2, tokens]`, the shorter row with `behind` tokens of padding behind it and the others before."""
    longest, rows = max(lengths), []
    ids, mask = torch.zeros(2, longest, dtype=torch.long), torch.zeros(2, longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        words = torch.randint(3, 160, (length,), generator=torch.Generator().manual_seed(10 * seed + row))
        start = longest - length - (behind if length < longest else 0)
        ids[row, start : start + length], mask[row, start : start + length] = words, 1
        rows.append(words[None])
    return ids, mask, rows


@torch.no_grad()
def _talk(model, recipe, turns, between=lambda cache: cache):
    """The two conversations in one cache and in one of its own each, and the mask of the batch."""
    both = CompressedPagedCache(model.config, recipe)
    alone = [CompressedPagedCache(model.config, recipe) for _ in range(2)]
    whole = torch.zeros(2, 0, dtype=torch.long)
    for seed, (lengths, behind) in enumerate(turns):
        ids, mask, rows = _turn(lengths, behind, seed)
        whole = torch.cat([whole, mask], 1)
        positions = (whole.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        both = between(both)
        model(ids, attention_mask=whole, position_ids=positions, **as_argument(model, both))
        for words, cache in zip(rows, alone, strict=True):
            if words.shape[1]:
                model(words, **as_argument(model, cache))
    return both, alone, whole


def _kept(cache, sequence, mask=None):
    """Per layer and head which tokens are kept, counted without padding."""
    rank = torch.arange(10_000) if mask is None else mask[sequence].cumsum(0) - 1
    return [sorted(rank[row.positions.long()].tolist()) for row in cache.rows() if row.sequence == sequence]


@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_row_keeps_the_tokens_that_it_keeps_alone(preset, turns, model):
    recipe = get_preset(preset).with_overrides(budget=0.5)
    if recipe.observer.reads_again:
        pytest.skip("read a second time by prefill() and generate() alone")
    both, alone, mask = _talk(model, recipe, turns)
    for sequence, own in enumerate(alone):
        assert _kept(both, sequence, mask) == _kept(own, 0)


def test_a_saved_cache_knows_where_its_padding_was(model, tmp_path):
    def through_a_file(cache):
        if not cache.get_seq_length():
            return cache
        cache.save(tmp_path / "cache.safetensors")
        return CompressedPagedCache.load(tmp_path / "cache.safetensors", model)

    recipe = get_preset("streaming").with_overrides(budget=0.5)
    both, alone, mask = _talk(model, recipe, TURNS["split"], through_a_file)
    for sequence, own in enumerate(alone):
        assert _kept(both, sequence, mask) == _kept(own, 0)


def test_crop_takes_padding_back_too(model):
    both, _, _ = _talk(model, "lossless", TURNS["right"])
    both.crop(-24)
    assert both.inspect().padding.tolist() == [0, 16]
    both.crop(-10)
    assert both.inspect().padding.tolist() == [0, 6]


def test_runs_of_padding():
    real = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1], [1, 0, 1, 0, 1]], dtype=torch.bool)
    runs = runs_of(real, 10)
    assert runs.tolist() == [[[10, 2], [14, 1]], [[0, 0], [0, 0]], [[11, 1], [13, 1]]]
    assert with_runs(runs_of(real[:, :2], 0)[:1], runs_of(real[:1, :2], 2)).tolist() == [[[0, 4]]]
    assert cut_runs(runs, 14)[..., 1].sum(1).tolist() == [2, 0, 2]
    positions = torch.tensor([12, 13], dtype=torch.int32).expand(3, 1, 2)
    assert padding_first(positions, runs)[:, 0].tolist() == [[13, 14], [12, 13], [13, 13]]


@torch.no_grad()
@pytest.mark.parametrize("recipe", ("lossless", "k8v4"))
def test_after_crop_padded_rows_hold_what_they_should(recipe, model):
    """The packed slots of a row are fewer than the tokens taken back where some of these were padding."""
    both, _, mask = _talk(model, recipe, TURNS["right"])
    both.crop(-30)
    left = mask[:, : both.get_seq_length()].sum(1)
    assert [slots[:, 0].tolist() for slots in both.slots()] == [left.tolist()] * 2
    words = torch.full((2, 1), 7)
    position = left[:, None]
    whole = torch.cat([mask[:, : both.get_seq_length()], torch.ones(2, 1, dtype=torch.long)], 1)
    got = model(words, attention_mask=whole, position_ids=position, **as_argument(model, both)).logits
    for row in range(2):
        turns = [_turn(lengths, behind, seed) for seed, (lengths, behind) in enumerate(TURNS["right"])]
        ids = torch.cat([turn[2][row] for turn in turns], 1)
        alone = CompressedPagedCache(model.config, recipe)
        model(ids[:, : left[row]], **as_argument(model, alone))
        want = model(words[:1], **as_argument(model, alone)).logits
        torch.testing.assert_close(got[row : row + 1], want, atol=1e-4 if recipe == "lossless" else 0.02, rtol=0)
