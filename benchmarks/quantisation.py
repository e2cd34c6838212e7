"""What each tier and each option of the quantiser loses, at equal bytes per slot.

    python benchmarks/quantisation.py [--tokens 2048] [--head-dims 64,128] [--model FOLDER] [--json FILE]

Keys, values and queries: Gaussian; with outlier channels (offsets 18, -14, 12, -10 and three times the spread, and an
extreme case with 120, -80, 40, -20); the same offsets turned by rotary embedding, in pairs of low, middle and high
frequency (`rope`); and real ones, of every layer and KV head of a model on held-out prose. Keys are in bfloat16.
Synthetic queries are peaked: each looks for one token.

Values of 2 bits are rotated. Options: `hadamard` rotates keys; `mean` takes
off what the keys of a head have in common, as the package estimates it
from a prompt (softmax does not see it); `mean of 1/8` estimates it from the first eighth of the tokens, as when a long
prompt comes in chunks; `shrink` narrows the 2-bit range about its centre as the package does, `shrink 4 bits` the 4-bit
range to 0.95; what the package does beyond that, errors of keys that later channels make good, is not here; `k2`, `v2`,
`k2v2`, `k4v4` behind a `+` give keys and values that many scales and offsets each.

Printed: relative error of keys and values, standard deviation of the error of logits (each query's mean removed), and
relative error of the attention output, mean over heads. Bytes per slot: codes, scales and offsets, and the share of the
mean; positions and scores, 4 bytes each, come on top. A * marks what the package does.
Gain: the output error of the option named under `over`, at the same bytes, divided by the option's own. Where an option
takes more bytes, the other gets them too: it holds as many slots as they pay for, chosen by chance, in a better tier
(the best choice of one, up to 16-bit), so above 1 the option is worth its bytes.
"""

import argparse
import datetime
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompress_hf as kvc
from kvcompress_hf.compat import as_argument
from kvcompress_hf.kernels.quantize import (
    TWO_BIT_KEYS,
    TWO_BIT_SEARCH,
    TWO_BIT_VALUES,
    dequantize,
    hadamard,
    quantize,
)
from kvcompress_hf.paging.key_shift import steady_mean

TINY = Path(__file__).parents[1] / "examples" / "models" / "kvlm-tiny"
NATIVE = (0, 0)
TIERS = ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2))


@dataclass(frozen=True)
class Option:
    """How keys and values are quantised beyond their bits."""

    mean: float = 0.0  # part of the tokens that the mean is estimated from; 0 leaves it in
    rotate: bool = False
    shrink: bool = False
    shrink_4_bits: bool = False
    key_groups: int = 1
    value_groups: int = 1

    @property
    def name(self) -> str:
        parts = ["hadamard"] * self.rotate + ["shrink"] * self.shrink + ["shrink 4 bits"] * self.shrink_4_bits
        parts += ["mean" if self.mean == 1 else "mean of 1/8"] * bool(self.mean)
        groups = [f"{name}{n}" for name, n in (("k", self.key_groups), ("v", self.value_groups)) if n > 1]
        return "+".join(parts + ["".join(groups)] * bool(groups)) or "plain"


