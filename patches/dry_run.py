"""Two tokens, then one more: a patched model must give the stock logits before anyone relies on it."""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import Cache, as_argument, cache_of
from kvcompress_hf.errors import UnsupportedModelError
from kvcompress_hf.patches.support import text_config
from kvcompress_hf.presets import get_preset

__all__ = ["check_dry_run", "evaluating", "stock_logits"]

# Largest difference allowed, relative to the largest logit: the two paths add up in different orders.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in.

    Args:
        model (`nn.Module`): The model.
    """
    training = [name for name, module in model.named_modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for name in training:
            # Looked up again: the module under this name may have been replaced meanwhile.
            model.get_submodule(name).training = True


def stock_logits(model: PreTrainedModel) -> list[Tensor]:
    """Logits of the unpatched model for the dry run.

    Args:
        model (`PreTrainedModel`): The model, in evaluation mode.

    Returns:
        `list[Tensor]`: float32 logits of both steps, `[1, tokens, vocab]`.

    Raises:
        UnsupportedModelError: If the model does not run on token ids alone.
    """
    try:
        return _run(model, None)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be checked: it does not run on three token ids alone "
            f"({type(error).__name__}: {error})."
        ) from error


def check_dry_run(model: PreTrainedModel, expected: list[Tensor]) -> None:
    """Runs the patched model with the `lossless` recipe and compares.

    Args:
        model (`PreTrainedModel`): The patched model, in evaluation mode.
        expected (`list[Tensor]`): What [`stock_logits`] returned.

    Raises:
        UnsupportedModelError: If the patched model fails, does not use the cache, or gives other logits.
    """
    name = type(model).__name__
    cache = CompressedPagedCache(model.config, get_preset("lossless"), prompt_tokens=2)
    try:
        got = _run(model, cache)
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} is not supported: with a compressed cache it stops with {type(error).__name__}: {error}"
        ) from error
    if cache.get_seq_length() != 3:
        raise UnsupportedModelError(
            f"{name} is not supported: of 3 tokens it stored {cache.get_seq_length()} in the compressed cache."
        )
    # Under autocast keys and values, and so the rounding, are coarser than the model's weights.
    tolerance = max(_TOLERANCE.get(dtype, 5e-2) for dtype in {model.dtype, *cache.dtypes})
    for step, (ours, stock) in enumerate(zip(got, expected, strict=True)):
        scale = max(1.0, float(stock.nan_to_num().abs().max()))
        if not torch.allclose(ours, stock, rtol=0.0, atol=tolerance * scale, equal_nan=True):
            difference = float((ours - stock).abs().max())
            raise UnsupportedModelError(
                f"{name} is not supported: with the lossless recipe its logits differ by {difference:.3g} from the "
                f"stock model in step {step + 1} of the check (allowed: {tolerance * scale:.3g}); its attention does "
                "something that the compressed cache does not reproduce."
            )


def _run(model: PreTrainedModel, cache: CompressedPagedCache | None) -> list[Tensor]:
    # With offloading to disk the weights are on "meta" between calls; accelerate then moves the ids itself.
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    ids = torch.tensor([[1, 2, 3]], device=device) % text_config(model).vocab_size
    # Said outright where the model takes them: on the later ranks of a pipeline stock caches cannot tell.
    say = "position_ids" in inspect.signature(model.forward).parameters
    logits = []
    past: Cache | None = cache
    for part in (slice(0, 2), slice(2, 3)):
        positions = {"position_ids": torch.arange(3, device=device)[None, part]} if say else {}
        out = model(input_ids=ids[:, part], use_cache=True, **as_argument(model, past), **positions)
        past = cache_of(out)
        logits.append(out.logits.float().cpu())
    return logits
