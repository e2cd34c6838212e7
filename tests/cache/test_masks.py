"""4-D and 2-D masks of every kind: the stock logits, or a refusal that leaves the cache as it was."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from kvcompress_hf import CompressedPagedCache, UnsupportedFeatureError, patch
from kvcompress_hf.compat import as_argument

LOW, TOKENS, HELD = torch.finfo(torch.float32).min, 12, 7


def _model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def stock():
    return _model()


@pytest.fixture(scope="module", params=("swap", "interface"))
def model(request):
    return patch(_model(), "lossless", route=request.param, check=False)


def _causal(low=LOW):
    return torch.where(torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(), 0.0, low)[None, None]


def _distances():
    return (torch.arange(TOKENS)[None] - torch.arange(TOKENS)[:, None]).clamp(max=0)


def _inside(block):
    """A bias among the tokens of one chunk; between chunks there is none, as a mask over new tokens cannot say it."""
    both = torch.zeros(TOKENS, TOKENS)
    both[:HELD, :HELD], both[HELD:, HELD:] = block[:HELD, :HELD], block[HELD:, HELD:]
    return both


RIGHT = {
    "causal": _causal(),
    "bool": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None],
    "minus infinity": _causal(-torch.inf),
    "by hand": _causal(-1e4),
    "on the diagonal": _causal() + 0.5 * torch.eye(TOKENS),
    "negative": _causal() + _inside(0.3 * _distances()),
    "same for all heads": _causal().expand(1, 4, TOKENS, TOKENS),
    "of one sequence": _causal()[:1],
}
REFUSED = {
    "bias per head": _causal().repeat(1, 4, 1, 1) + 0.3 * _distances() * torch.arange(4)[:, None, None],
    "sparsity per head": (torch.rand(1, 4, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1)) > 0.5)
    | torch.eye(TOKENS, dtype=torch.bool),
    "integers": torch.ones(TOKENS, TOKENS, dtype=torch.long).tril()[None, None],
    "of other sequences": _causal().expand(3, 1, TOKENS, TOKENS),
}


@pytest.mark.parametrize("step", (TOKENS - HELD, 1), ids=("chunk", "tokens"))
@pytest.mark.parametrize("mask", RIGHT.values(), ids=RIGHT)
@torch.no_grad()
def test_a_mask_over_the_new_tokens_gives_the_stock_logits(mask, step, model, stock):
    ids = torch.randint(3, 160, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    ours, theirs = CompressedPagedCache(model.config, "lossless"), DynamicCache(config=stock.config)
    for start, end in [(0, HELD), *((at, at + step) for at in range(HELD, TOKENS, step))]:
        part = mask[..., start:end, :end].clone()
        if step == 1 and start:  # what a bias adds between chunks, a mask over new tokens cannot say
            part[..., :start] = True if mask.dtype == torch.bool else 0.0
        got = model(ids[:, start:end], attention_mask=part[..., start:], **as_argument(model, ours)).logits
        want = stock(ids[:, start:end], attention_mask=part, **as_argument(stock, theirs)).logits
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert ours.slots()[0].tolist() == [[TOKENS] * 2] * 2


@pytest.mark.parametrize("held", (0, HELD))
@pytest.mark.parametrize("mask", REFUSED.values(), ids=REFUSED)
@torch.no_grad()
def test_a_mask_that_cannot_be_kept_is_refused_and_changes_nothing(mask, held, model):
    ids = torch.randint(3, 160, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    cache = CompressedPagedCache(model.config, "lossless")
    if held:
        model(ids[:, :held], **as_argument(model, cache))
    with pytest.raises(UnsupportedFeatureError):
        model(ids[:, held:], attention_mask=mask[..., held:, held:], **as_argument(model, cache))
    assert cache.get_seq_length() == held
    model(ids[:, held:], **as_argument(model, cache))
    assert cache.get_seq_length() == TOKENS


@pytest.mark.parametrize("length", (1, TOKENS - HELD, TOKENS - 1, TOKENS + 1))
@torch.no_grad()
def test_a_2d_mask_of_another_length_is_refused(length, model):
    ids = torch.randint(3, 160, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    cache = CompressedPagedCache(model.config, "lossless")
    model(ids[:, :HELD], **as_argument(model, cache))
    with pytest.raises(ValueError, match="must be \\[batch, 12\\]"):
        model(ids[:, HELD:], attention_mask=torch.ones(1, length, dtype=torch.long), **as_argument(model, cache))
    assert cache.get_seq_length() == HELD
