"""What ways of quantising keys and values cost a model's predictions, tried on real attention before they are built.

    python benchmarks/bits.py [--model smollm2] [--contexts 3] [--context 1600] [--only REGEX] [--json FILE]

A context of the dev authors is read once in float32. Its keys or values, but for the first four tokens', then go
through a quantiser and back, the other kind staying whole, and the copy and prose probes of `kvcompress eval` are
predicted from them by the stock attention: KL(full || quantised) in nats per token, mean over contexts. There is no
rounding to 16 bits here, so what is printed is the quantiser's alone. `kvcompress eval` measures what was built.

Ways are named by what they do: `range R` cuts the range of a slot to R about its centre, `search S` looks codes up in S
of the range that they stand for, `rotated` goes through a Hadamard transform, `fit` takes the range of least squared
error, `same length` rescales what comes back to the length of what was stored, `scaled` divides channels by powers of
two that balance keys and queries, `in turn` rounds channels one after the other with the second moment of the prompt's
queries (or with that of the output projection), whole or as the package keeps it, and `groups of N` are slots with a
scale for every N channels. A * marks what the package does.
"""

import argparse
import datetime
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

import kvcompress_hf as kvc
from kvcompress_hf.cli import suites_run
from kvcompress_hf.cli.evaluate import choose_form
from kvcompress_hf.cli.generate import load
from kvcompress_hf.cli.models import find_model
from kvcompress_hf.cli.suites import Amounts, Sample, make_samples
from kvcompress_hf.cli.texts import find_texts
from kvcompress_hf.kernels.quantize import TWO_BIT_KEYS, TWO_BIT_SEARCH, TWO_BIT_VALUES, hadamard, quantize
from kvcompress_hf.paging.key_feedback import key_feedback
from kvcompress_hf.paging.key_shift import gains, steady_mean

SINKS = 4
DAMPING = 0.1


@dataclass
class Read:
    """What attention was given for a context, all layers together, and what follows from it.

    Args:
        sample: The context and its probes.
        keys: `[layers, kv_heads, tokens, head_dim]`.
        values: Likewise.
        query: `[layers, q_heads, tokens, head_dim]`.
        output: Second moment that an error of values meets, `[layers, kv_heads, head_dim, head_dim]`.
        full: Log-probabilities of the probes from the whole cache.
    """

    sample: Sample
    keys: Tensor
    values: Tensor
    query: Tensor
    output: Tensor
    full: list[Tensor]

    def __post_init__(self) -> None:
        heads = self.keys.shape[1]
        looks = self.query[:, :, -32:] * self.keys.shape[-1] ** -0.5
        mean = steady_mean(self.keys)
        self.shift = torch.where(gains(self.keys, mean, looks, None, 4), mean, 0.0)
        grouped = self.query.unflatten(1, (heads, -1)).flatten(2, 3)
        self.moment = grouped.transpose(-1, -2) @ grouped
        self.feedback = key_feedback(self.query, heads).float()
        centred = (self.keys - self.shift)[:, :, SINKS:]
        self.balance = balance(centred.square().mean(2), grouped.square().mean(2))


Way = Callable[[Read, Tensor], Tensor]


def balance(keys: Tensor, queries: Tensor) -> Tensor:
    """Powers of two by which channels of keys are divided, the same for a rotary pair, `[..., 1, head_dim]`."""
    pairs = [(x.unflatten(-1, (2, -1)).mean(-2)).repeat(1, 1, 2) for x in (keys, queries)]
    factors = (pairs[0] / pairs[1].clamp(min=1e-20)).pow(0.25)
    factors = factors / factors.log().mean(-1, keepdim=True).exp()
    return factors.log2().round().exp2().unsqueeze(-2)


