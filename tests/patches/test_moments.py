"""A model is patched and unpatched by others at any moment of an answer: it is stock's, or stops with an error."""

import random
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers

import kvcompress_hf
from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import as_argument
from kvcompress_hf.errors import UnsupportedFeatureError
from kvcompress_hf.patches import is_patched, patch, unpatch

#: Where moments lie: the lines of this package, and those of transformers that run the model.
FILES = (
    *(str(path) for path in Path(kvcompress_hf.__file__).parent.resolve().rglob("*.py")),
    *(str(path) for path in Path(kvcompress_hf.patches.__file__).parent.resolve().rglob("*.py")),
    *(str(Path(transformers.__file__).parent / name) for name in ("generation/utils.py", "masking_utils.py")),
)
NEW = 4


class Moments:
    """Runs an answer and stops at some of its lines, while another thread patches or unpatches the model."""

    def __init__(self, model, route, at=()):
        self.model, self.route, self.at = model, route, set(at)
        self.line, self.threads = 0, []

    def answer(self, ids):
        sys.settrace(self._called)
        try:
            return self.model.generate(ids, max_new_tokens=NEW, do_sample=False)
        finally:
            sys.settrace(None)
            for thread in self.threads:
                thread.join()

    def _called(self, frame, event, _):
        file = frame.f_code.co_filename
        return self._at_line if file in FILES or "/modeling_" in file else None

    def _at_line(self, frame, event, _):
        if event == "line":
            self.line += 1
            if self.line in self.at:
                thread = threading.Thread(target=self._turn)
                self.threads.append(thread)
                thread.start()
                thread.join(0.02)  # longer than it takes, unless it waits for this thread to go on
        return self._at_line

    def _turn(self):
        if is_patched(self.model):
            unpatch(self.model)
        else:
            patch(self.model, "lossless", route=self.route, check=False)


@pytest.mark.parametrize(("family", "route"), [("llama", "swap"), ("qwen2", "interface")])
@pytest.mark.parametrize("seed", range(25))
def test_answers_are_stocks_or_stop(seed, family, route, build_model):
    model, ids = build_model(family), torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(seed))
    want = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    patch(model, "lossless", route=route, check=False)
    counted = Moments(model, route)
    assert torch.equal(counted.answer(ids), want)
    unpatch(model)
    pick = random.Random(seed)
    for _ in range(4):
        moments = Moments(model, route, pick.sample(range(1, counted.line), pick.choice((1, 2, 2, 3))))
        if pick.random() < 0.5:
            patch(model, "lossless", route=route, check=False)
        try:
            assert torch.equal(moments.answer(ids), want), sorted(moments.at)
        except UnsupportedFeatureError as error:
            assert "not patched" in str(error)
        unpatch(model)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_first_pass_without_the_patch(layers, build_model, prompt):
    """The cache was made while the model was patched, then it read the prompt unpatched, then it is patched again."""
    model, ids = build_model("qwen2", num_hidden_layers=layers), prompt()
    cache = CompressedPagedCache(model.config, "lossless")
    with torch.no_grad(), pytest.raises(UnsupportedFeatureError, match="not patched"):
        model(ids, use_cache=True, **as_argument(model, cache))
        patch(model, "lossless", route="interface", check=False)
        model(ids[:, :1], use_cache=True, **as_argument(model, cache))


def test_unpatch_waits_for_the_attention_of_a_layer(build_model, prompt, monkeypatch):
    """Also in the last layer, behind which no other one would notice: the answer is stock's, then the patch is off."""
    model, ids, threads = build_model("qwen2"), prompt(), []
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    patch(model, "lossless", route="interface", check=False)
    update = CompressedPagedCache.update

    def slow(self, key, value, layer_idx, *args, **kwargs):
        handed_out = update(self, key, value, layer_idx, *args, **kwargs)
        if layer_idx == model.config.num_hidden_layers - 1:
            threads.append(threading.Thread(target=unpatch, args=(model,)))
            threads[0].start()
            threads[0].join(0.02)
        return handed_out

    monkeypatch.setattr(CompressedPagedCache, "update", slow)
    cache = CompressedPagedCache(model.config, "lossless")
    with torch.no_grad():
        logits = model(ids, use_cache=True, **as_argument(model, cache)).logits
    threads[0].join()
    torch.testing.assert_close(logits, want)
    assert not is_patched(model) and cache.get_seq_length() == ids.shape[1]
    assert all(layer.seen == ids.shape[1] for layer in cache._attention.layers)
