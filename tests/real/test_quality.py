"""How far compressed caches are from the full one on real attention, and what they really take, in bfloat16.

The prose is of a novel that no setting was chosen on. A bound is about twice what was measured, which stands beside
it, of 2026-12-01.
"""

import contextlib

import pytest
import torch
from transformers import DynamicCache

import kvcompress_hf as kvc
from kvcompress_hf.cli.linears import linears_in_float32
from kvcompress_hf.cli.suites_run import Prompt, forward
from kvcompress_hf.compat import as_argument

TOKENS, SCORED = 2000, 160
#: Recipe, budget: KL(full || compressed) in nats per token, at most (measured); measured bytes / dense bytes, at most
#: (measured). `lossless` shows what is left of rounding.
SMOLLM2 = {
    ("lossless", None): (0.003, 1.02),  # .0014, 1.010
    ("k8v8", None): (0.003, 0.55),  # .0014, .545
    ("k8v4", None): (0.006, 0.43),  # .0027, .417
    ("k4v4", None): (0.007, 0.305),  # .0032, .302
    ("k4v2", None): (0.017, 0.235),  # .0086, .232
    ("k2v2", None): (0.12, 0.185),  # .058, .180
    ("auto", 1 / 4): (0.005, 1 / 4),  # .0024, .246
    ("auto", 1 / 8): (0.013, 1 / 8),  # .0063, .121
    ("auto", 1 / 16): (0.07, 1 / 16),  # .035, .0585
}
GEMMA3 = {
    ("lossless", None): (0.003, 1.02),  # .0014, 1.004
    ("k8v8", None): (0.005, 0.52),  # .0021, .512
    ("k8v4", None): (0.011, 0.40),  # .0053, .387
    ("k4v4", None): (0.02, 0.28),  # .0092, .273
    ("k4v2", None): (0.034, 0.225),  # .017, .221
    ("k2v2", None): (0.65, 0.16),  # .316, .158
    ("auto", 1 / 4): (0.011, 1 / 4),  # .0052, .239
    ("auto", 1 / 8): (0.08, 1 / 8),  # .038, .114
    ("auto", 1 / 16): (0.27, 1 / 16),  # .134, .0512
}
BOUNDS = {"smollm2": SMOLLM2, "gemma3": GEMMA3}


class Read:
    """A model that has read a prompt once: caches of any recipe, and the full cache's logits on what comes next."""

    def __init__(self, model, ids):
        self.model, self.rest = model, ids[TOKENS - 1 : -1]
        context = ids[: TOKENS - 1]
        cache = DynamicCache(config=model.config)
        model(torch.tensor([context]), use_cache=True, logits_to_keep=1, **as_argument(model, cache))
        self.dense = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        self.full = forward(model, self.rest, cache, SCORED).log_softmax(-1)
        with kvc.patched(model, "lossless"):
            self.prompt = Prompt(model, context)

    def kl(self, cache):
        """Of the full cache from this one, mean over the tokens."""
        cache.activate_past_recording()  # nothing of what is scored is compressed
        logp = forward(self.model, self.rest, cache, SCORED).log_softmax(-1)
        return float((self.full.exp() * (self.full - logp)).sum(-1).mean())


@pytest.fixture(scope="module")
def reads(load, prose):
    """A real model in bfloat16 that has read its prompt; each is made when it is first asked for."""
    made = {}

    def read(name):
        if name not in made:
            model, tokenizer = load(name, torch.bfloat16)
            quicker.enter_context(linears_in_float32(model))
            with torch.inference_mode():
                made[name] = Read(model, prose(tokenizer, TOKENS + SCORED)[0].tolist())
        return made[name]

    with contextlib.ExitStack() as quicker:
        yield read


@pytest.mark.parametrize(("name", "recipe", "budget"), [(name, *cell) for name in BOUNDS for cell in BOUNDS[name]])
def test_predictions_and_bytes_stay_within_bounds(reads, held_bytes, name, recipe, budget):
    read = reads(name)
    most_kl, most_bytes = BOUNDS[name][recipe, budget]
    recipe = kvc.get_preset(recipe) if budget is None else kvc.get_preset(recipe).with_overrides(budget=budget)
    with torch.inference_mode(), kvc.patched(read.model, "lossless"):
        cache = read.prompt.fill(recipe)
        memory = cache.memory()
        # Not in the report: the rotary frequencies, and each head's distortion per tier.
        assert memory.dense == read.dense and 0 <= held_bytes(cache) - memory.total < 4096
        assert memory.total <= most_bytes * read.dense
        assert read.kl(cache) < most_kl