def affine(x: Tensor, bits: int, part: float = 1.0) -> tuple[Tensor, Tensor]:
    """Step and lowest value of each slot, as fp16 holds them."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    centre, half = (low + high) / 2, (high - low) / 2 * part
    return (2 * half / (2**bits - 1)).half().float().clamp(min=1e-12), (centre - half).half().float()


def codes(x: Tensor, step: Tensor, low: Tensor, bits: int) -> Tensor:
    return ((x - low) / step).clamp(0, 2**bits - 1).round()


def plain(bits: int, part: float = 1.0, search: float = 1.0) -> Way:
    def way(_: Read, x: Tensor) -> Tensor:
        (step, low), (find_step, find_low) = affine(x, bits, part), affine(x, bits, part * search)
        return codes(x, find_step, find_low, bits) * step + low

    return way


def fit(bits: int) -> Way:
    def way(read: Read, x: Tensor) -> Tensor:
        tries = [plain(bits, part)(read, x) for part in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)]
        errors = torch.stack([(y - x).square().sum(-1) for y in tries])
        return torch.stack(tries).gather(0, errors.argmin(0)[None, ..., None].expand(1, *x.shape))[0]

    return way


def same_length(way: Way) -> Way:
    def rescaled(read: Read, x: Tensor) -> Tensor:
        y = way(read, x)
        return y * (x.square().sum(-1, keepdim=True) / (x * y).sum(-1, keepdim=True).clamp(min=1e-9))

    return rescaled


def grouped(way: Way, size: int) -> Way:
    return lambda read, x: way(read, x.unflatten(-1, (-1, size))).flatten(-2)


def rotated(way: Way) -> Way:
    return lambda read, x: hadamard(way(read, hadamard(x, x.shape[-1])), x.shape[-1])


def scaled(way: Way) -> Way:
    return lambda read, x: way(read, x / read.balance) * read.balance


def in_turn(bits: int, values: bool = False, part: float = 1.0) -> Way:
    """GPTQ's rounding with a whole second moment, in the rotated basis."""

    def way(read: Read, x: Tensor) -> Tensor:
        dim = x.shape[-1]
        turn = hadamard(torch.eye(dim), dim)
        moment = (turn @ (read.output if values else read.moment) @ turn).double()
        moment += DAMPING * moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(dim)
        upper = torch.linalg.cholesky(torch.linalg.inv(moment), upper=True).float()
        step, low = (each[..., 0] for each in affine(x, bits, part))
        left, done = x.clone(), torch.empty_like(x)
        for d in range(dim):
            done[..., d] = codes(left[..., d], step, low, bits) * step + low
            error = (left[..., d] - done[..., d]) / upper[..., d, d, None]
            left[..., d + 1 :] -= error[..., None] * upper[..., None, d, d + 1 :]
        return done

    return rotated(way)


def package(bits: int, values: bool = False) -> Way:
    """The package's own rule."""

    def way(read: Read, x: Tensor) -> Tensor:
        feedback = None if values else read.feedback[:, :, None]
        found, scale, offset, _ = quantize(x, bits, values, feedback)
        return found.float() * scale.float()[..., None] + offset.float()[..., None]

    return way if values and bits > 2 else rotated(way)


def ways() -> dict[str, tuple[str, Way]]:
    """Name, then whether it is for keys or values, and how."""
    keys: dict[str, Way] = {
        "k4 rotated": rotated(plain(4)),
        "k4 rotated, fit": rotated(fit(4)),
        "k4 rotated, scaled": scaled(rotated(plain(4))),
        "k4 rotated, groups of 32": rotated(grouped(plain(4), 32)),
        "k4 in turn, whole": in_turn(4),
        "k4 in turn *": package(4),
        "k2 rotated, range 0.6": rotated(plain(2, 0.6)),
        "k2 rotated, range 0.75": rotated(plain(2, 0.75)),
        "k2 rotated, range 0.75, same length": same_length(rotated(plain(2, 0.75))),
        "k2 rotated": rotated(plain(2)),
        "k2 in turn, whole, range 0.75": in_turn(2, part=0.75),
        "k2 in turn, whole": in_turn(2),
        f"k2 in turn, range {TWO_BIT_KEYS} *": package(2),
    }
    values: dict[str, Way] = {
        "v4 *": package(4, values=True),
        "v4 fit": fit(4),
        "v4 rotated": rotated(plain(4)),
        "v4 in turn, whole": in_turn(4, values=True),
        "v2 range 0.6": plain(2, 0.6),
        "v2 range 0.8": plain(2, 0.8),
        "v2": plain(2),
        "v2 range 0.75, same length": same_length(plain(2, 0.75)),
        "v2 range 0.9, search 0.9375": plain(2, 0.9, 0.9375),
        "v2 rotated, fit": rotated(fit(2)),
        "v2 rotated, range 0.75, same length": same_length(rotated(plain(2, 0.75))),
        f"v2 rotated, range {TWO_BIT_VALUES}, search {TWO_BIT_SEARCH} *": package(2, values=True),
        "v2 rotated, groups of 32, range 0.8, same length": same_length(rotated(grouped(plain(2, 0.8), 32))),
        "v2 in turn, range 0.7": in_turn(2, values=True, part=0.7),
    }
    return {name: (kind, way) for kind, mine in (("keys", keys), ("values", values)) for name, way in mine.items()}


