"""What each tier and each option of the quantiser loses, at its stored bytes per slot.

    python benchmarks/quantisation.py [--tokens 2048] [--head-dim 64] [--model FOLDER] [--json FILE]

Keys, values and queries: Gaussian; with outlier channels (offsets 18, -14, 12, -10 and three times the spread, and an
extreme case with 120, -80, 40, -20); and real ones, of every layer and KV head of the tiny model on held-out prose.
Synthetic queries are peaked: each looks for one token. No RoPE acts on synthetic keys, so mean removal looks better
there than it is; the real keys have it.

Options: `mean` removes each head's mean key first (softmax does not see it), `hadamard` rotates keys, `shrink` narrows
the 2-bit range to 0.6 about its centre, `g2`, `g4` give every half or quarter of a vector its own scale and offset.
Printed: relative error of keys and values, standard deviation of the error of logits (each query's mean removed), and
relative error of the attention output, mean over heads. Bytes: codes, scales and offsets of keys and values; positions
and scores, 4 bytes each, come on top. A * marks what the package does.
"""

import argparse
import datetime
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompress_hf as kvc
from kvcompress_hf.kernels.quantize import TWO_BIT_SHRINK, dequantize, hadamard, quantize

TINY = Path(__file__).parents[1] / "examples" / "models" / "kvlm-tiny"
TIERS = ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2))


@dataclass(frozen=True)
class Option:
    """How keys and values are quantised beyond their bits."""

    name: str
    mean: bool = False
    rotate: bool = False
    shrink: bool = False
    groups: int = 1


OPTIONS = (
    Option("plain"),
    Option("mean", mean=True),
    Option("hadamard", rotate=True),
    Option("mean+hadamard", mean=True, rotate=True),
    Option("g2", groups=2),
    Option("g4", groups=4),
    Option("shrink", shrink=True),
    Option("hadamard+shrink", rotate=True, shrink=True),
    Option("mean+hadamard+shrink", mean=True, rotate=True, shrink=True),
)


