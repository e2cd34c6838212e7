"""In kvpress's environment: a context compressed by a press, and what the model then predicts for every exchange.

It measures nothing but bytes: the logits go to a file, and the one who asked scores them.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import torch
from kvpress import AdaKVPress, CompactorPress, ExpectedAttentionPress, KeyDiffPress, KVzipPress, SnapKVPress
from transformers import AutoModelForCausalLM, DynamicCache
from worker import serve, setting, versions_of

#: As in kvpress's own leaderboard.
PRESSES = {
    "SnapKV": lambda ratio: SnapKVPress(ratio),
    "ExpectedAttention": lambda ratio: ExpectedAttentionPress(ratio),
    "KeyDiff": lambda ratio: KeyDiffPress(ratio),
    "Compactor": lambda ratio: CompactorPress(ratio),
    "KVzip": lambda ratio: KVzipPress(ratio),
    "AdaKV(SnapKV)": lambda ratio: AdaKVPress(SnapKVPress(ratio)),
    "AdaKV(ExpectedAttention)": lambda ratio: AdaKVPress(ExpectedAttentionPress(ratio, epsilon=1e-2)),
}


class ScoredKVzip(KVzipPress):
    """Keeps its scores, which are the same for every ratio."""

    scores: torch.Tensor

    def compress_post(self, model: Any) -> None:
        self.scores = self.score_val.clone()


class Answers:
    """A model, and the context that is at hand: read once, and compressed by every press from what its hooks are given.

    A press acts on a layer after its attention, so that nothing in the reading depends on the press.
    """

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        logging.disable(logging.WARNING)  # KVzip says at every use that it reads twice
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self.modules = [layer.self_attn for layer in self.model.model.layers]
        for module in self.modules:
            module.rotary_emb = self.model.model.rotary_emb  # as kvpress does
        self.sample: dict[str, Any] = {}
        self.calls: list[tuple[Any, dict[str, Any], Any]] = []
        self.cache, self.kvzip = DynamicCache(config=self.model.config), ScoredKVzip(0.5)

    def about(self) -> dict[str, Any]:
        return {"versions": versions_of("kvpress", "torch", "transformers")}

    @torch.inference_mode()
    def take(self, path: str) -> dict[str, Any]:
        """Reads a context, which comes with its exchanges in a file."""
        self.sample, self.calls = json.loads(Path(path).read_text()), []
        self._forget_masks()
        context = torch.tensor([self.sample["context"]])
        self.cache = DynamicCache(config=self.model.config)
        hooks = [module.register_forward_hook(self._record, with_kwargs=True) for module in self.modules]
        self.model.model(input_ids=context, past_key_values=self.cache)
        for hook in hooks:
            hook.remove()
        with self.kvzip(self.model):
            self.model.model(input_ids=context, past_key_values=DynamicCache(config=self.model.config))
        return {}

    def _record(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.calls.append((module, kwargs, output))

    def _forget_masks(self) -> None:
        for module in self.modules:
            module.masked_key_indices = None  # presses leave theirs behind

    @torch.inference_mode()
    def measure(self, press: str, removed: float, path: str) -> dict[str, Any]:
        """Compresses the context and writes the logits of every exchange's answer to a file.

        Args:
            press: one of `PRESSES`, or nothing.
            removed: share of the slots that the press shall remove.
            path: for a list of `[answer tokens, vocabulary]`.

        Returns:
            While the next token is decoded, bytes of the storages that hold keys and values, of the lists of masked
            slots, and of a cache without a press.
        """
        cache = self.compress(press, removed)
        logits = [self.play(copy.deepcopy(cache), given, answer) for given, answer in self.sample["exchanges"]]
        torch.save(logits, path)
        self.play(cache, [0], [0])
        config = self.model.config
        slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * self.model.dtype.itemsize
        masked = [index for module in self.modules for index in module.masked_key_indices or ()]
        return {
            "held": storages([x for layer in cache.layers for x in (layer.keys, layer.values)]),
            "masks": storages(masked),
            "dense": slot * (len(self.sample["context"]) + 1),
        }

    def compress(self, name: str, removed: float) -> DynamicCache:
        """The context's cache after a press."""
        self._forget_masks()
        torch.manual_seed(0)  # for Compactor's random sketch
        cache = copy.deepcopy(self.cache)
        if not name:
            return cache
        press = PRESSES[name](removed)
        if name == "KVzip":
            press.score_val = self.kvzip.scores.clone()
            press.compress_post(self.model)
            return cache
        press.post_init_from_model(self.model)
        for module, kwargs, output in self.calls:
            press.forward_hook(module, [], {**kwargs, "past_key_values": cache}, output)
        return cache

    def play(self, cache: DynamicCache, given: list[int], answer: list[int]) -> torch.Tensor:
        """Logits of an answer, every token predicted from the right ones before it."""
        ids = torch.tensor([given + answer[:-1]])
        start = len(self.sample["context"])
        positions = torch.arange(start, start + ids.shape[1])[None]
        out = self.model(ids, past_key_values=cache, position_ids=positions, logits_to_keep=len(answer))
        return out.logits[0].clone()


def storages(tensors: list[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


if __name__ == "__main__":
    answers = Answers(**setting())
    serve({"about": answers.about, "take": answers.take, "measure": answers.measure})
