"""After a pass that was interrupted and taken back, nobody goes on without its tokens unknowingly."""

import pytest
import torch

from kvcompress_hf import CompressedPagedCache, get_preset, patched
from kvcompress_hf.paging.store import PagedStore

EVERY = 4


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def stopped(request, tiny_llama, monkeypatch):
    """A model, a cache that has lost the last pass of three tokens to an interrupt, its text and these tokens."""
    model, ids = (
        tiny_llama().to(request.param),
        torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(1)),
    )
    with patched(model, "lossless"), torch.no_grad():
        cache = CompressedPagedCache(model.config, get_preset("lossless").with_overrides(when={"every": EVERY}))
        model(ids, past_key_values=cache)
        lost = ids.roll(1)[:, :3]
        with monkeypatch.context() as patches:
            patches.setattr(PagedStore, "pack", interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(lost, past_key_values=cache)
        assert cache.get_seq_length() == ids.shape[1]
        yield model, cache, ids, lost


def interrupt(*_, **__):
    raise KeyboardInterrupt


def other_than(lost):
    return (lost + 5) % 61 + 3


def stock(model, ids):
    with patched(model, "lossless"):
        return model(ids, past_key_values=CompressedPagedCache(model.config, "lossless")).logits[:, -1].float()


def near(model, logits, expected):
    return torch.allclose(logits.float(), expected, atol=1e-4 if model.dtype == torch.float32 else 0.2)


def test_other_tokens_are_refused_once(stopped):
    model, cache, ids, lost = stopped
    new = other_than(lost)
    with pytest.raises(RuntimeError, match="stopped half way, so its 3 tokens have been taken back"):
        model(new, past_key_values=cache)
    logits = model(new, past_key_values=cache).logits[:, -1]
    assert cache.get_seq_length() == ids.shape[1] + 3
    assert near(model, logits, stock(model, torch.cat([ids, new], 1)))


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_the_pass_may_be_repeated_in_chunks_of_any_length(stopped, chunk):
    model, cache, ids, lost = stopped
    for part in lost.split(chunk, dim=1):
        logits = model(part, past_key_values=cache).logits[:, -1]
    assert near(model, logits, stock(model, torch.cat([ids, lost], 1)))


def test_who_takes_tokens_off_knows_what_is_there(stopped):
    model, cache, ids, lost = stopped
    cache.crop(-1)
    logits = model(other_than(lost), past_key_values=cache).logits[:, -1]
    assert near(model, logits, stock(model, torch.cat([ids[:, :-1], other_than(lost)], 1)))


def test_generate_goes_by_what_the_cache_holds(stopped):
    model, cache, ids, lost = stopped
    text = torch.cat([ids, other_than(lost)], 1)
    tokens = model.generate(text, past_key_values=cache, max_new_tokens=1, do_sample=False)
    assert cache.get_seq_length() == text.shape[1]
    assert torch.equal(tokens[:, :-1], text)


def test_after_an_error_the_cache_is_as_before_and_takes_other_tokens(stopped, monkeypatch):
    model, cache, ids, lost = stopped
    cache.crop(0)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("simulated")

    with monkeypatch.context() as patches, pytest.raises(torch.OutOfMemoryError):
        patches.setattr(PagedStore, "pack", fail)
        model(lost, past_key_values=cache)
    new = other_than(lost)
    logits = model(new, past_key_values=cache).logits[:, -1]
    assert near(model, logits, stock(model, torch.cat([ids, new], 1)))