@dataclass(frozen=True)
class Heads:
    """Keys and values `[heads, tokens, head_dim]`, queries `[heads, queries, head_dim]`, who sees whom, and a scale."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    mask: Tensor  # bool [queries, tokens]
    scale: float


def round_trip(x: Tensor, bits: int, shrink: bool, groups: int) -> Tensor:
    """Quantised and back: fp16 scale and offset per slot and group, codes rounded half to even."""
    x = x.unflatten(-1, (groups, -1))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if shrink and bits == 2:
        centre, half = (low + high) / 2, (high - low) / 2 * TWO_BIT_SHRINK
        low, high = centre - half, centre + half
    step, offset = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    codes = ((x - offset) / step.clamp(min=1e-12)).clamp(0, 2**bits - 1).round()
    return (codes * step + offset).flatten(-2)


def stored_bytes(head_dim: int, bits: tuple[int, int], groups: int) -> int:
    """Bytes of a slot: codes, and an fp16 scale and offset per group, of key and value."""
    return head_dim * sum(bits) // 8 + 2 * 4 * groups


def measure(heads: Heads, bits: tuple[int, int], option: Option) -> dict[str, float]:
    """The errors of one tier with one option, mean over heads."""
    key_bits, value_bits = bits
    block = heads.keys.shape[-1] & -heads.keys.shape[-1]
    keys = heads.keys
    shift = keys.mean(1, keepdim=True) if option.mean else torch.zeros(())
    keys = keys - shift
    if option.rotate:
        keys = hadamard(keys, block)
    keys = round_trip(keys, key_bits, option.shrink, option.groups)
    if option.rotate:
        keys = hadamard(keys, block)
    keys = keys + shift
    values = round_trip(heads.values, value_bits, option.shrink, option.groups)
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


def synthetic(tokens: int, head_dim: int, offsets: tuple[float, ...], heads: int = 8, queries: int = 64) -> Heads:
    """Gaussian keys and values, some key channels with an offset and three times the spread; peaked queries."""
    generator = torch.Generator().manual_seed(0)
    centred = torch.randn(heads, tokens, head_dim, generator=generator)
    values = torch.randn(heads, tokens, head_dim, generator=generator)
    shift = torch.zeros(head_dim)
    for i, offset in enumerate(offsets):
        channel = (2 * i + 1) * head_dim // (2 * len(offsets))
        centred[..., channel] *= 3
        shift[channel] = offset
    wanted = torch.randint(tokens, (queries,), generator=generator)
    noise = torch.randn(heads, queries, head_dim, generator=generator)
    plain = torch.where(shift == 0, centred[:, wanted], 0)  # queries look along the ordinary channels
    queries_ = plain * (12 / head_dim**0.5) + noise
    mask = torch.ones(queries, tokens, dtype=torch.bool)
    return Heads(centred + shift, values, queries_, mask, head_dim**-0.5)


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
        model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    keys = torch.cat([key for _, key, _ in cache.seen])
    values = torch.cat([value for _, _, value in cache.seen])
    last = torch.cat([query[:, -queries:].unflatten(0, (-1, group)).flatten(1, 2) for query, _, _ in cache.seen])
    mask = torch.arange(len(ids)) <= torch.arange(len(ids) - queries, len(ids))[:, None]
    return Heads(keys, values, last, mask.repeat(group, 1), cache.scaling)


def in_package(bits: tuple[int, int], option: Option) -> bool:
    """Whether the package stores a tier with this option: rotation from 4 bits down, a shrunk range at 2."""
    return option == Option(option.name, rotate=bits[0] <= 4, shrink=2 in bits)


def check_against_package() -> None:
    """The round trip here is the package's."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    for bits in (8, 4, 2):
        codes, scale, offset, _ = quantize(x, bits)
        difference = (dequantize(codes, scale, offset) - round_trip(x, bits, True, 1)).abs().max()
        if difference > 1e-2:
            raise RuntimeError(f"the round trip at {bits} bits differs from the package's by {difference}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--head-dim", type=int, default=64, help="of the synthetic data")
    parser.add_argument("--model", type=Path, default=TINY, help="whose keys are the real ones")
    parser.add_argument("--text", type=Path, help="default: haystack.txt beside the model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    check_against_package()
    data = {
        "gaussian": synthetic(arguments.tokens, arguments.head_dim, ()),
        "outliers": synthetic(arguments.tokens, arguments.head_dim, (18, -14, 12, -10)),
        "extreme": synthetic(arguments.tokens, arguments.head_dim, (120, -80, 40, -20)),
        "real": real(arguments.model, arguments.text or arguments.model / "haystack.txt", arguments.tokens),
    }
    results = []
    for name, heads in data.items():
        print(f"\n{name}: {heads.keys.shape[0]} heads, {heads.keys.shape[1]} tokens, head_dim {heads.keys.shape[2]}")
        print(f"{'tier':<6}{'option':<22}{'bytes':>6}{'keys':>9}{'values':>9}{'logits':>9}{'output':>9}{'gain':>8}")
        for bits in TIERS:
            plain = measure(heads, bits, OPTIONS[0])["output_error"]
            for option in OPTIONS:
                if option.shrink and 2 not in bits:
                    continue
                errors = measure(heads, bits, option)
                size = stored_bytes(heads.keys.shape[2], bits, option.groups)
                tier, mark = f"k{bits[0]}v{bits[1]}", "*" if in_package(bits, option) else ""
                entry = {"data": name, "tier": tier, "option": asdict(option), "package": bool(mark), "bytes": size}
                results.append({**entry, **errors})
                print(
                    f"{tier:<6}{option.name + mark:<22}{size:6d}{errors['key_error']:9.4f}{errors['value_error']:9.4f}"
                    f"{errors['logit_error']:9.4f}{errors['output_error']:9.4f}{plain / errors['output_error']:7.2f}x"
                )
    print("\ngain: output error of the plain tier / that of the option; g2 and g4 take more bytes for it")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        setting = {"tokens": arguments.tokens, "model": arguments.model.name, "torch": torch.__version__}
        figures = {"date": datetime.date.today().isoformat(), **setting, "results": results}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
