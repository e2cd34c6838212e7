"""What `kvcompress support` does: which model families work, found by trying every one of them."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress_hf.compat import logging
from kvcompress_hf.errors import UnsupportedModelError

from .tiny_models import VOCABULARY, families, tiny_model

SUPPORTED, DIFFERS, REFUSED, NOT_BUILT = "supported", "differs", "refused", "not built"
_PROMPT, _NEW = 40, 16


@dataclass
class Finding:
    """What became of one family.

    Args:
        family: Model type, as in `config.model_type`.
        model_class: Name of the class.
        status: `"supported"`, `"differs"`, `"refused"` or `"not built"`.
        adapter: How it is patched: `"swap"` or `"interface"`; empty unless patched.
        equal: Modes in which patched and stock model gave the same tokens.
        different: Modes in which they did not, or in which only the patched model failed; and 16-bit dtypes in which
            `patch` does not take the model.
        untested: Modes that the stock model cannot do, or in which its own tokens depend on the chunk size.
        note: Reason of a refusal or failure, or what else there is to know.
    """

    family: str
    model_class: str
    status: str
    adapter: str = ""
    equal: tuple[str, ...] = ()
    different: tuple[str, ...] = ()
    untested: tuple[str, ...] = ()
    note: str = ""


def _ids(batch: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY - 4, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _padded() -> dict[str, Any]:
    ids, mask = _ids(3, _PROMPT), torch.ones(3, _PROMPT, dtype=torch.long)
    for row, pads in enumerate((0, 7, 29)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


#: The ways of generating that every family is tried in; padding is longer than any window or chunk.
MODES: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": lambda: {"input_ids": _ids(1, _PROMPT)},
    "padded": _padded,
    "chunked": lambda: _padded() | {"prefill_chunk_size": 11},
    "beams": lambda: _padded() | {"num_beams": 3},
    "sampling": lambda: _padded() | {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "lookup": lambda: {"input_ids": _ids(1, _PROMPT // 4).repeat(1, 4), "prompt_lookup_num_tokens": 3},
}


def generate_in(model: PreTrainedModel, mode: str) -> Tensor:
    """Generates in one of `MODES`, always from the same input and seed.

    Args:
        model: A tiny model.
        mode: One of `MODES`.

    Returns:
        Token ids, `[sequences, tokens]`.
    """
    arguments = {"max_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        tokens: Tensor = cast(Any, model).generate(**(arguments | MODES[mode]()))
        return tokens


def examine(family: str, modes: Iterable[str] = tuple(MODES)) -> Finding:
    """Builds a tiny random model of a family, patches it with `lossless` and compares tokens with the stock model.

    Args:
        family: One of `families()`.
        modes: Which of `MODES` to try.

    Returns:
        What came of it; no exception of a family gets out.
    """
    import kvcompress_hf as kvc
    from kvcompress_hf.patches.generation import record_of

    with _quiet():
        try:
            model = tiny_model(family)
        except Exception as error:
            return Finding(family, families()[family], NOT_BUILT, note=_one_line(f"{type(error).__name__}: {error}"))
        finding = Finding(family, type(model).__name__, SUPPORTED)
        expected = _stock_tokens(model, modes)
        try:
            kvc.patch(model, "lossless")
        except UnsupportedModelError as error:
            finding.status, finding.note = REFUSED, _one_line(str(error))
            return finding
        if not expected:
            finding.status, finding.note = NOT_BUILT, "the stock model does not generate from token ids alone"
            return finding
        record = record_of(model)
        finding.adapter = record.route if record is not None else ""
        _compare(model, expected, finding)
        _patch_in_16_bits(model, finding)
    finding.untested = tuple(mode for mode in modes if mode not in expected)
    if finding.different:
        finding.status = DIFFERS
    return finding


def _stock_tokens(model: PreTrainedModel, modes: Iterable[str]) -> dict[str, Tensor]:
    expected = {}
    for mode in modes:
        try:
            expected[mode] = generate_in(model, mode)
        except Exception:  # a mode that the family does not have
            continue
    if {"padded", "chunked"} <= expected.keys() and not torch.equal(expected["padded"], expected["chunked"]):
        # Reading a prompt in chunks must not change what is said; where stock does, there is nothing to be equal to.
        del expected["chunked"]
    return expected


def _compare(model: PreTrainedModel, expected: dict[str, Tensor], finding: Finding) -> None:
    for mode, tokens in expected.items():
        try:
            same = torch.equal(generate_in(model, mode), tokens)
        except Exception as error:
            same, finding.note = False, _one_line(f"{mode}: {type(error).__name__}: {error}")
        if same:
            finding.equal += (mode,)
        else:
            finding.different += (mode,)


def _patch_in_16_bits(model: PreTrainedModel, finding: Finding) -> None:
    """Dtypes in which `patch` refuses what it takes in float32, or fails, are named among what differs."""
    import kvcompress_hf as kvc

    for dtype in (torch.bfloat16, torch.float16):
        kvc.unpatch(model)
        try:
            kvc.patch(cast(Any, model).to(dtype), "lossless")
        except Exception as error:
            name = str(dtype).removeprefix("torch.")
            finding.different += (name,)
            finding.note = _one_line(f"{name}: {type(error).__name__}: {error}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Families warn about all kinds of things that do not matter for a random model."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _one_line(text: str) -> str:
    return " ".join(text.split())


# -- the table ---------------------------------------------------------------------------------------------------------


def to_markdown(findings: Sequence[Finding]) -> str:
    """The support table.

    Args:
        findings: One per family.

    Returns:
        A page of Markdown.
    """
    counts = Counter(finding.status for finding in findings)
    parts = [
        "# Model families",
        "",
        f"Made by `kvcompress support --output docs/models.md` with transformers {transformers.__version__}, torch "
        f"{torch.__version__.split('+')[0]} on CPU; do not edit by hand. For each family that transformers has a "
        "text-writing model class of, a tiny random model (2 to 4 layers, float32, one layer at least of each kind the "
        "family has, windows of 24 tokens) is patched with `lossless`, and its tokens are compared with those of the "
        f"stock model in {len(MODES)} ways of generating: {', '.join(MODES)}. `patch` must take it in bfloat16 and "
        "float16 as well.",
        "",
        f"{counts[SUPPORTED]} of {len(findings)} families are supported, {counts[REFUSED]} are refused with a reason, "
        f"{counts[NOT_BUILT]} could not be built or run here, {counts[DIFFERS]} differ. Real models must also "
        "have heads of a size that pages take: head_dim a multiple of 16, at most 256; `patch` checks it (Gemma 4, "
        "whose full attention has head_dim 512, is refused for it). A family not listed is tried by `patch` all the "
        "same: it compares logits with the stock model first and refuses rather than being wrong.",
        "",
        "## Supported",
        "",
        "`swap`: the attention modules are replaced by paged ones. `interface`: transformers' attention interface "
        "leads to the cache. A way of generating that the stock model of a family cannot do is left out.",
        "",
        "| family | class | adapter | same tokens |",
        "|---|---|---|---|",
    ]
    parts += [
        f"| {f.family} | {f.model_class} | {f.adapter} | {_modes(f)} |" for f in findings if f.status == SUPPORTED
    ]
    if counts[DIFFERS]:
        parts += ["", "## Different", "", "| family | class | same | different | note |", "|---|---|---|---|---|"]
        parts += [
            f"| {f.family} | {f.model_class} | {', '.join(f.equal)} | {', '.join(f.different)} | {_cell(f.note)} |"
            for f in findings
            if f.status == DIFFERS
        ]
    parts += ["", "## Refused", "", "| family | class | reason |", "|---|---|---|"]
    parts += [f"| {f.family} | {f.model_class} | {_cell(_reason(f))} |" for f in findings if f.status == REFUSED]
    parts += ["", "## Not built", "", "No tiny model of these could be made or run here, so nothing is known.", ""]
    parts += ["| family | class | reason |", "|---|---|---|"]
    parts += [f"| {f.family} | {f.model_class} | {_cell(f.note)} |" for f in findings if f.status == NOT_BUILT]
    return "\n".join(parts) + "\n"


def _modes(finding: Finding) -> str:
    return "all" if not finding.untested else ", ".join(finding.equal)


def _reason(finding: Finding) -> str:
    """Why it is refused, without the class's name, which has its own column."""
    for words in (" is not supported: ", " cannot be checked: "):
        if words in finding.note:
            return finding.note.split(words, 1)[1]
    return finding.note


def _cell(text: str, most: int = 220) -> str:
    text = text.replace("|", "\\|")
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " ..."


# -- the command -------------------------------------------------------------------------------------------------------
