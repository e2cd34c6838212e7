"""Stock transformers, or ours: one decoding step over a cache of random keys and values."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from worker import serve, setting, time_steps, versions_of

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument


class Ours:
    """A model, patched where there is a recipe, and its cache."""

    def __init__(self, model: str, threads: int, recipe: str = "") -> None:
        torch.set_num_threads(threads)
        self.recipe = recipe
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        if recipe:
            kvc.patch(self.model, recipe)
        self.cache: Any = None
        self.token = torch.empty(0)

    def about(self) -> dict[str, Any]:
        return {"versions": versions_of("kvcompress-hf", "torch", "transformers"), "weights": "bfloat16"}

    @torch.inference_mode()
    def fill(self, context: int, batch: int) -> dict[str, Any]:
        """Random keys and values, in every layer the same: what they cost does not depend on them."""
        self.cache = None  # the one before goes first
        config = self.model.config
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        torch.manual_seed(0)
        q, k, v = (torch.randn(batch, n, context, config.head_dim).bfloat16() for n in heads)
        if self.recipe:
            self.cache = kvc.CompressedPagedCache(config, self.recipe, prompt_tokens=context)
        else:
            self.cache = DynamicCache(config=config)
        output = q.transpose(1, 2)
        for layer in range(config.num_hidden_layers):
            if self.recipe:
                self.cache.attend(layer, q, k, v, None, scaling=config.head_dim**-0.5, dense=lambda: output)
            else:
                self.cache.update(k.clone(), v.clone(), layer)
        self.token = torch.full((batch, 1), 5)
        self.step()
        if self.recipe:
            return {"bytes": self.cache.memory().total}
        return {"bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)}

    def step(self) -> None:
        self.model(self.token, **as_argument(self.model, self.cache), use_cache=True)

    @torch.inference_mode()
    def decode(self, seconds: float, most: int) -> dict[str, Any]:
        return time_steps(self.step, seconds, most)

    def free(self) -> dict[str, Any]:
        self.cache = None
        return {}


if __name__ == "__main__":
    ours = Ours(**setting())
    serve({"about": ours.about, "fill": ours.fill, "decode": ours.decode, "free": ours.free})