@dataclass(frozen=True)
class Heads:
    """Keys and values `[heads, tokens, head_dim]`, queries `[heads, queries, head_dim]`, who sees whom, and a scale."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    mask: Tensor  # bool [queries, tokens]
    scale: float


def package(bits: tuple[int, int]) -> Option:
    """What the package does in the preset of one tier; native storage needs nothing."""
    if bits == NATIVE:
        return Option()
    centred = kvc.Recipe(tiers=(f"k{bits[0]}v{bits[1]}",)).centres_keys
    return Option(mean=float(centred), rotate=bits[0] <= 4, shrink=2 in bits)


def options(bits: tuple[int, int]) -> list[tuple[Option, Option]]:
    """Options of a tier, each with the one it is compared with."""
    plain, shrunk = Option(), Option(shrink=2 in bits)
    own = package(bits)
    found = [(plain, plain)]
    if shrunk != plain:
        found.append((shrunk, plain))
    rotated = Option(rotate=True, shrink=shrunk.shrink)
    found += [(rotated, shrunk), (Option(mean=1, shrink=shrunk.shrink), shrunk)]
    found.append((Option(mean=1, rotate=True, shrink=shrunk.shrink), rotated))
    found.append((replace(own, mean=1 / 8), replace(own, mean=0.0)))
    if 4 in bits:
        found.append((replace(own, shrink_4_bits=True), own))
    for groups in ((2, 1), (1, 2), (2, 2), (4, 4)):
        found.append((replace(own, key_groups=groups[0], value_groups=groups[1]), own))
    return found


def shrink_of(bits: int, option: Option, values: bool) -> float:
    """Factor on the range of a group."""
    if bits == 2 and option.shrink:
        return TWO_BIT_VALUES if values else TWO_BIT_KEYS
    return 0.95 if bits == 4 and option.shrink_4_bits else 1.0


def round_trip(x: Tensor, bits: int, option: Option, groups: int, values: bool) -> Tensor:
    """Quantised and back: fp16 scale and offset per slot and group, codes rounded half to even."""
    x = x.unflatten(-1, (groups, -1))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    centre, half = (low + high) / 2, (high - low) / 2 * shrink_of(bits, option, values)
    low, high = centre - half, centre + half
    step, offset = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    search = TWO_BIT_SEARCH if bits == 2 and option.shrink and values else 1.0
    find = offset + step * ((2**bits - 1) / 2 * (1 - search))
    codes = ((x - find) / (step * search).clamp(min=1e-12)).clamp(0, 2**bits - 1).round()
    return (codes * step + offset).flatten(-2)


def stored_bytes(heads: Heads, bits: tuple[int, int], option: Option) -> float:
    """Bytes of a slot: codes, an fp16 scale and offset per group, and its share of the mean in 16 bits."""
    tokens, head_dim = heads.keys.shape[1:]
    if bits == NATIVE:
        return 4.0 * head_dim
    share = 2 * head_dim / tokens if option.mean else 0.0
    return head_dim * sum(bits) / 8 + 4 * (option.key_groups + option.value_groups) + share


def stored(heads: Heads, bits: tuple[int, int], option: Option) -> tuple[Tensor, Tensor]:
    """Keys and values as they come back from a tier."""
    if bits == NATIVE:
        return heads.keys, heads.values
    keys = heads.keys
    shift = torch.zeros(())
    if option.mean:
        shift = steady_mean(keys[None, :, : int(option.mean * keys.shape[1])])[0]
        keys = (keys - shift).bfloat16().float()  # what is taken off leaves a key in the model's dtype
    block = keys.shape[-1] & -keys.shape[-1]
    if option.rotate:
        keys = hadamard(keys, block)
    keys = round_trip(keys, bits[0], option, option.key_groups, values=False)
    if option.rotate:
        keys = hadamard(keys, block)
    turns = bits[1] == 2
    values = hadamard(heads.values, block) if turns else heads.values
    values = round_trip(values, bits[1], option, option.value_groups, values=True)
    return keys + shift, hadamard(values, block) if turns else values


def mixed(heads: Heads, bits: tuple[int, int], option: Option, size: float) -> list[tuple[Tensor, Tensor]]:
    """All ways of spending `size` bytes a slot on one option: some slots in a better tier, the others in this one."""
    low = stored_bytes(heads, bits, option)
    if size <= low:
        return [stored(heads, bits, option)]
    ways = []
    order = torch.randperm(heads.keys.shape[1], generator=torch.Generator().manual_seed(0))
    mine = stored(heads, bits, option)
    for upper in (NATIVE, *TIERS[: TIERS.index(bits)]):
        better = package(upper)
        high = stored_bytes(heads, upper, better)
        if high < size:
            continue  # not dear enough
        count = round((size - low) / (high - low) * heads.keys.shape[1])
        chosen = torch.zeros(heads.keys.shape[1], dtype=torch.bool)
        chosen[order[:count]] = True
        theirs = stored(heads, upper, better)
        ways.append(tuple(torch.where(chosen[:, None], b, a) for a, b in zip(mine, theirs, strict=True)))
    return ways


def measure(heads: Heads, keys: Tensor, values: Tensor) -> dict[str, float]:
    """The errors of keys and values that came back from storage, mean over heads."""
    logits = heads.queries @ heads.keys.transpose(1, 2) * heads.scale
    error = heads.queries @ (keys - heads.keys).transpose(1, 2) * heads.scale
    seen = heads.mask.expand_as(error)
    count = seen.sum(-1, keepdim=True)
    centred = torch.where(seen, error - (error * seen).sum(-1, keepdim=True) / count, 0)
    output = attend(logits, heads.values, heads.mask)
    return {
        "key_error": relative(keys, heads.keys),
        "value_error": relative(values, heads.values),
        "logit_error": float((centred.square().sum((1, 2)) / seen.sum((1, 2))).sqrt().mean()),
        "output_error": relative(attend(logits + error, values, heads.mask), output),
    }


def attend(logits: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention outputs `[heads, queries, head_dim]`."""
    return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ values


