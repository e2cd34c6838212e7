"""Whole models on a GPU: a decode step by the clock and by the device, and how much fits into a fixed memory."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_timing import clock, gpu_milliseconds
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument
from kvcompress_hf.patches.generation import record_of
from kvcompress_hf.patches.graph import GraphSteps, capturer_for

RECIPES = ("lossless", "k8v4", "k4v2")
STEPS = 64  # of which the mean is taken: all recipes here pack every 32
SLICE = 16384  # tokens that go through an MLP at once: the whole prompt's activations would take the cache's room


@functools.cache
def random_model(device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model of Llama-8B's shape with random weights; on the CPU a tiny one."""
    torch.manual_seed(0)
    large = device.type == "cuda"
    heads, layers, hidden, inner = (32, 32, 4096, 14336) if large else (4, 2, 128, 256)
    config = LlamaConfig(
        vocab_size=32000 if large else 128, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4, head_dim=hidden // heads,
        max_position_embeddings=1 << 20,
    )  # fmt: skip
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
    for layer in model.model.layers:
        layer.mlp.forward = partial(in_slices, layer.mlp.forward)
    return model


def in_slices(mlp: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """An MLP over some tokens after the other; for every cache alike."""
    flat = x.reshape(-1, x.shape[-1])
    return torch.cat([mlp(part) for part in flat.split(SLICE)]).view(x.shape)


def new_cache(model: LlamaForCausalLM, recipe: kvc.Recipe | None) -> Cache:
    """A `DynamicCache` for the stock model, or the model patched and a cache for the recipe."""
    kvc.unpatch(model)
    if recipe is None:
        return DynamicCache(config=model.config)
    kvc.patch(model, recipe)
    return kvc.CompressedPagedCache(model.config, recipe)


def dense_token(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Bytes of a token in a `DynamicCache`."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def mean_milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """Mean of so many steps that tails are packed twice, and captured steps captured anew."""
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    return seconds(start, device) / STEPS * 1e3


def step_item(args: argparse.Namespace, name: str, context: int, batch: int, graph: bool = False) -> dict:
    """A decode step of a random model with one kind of cache, run or replayed from a CUDA graph."""
    model = random_model(args.device, args.dtype)
    ids = torch.randint(4, model.config.vocab_size, (batch, context), device=args.device)
    cache = new_cache(model, None if name == "DynamicCache" else kvc.get_preset(name))
    with torch.no_grad():
        model(ids, **as_argument(model, cache), use_cache=True, logits_to_keep=1)
        call = model
        if graph:  # as generate(..., kvcompress={"graph": True}) does
            capturer = capturer_for(args.device)
            call = GraphSteps(model, record_of(model), cache, capturer)
        step = partial(call, input_ids=ids[:, :1], **as_argument(model, cache), use_cache=True)
        mean = mean_milliseconds(step, args.device)
        wall = clock({name: step}, args.device, args.rounds)[name]
        gpu = gpu_milliseconds(step, args.device)
    dense = batch * context * dense_token(model.config, args.dtype)
    size = dense if name == "DynamicCache" else cache.memory().total
    layers = model.config.num_hidden_layers
    kvc.unpatch(model)
    row = dict(cache=name, graph=graph, context=context, batch=batch, layers=layers, bytes=size)
    if graph:
        row |= dict(captures=cache.run_report.statistics.captures)
    return row | dict(ms=wall, mean_ms=mean, **gpu)


def seconds(start: float, device: torch.device) -> float:
    """Seconds since `start`, everything on the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def settings_of(args: argparse.Namespace) -> dict[str, kvc.Recipe | None]:
    """What is compared at the same memory."""
    settings: dict[str, kvc.Recipe | None] = {"DynamicCache": None, "auto": kvc.get_preset("auto")}
    for part in args.budgets:
        settings[f"kv-compress 1/{part}"] = kvc.get_preset("kv-compress").with_overrides(budget=1 / part)
    return settings


@torch.no_grad()
def throughput_item(args: argparse.Namespace, name: str, recipe: kvc.Recipe | None) -> dict:
    """Tokens per second with as many sequences as fit into a fixed KV memory."""
    model = random_model(args.device, args.dtype)
    length = args.prompt + args.new
    each = length * dense_token(model.config, args.dtype)
    if recipe is not None:  # what one sequence takes when it is decoded from, and its share of new tokens
        cache = new_cache(model, recipe)
        for tokens in (args.prompt, 1):
            model(torch.full((1, tokens), 4, device=args.device), **as_argument(model, cache), logits_to_keep=1)
        each = cache.memory().total * length // args.prompt
    batch = max(1, min(args.most_sequences, args.kv_memory // each))
    ids = torch.randint(4, model.config.vocab_size, (batch, args.prompt), device=args.device)
    cache = new_cache(model, recipe)
    start = time.perf_counter()
    model(ids, **as_argument(model, cache), logits_to_keep=1)
    prefill = seconds(start, args.device)
    start = time.perf_counter()
    for _ in range(args.new):
        model(ids[:, :1], **as_argument(model, cache))
    decode = seconds(start, args.device)
    row = dict(setting=name, batch=batch, prefill_s=prefill, decode_s=decode)
    row |= dict(tokens_per_s=batch * args.new / (prefill + decode), decoded_per_s=batch * args.new / decode)
    if recipe is not None:
        events = cache.run_report.statistics
        row |= dict(bytes=cache.memory().total, packing_s=events.seconds_packing, planning_s=events.seconds_planning)
    kvc.unpatch(model)
    return row


def model_items(args: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], dict]]]:
    """Part, name and function of each item."""
    for context in args.contexts:
        for batch in args.model_batches:
            for name in ("DynamicCache", *RECIPES):
                yield "model", f"model {name} {context} b{batch}", partial(step_item, args, name, context, batch)
                if args.device.type == "cuda" and name != "DynamicCache":
                    replayed = partial(step_item, args, name, context, batch, graph=True)
                    yield "model", f"model {name} graph {context} b{batch}", replayed
    for name, recipe in settings_of(args).items():
        yield "throughput", f"throughput {name}", partial(throughput_item, args, name, recipe)