class Watch(kvc.CompressedPagedCache):
    """A cache that keeps queries, keys and values of each layer."""

    def attend(self, layer_idx, query, key, value, attention_mask, **kwargs):
        self.__dict__.setdefault("seen", []).append((query[0], key[0], value[0]))
        return super().attend(layer_idx, query, key, value, attention_mask, **kwargs)


def read_context(model: torch.nn.Module, sample: Sample, output: Tensor) -> Read:
    """Puts a context through the model once."""
    cache = Watch(model.config, "lossless")
    with kvc.patched(model, "lossless"):
        suites_run.forward(model, sample.context, cache, keep=1)
    query, keys, values = (torch.stack(parts) for parts in zip(*cache.seen, strict=True))
    return Read(sample, keys, values, query, output, probe(model, sample, keys, values))


def probe(model: torch.nn.Module, sample: Sample, keys: Tensor, values: Tensor) -> list[Tensor]:
    """Log-probabilities of the answers of every exchange, predicted from a cache of these keys and values."""
    found = []
    for exchange in sample.exchanges:
        if exchange.probe not in ("copy", "prose"):
            continue
        cache = DynamicCache(config=model.config)
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            cache.update(k[None], v[None], layer)
        found.append(suites_run.play(model, cache, exchange).logits.log_softmax(-1))
    return found


def distance(model: torch.nn.Module, read: Read, kind: str, way: Way) -> dict[str, float]:
    """KL of what the full cache predicts from what a way leaves, by probe."""
    keys, values = read.keys.clone(), read.values.clone()
    if kind == "keys":
        keys[:, :, SINKS:] = way(read, keys[:, :, SINKS:] - read.shift) + read.shift
    else:
        values[:, :, SINKS:] = way(read, values[:, :, SINKS:])
    sums: dict[str, list[float]] = {"copy": [], "prose": []}
    probes = [exchange.probe for exchange in read.sample.exchanges if exchange.probe in sums]
    for name, full, got in zip(probes, read.full, probe(model, read.sample, keys, values), strict=True):
        sums[name].append(float((full.exp() * (full - got)).sum(-1).mean()))
    return {name: sum(each) / len(each) for name, each in sums.items()}


def output_moments(model: torch.nn.Module) -> Tensor:
    """What an error of values meets in the output projections, mean over the query heads of a KV head."""
    heads = model.config.num_key_value_heads
    weights = torch.stack([layer.self_attn.o_proj.weight.float() for layer in model.model.layers])
    weights = weights.unflatten(-1, (model.config.num_attention_heads, -1))
    moments = torch.einsum("lohd,lohe->lhde", weights, weights)
    return moments.unflatten(1, (heads, -1)).mean(2)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a Llama-shaped model; folder, hub id or a name of ours")
    parser.add_argument("--contexts", type=int, default=3)
    parser.add_argument("--context", type=int, default=1600)
    parser.add_argument("--tokens", type=int, default=96, help="of prose")
    parser.add_argument("--only", default="", help="a regular expression that names must match")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    name = find_model(arguments.model)
    model, tokenizer = load(name, dtype="float32", device="cpu")
    samples = make_samples(
        tokenizer,
        find_texts(name, "dev"),
        choose_form(tokenizer, "auto"),
        count=arguments.contexts,
        length=arguments.context,
        amounts=Amounts(arguments.tokens),
    )
    output = output_moments(model)
    reads = [read_context(model, sample, output) for sample in samples]
    results = []
    print(f"{'':<52}{'copy':>9}{'prose':>9}   KL in nats per token")
    for title, (kind, way) in ways().items():
        if re.search(arguments.only, title):
            found = [distance(model, read, kind, way) for read in reads]
            mean = {probe: sum(each[probe] for each in found) / len(found) for probe in ("copy", "prose")}
            print(f"{title:<52}{mean['copy']:9.4f}{mean['prose']:9.5f}", flush=True)
            results.append({"way": title, "of": kind, **mean, "contexts": found})
    if arguments.json:
        setting = {"model": Path(name).name, "contexts": arguments.contexts, "context": arguments.context}
        figures = {"date": datetime.date.today().isoformat(), **setting, "torch": torch.__version__, "results": results}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