def relative(value: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error per head, mean over heads."""
    return float(((value - wanted).norm(dim=(1, 2)) / wanted.norm(dim=(1, 2))).mean())


def synthetic(
    tokens: int, head_dim: int, offsets: tuple[float, ...] = (), rope: bool = False, heads: int = 8, queries: int = 64
) -> Heads:
    """Gaussian keys and values, some key channels with an offset and three times the spread; peaked queries."""
    generator = torch.Generator().manual_seed(0)
    centred = torch.randn(heads, tokens, head_dim, generator=generator)
    values = torch.randn(heads, tokens, head_dim, generator=generator)
    shift = torch.zeros(head_dim)
    width = head_dim // 2 if rope else head_dim
    for i, offset in enumerate(offsets):
        channel = (2 * i + 1) * width // (2 * len(offsets))
        centred[..., channel] *= 3
        shift[channel] = offset
        if rope:
            shift[channel + width] = offset / 2
    keys = centred + shift
    keys = (rotary(keys) if rope else keys).bfloat16().float()
    wanted = torch.randint(tokens, (queries,), generator=generator)
    noise = torch.randn(heads, queries, head_dim, generator=generator)
    plain = torch.where(shift == 0, keys[:, wanted], 0)  # queries look along the ordinary channels
    queries_ = plain * (12 / head_dim**0.5) + noise
    mask = torch.ones(queries, tokens, dtype=torch.bool)
    return Heads(keys, values, queries_, mask, head_dim**-0.5)


def rotary(keys: Tensor, theta: float = 1e6) -> Tensor:
    """Rotary embedding of keys at positions 0, 1, 2, ..., halves paired as in Llama."""
    tokens, head_dim = keys.shape[-2:]
    frequency = theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(tokens)[:, None] * frequency
    a, b = keys.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1)


class _Watch(kvc.CompressedPagedCache):
    """A cache that keeps queries, keys and values of each layer."""

    def attend(self, layer_idx, query, key, value, attention_mask, **kwargs):
        self.__dict__.setdefault("seen", []).append((query[0].float(), key[0].float(), value[0].float()))
        self.__dict__["scaling"] = kwargs["scaling"]
        return super().attend(layer_idx, query, key, value, attention_mask, **kwargs)


@torch.inference_mode()
def real(folder: Path, text: Path, tokens: int, queries: int = 64) -> Heads:
    """Keys, values and the last queries of every layer and KV head of a model on a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(text.read_text(encoding="utf-8", errors="replace")[5000 : 5000 + 12 * tokens]).input_ids[:tokens]
    cache = _Watch(model.config, "lossless")
    with kvc.patched(model, "lossless"):
        model(torch.tensor([ids]), **as_argument(model, cache), use_cache=True, logits_to_keep=1)
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    keys = torch.cat([key for _, key, _ in cache.seen])
    values = torch.cat([value for _, _, value in cache.seen])
    last = torch.cat([query[:, -queries:].unflatten(0, (-1, group)).flatten(1, 2) for query, _, _ in cache.seen])
    mask = torch.arange(len(ids)) <= torch.arange(len(ids) - queries, len(ids))[:, None]
    return Heads(keys, values, last, mask.repeat(group, 1), cache.scaling)


def check_against_package() -> None:
    """The round trip here is the package's."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    for bits in (8, 4, 2):
        for values in (False, True):
            codes, scale, offset, _ = quantize(x, bits, values)
            mine = round_trip(x, bits, Option(shrink=True), 1, values)
            difference = (dequantize(codes, scale, offset) - mine).abs().max()
            if difference > 1e-2:
                raise RuntimeError(f"the round trip at {bits} bits differs from the package's by {difference}")


def table(heads: Heads, name: str) -> list[dict[str, object]]:
    """Prints and returns the errors of every tier and option on one kind of data."""
    results = []
    shape = " x ".join(str(n) for n in heads.keys.shape)
    print(f"\n{name}: {shape} (heads x tokens x head_dim)")
    print(f"{'tier':<6}{'option':<30}{'bytes':>8}{'keys':>9}{'values':>9}{'logits':>9}{'output':>9}{'gain':>8}  over")
    for bits in TIERS:
        for option, over in options(bits):
            errors = measure(heads, *stored(heads, bits, option))
            size = stored_bytes(heads, bits, option)
            rivals = [measure(heads, *way)["output_error"] for way in mixed(heads, bits, over, size)]
            gain = min(rivals) / errors["output_error"]
            tier, own = f"k{bits[0]}v{bits[1]}", option == package(bits)
            entry = {"data": name, "head_dim": heads.keys.shape[2], "tier": tier, "option": option.name}
            results.append({**entry, "package": own, "bytes": size, **errors, "over": over.name, "gain": gain})
            print(
                f"{tier:<6}{option.name + '*' * own:<30}{size:8.2f}{errors['key_error']:9.4f}"
                f"{errors['value_error']:9.4f}{errors['logit_error']:9.4f}{errors['output_error']:9.4f}{gain:7.2f}x"
                f"  {over.name}"
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--head-dims", default="64,128", help="of the synthetic data")
    parser.add_argument("--model", type=Path, default=TINY, help="whose keys are the real ones")
    parser.add_argument("--text", type=Path, help="default: haystack.txt beside the model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    check_against_package()
    results = []
    for head_dim in map(int, arguments.head_dims.split(",")):
        results += table(synthetic(arguments.tokens, head_dim), "gaussian")
        results += table(synthetic(arguments.tokens, head_dim, (18, -14, 12, -10)), "outliers")
        results += table(synthetic(arguments.tokens, head_dim, (120, -80, 40, -20)), "extreme")
        results += table(synthetic(arguments.tokens, head_dim, (18, -14, 12, -10), rope=True), "rope")
    text = arguments.text or arguments.model / "haystack.txt"
    results += table(real(arguments.model, text, arguments.tokens), "real")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        setting = {"tokens": arguments.tokens, "model": arguments.model.name, "torch": torch.__version__}
        figures = {"date": datetime.date.today().isoformat(), **setting, "results": results}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
