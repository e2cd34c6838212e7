"""How position turns a model's queries, layer by layer, learned from the model itself.

Its own rotary modules are asked for the angles, by kind of layer where they differ. Which layer uses which of them, and
on which channels, shows in one pass over a few tokens that stand at two places at once: attention sees only the
distances between tokens, so both rows are the same but for how their queries are turned.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress_hf.cache import CompressedPagedCache
from kvcompress_hf.compat import as_argument, logging
from kvcompress_hf.errors import is_out_of_memory
from kvcompress_hf.paging.key_turn import Rotation
from kvcompress_hf.patches.dry_run import evaluating
from kvcompress_hf.patches.dry_run.trial import ordinary_ids, takes
from kvcompress_hf.patches.support import text_config

__all__ = ["Turning", "learn_turning"]

logger = logging.get_logger(__name__)

_TOKENS = 8
_FARTHEST = 200  # places between the two rows: enough to tell slow rotations from none
_LONG = 2**17  # tokens, beyond where any rotary embedding still depends on the length
#: Largest relative difference between a row turned on and the row that stands there: layers add up what 16 bits round.
_LIMITS = {torch.float32: 0.01, torch.float64: 0.01}
_LIMIT_16_BITS = 0.15

Angles = Callable[[int], Tensor]


@dataclass(frozen=True)
class _Way:
    """Which angles a layer turns its queries by, and where they lie; see [`Rotation`]."""

    angles: Angles | None
    at_end: bool = False
    interleaved: bool = False
    backwards: bool = False

    def rotation(self, length: int, head_dim: int) -> Rotation | None:
        """For a text of that many tokens; `None` where the angles are more than the head's channels."""
        if self.angles is None:
            return Rotation(torch.zeros(0))
        frequencies = self.angles(length)
        start = head_dim - 2 * frequencies.numel() if self.at_end else 0
        if start < 0 or 2 * frequencies.numel() > head_dim:
            return None
        return Rotation(-frequencies if self.backwards else frequencies, start, self.interleaved)


@dataclass
class Turning:
    """How position turns the queries of each layer of one model.

    Args:
        ways (`list[tuple[_Way, int] | None]`): Per layer how, and its head_dim; `None` where that is not known.
        unknown (`str`): Why it is not known of some layers; empty if it is known of all.
        varies (`bool`): Whether angles depend on the length of the text.
    """

    ways: list[tuple[_Way, int] | None] = field(default_factory=list)
    unknown: str = ""
    varies: bool = False
    _made: tuple[int, tuple[Rotation | None, ...]] | None = None

    def rotations(self, length: int | None) -> tuple[Rotation | None, ...]:
        """For a text of some length.

        Args:
            length (`int`, *optional*): Tokens; left out where nobody turns queries, and it only matters of which layers
                it is known how.

        Returns:
            `tuple[Rotation | None, ...]`: One per layer of the cache.
        """
        made = self._made  # other threads may put others in its place
        if made is not None and (length in (None, made[0]) or not self.varies):
            return made[1]
        distinct = {each: each[0].rotation(length or 0, each[1]) for each in dict.fromkeys(self.ways) if each}
        rotations = tuple(None if each is None else distinct[each] for each in self.ways)
        self._made = length or 0, rotations
        return rotations


class _Listener(CompressedPagedCache):
    """A lossless cache that keeps the queries and values of each layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.config, "lossless")
        self.heard: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, *args: Any, **how: Any) -> Tensor:
        """Keeps them, then does as any cache."""
        self.heard.setdefault(layer_idx, (query.detach().clone(), value.detach().clone()))
        return super().attend(layer_idx, query, key, value, *args, **how)


def learn_turning(model: PreTrainedModel) -> Turning:
    """Learns how position turns the queries of a patched model; takes one pass over a few tokens.

    Where it cannot be learned, that is said once, as a warning.

    Args:
        model (`PreTrainedModel`): The patched model.

    Returns:
        `Turning`: What was learned.
    """
    sources = _sources(model)
    longest = getattr(text_config(model), "max_position_embeddings", None) or 2 * _TOKENS + _FARTHEST
    apart = max(1, min(_FARTHEST, longest - _TOKENS))
    listener = _Listener(model)
    found = Turning([None] * len(listener))
    if not sources and not takes(model, "position_ids"):
        apart = 0  # nothing turns its queries, so they need not be moved to another place to see
    try:
        _listen(model, listener, apart)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        found.unknown = f"it does not run on a few tokens at two places ({type(error).__name__}: {error})"
    else:
        _explain(found, listener.heard, sources, apart)
    found.varies = any(_varies(angles) for angles in sources)
    if found.unknown:
        logger.warning_once(
            f"{type(model).__name__}: it is not known how position turns the queries of "
            f"{sum(each is None for each in found.ways)} of its {len(found.ways)} layers ({found.unknown}). There "
            "`auto`, and whatever else looks at a prompt as if it came again, judges by the last queries of the prompt "
            "alone; `auto` then evicts nothing that still fits in its lowest tier. Where questions come later, "
            "a recipe that keeps every token (such as 'k8v4' or 'k4v4') or one that reads the prompt twice "
            "('auto-kvzip') is safer."
        )
    return found


@torch.compiler.disable
def _listen(model: PreTrainedModel, cache: _Listener, apart: int) -> None:
    """Runs the same tokens at the beginning and some places further on."""
    ids = ordinary_ids(model, 1, _TOKENS).repeat(2, 1)
    arguments: dict[str, Any] = {"input_ids": ids}
    if apart:
        positions = torch.arange(_TOKENS, device=ids.device)
        arguments["position_ids"] = torch.stack([positions, positions + apart])
    with evaluating(model):
        model(**arguments, use_cache=True, **as_argument(model, cache))


def _explain(found: Turning, heard: dict[int, tuple[Tensor, Tensor]], sources: Sequence[Angles], apart: int) -> None:
    """Finds for each layer the way that makes the first row's queries those of the second."""
    length, named = _TOKENS + apart, []
    ways = [_Way(None)]
    for angles in sources:
        places = [(end, pairs, back) for end in (False, True) for pairs in (False, True) for back in (False, True)]
        ways += [_Way(angles, *place) for place in places]
    for layer, (query, value) in heard.items():
        limit = _LIMITS.get(query.dtype, _LIMIT_16_BITS)
        head_dim = query.shape[-1]
        if not sources and _difference(value[:1], value[1:]) > limit:
            # Positions are in the states that queries are made of, and nothing turns them later.
            found.ways[layer] = (ways[0], head_dim)
            continue
        best, way = min(
            ((_error(query, way.rotation(length, head_dim), apart), place) for place, way in enumerate(ways)),
            default=(torch.inf, 0),
        )
        if best <= limit:
            found.ways[layer] = (ways[way], head_dim)
        else:
            named.append(layer)
    if named:
        found.unknown = (
            f"the queries of layer {named[0]} at another place are explained by none of the {len(sources)} rotary "
            "embeddings found in it"
        )
    elif sources and all(each is None or each[0].angles is None for each in found.ways):
        found.ways = [None] * len(found.ways)
        found.unknown = "it has a rotary embedding, but its queries do not follow position_ids"


def _error(query: Tensor, rotation: Rotation | None, apart: int) -> float:
    if rotation is None:
        return torch.inf
    by = torch.full((1,), apart, device=query.device)
    return _difference(rotation.turn(query[:1].float(), by), query[1:])


def _difference(first: Tensor, second: Tensor) -> float:
    second = second.float()
    return float((first.float() - second).norm() / second.norm().clamp(min=1e-30))


# -- what rotary modules say -------------------------------------------------------------------------------------------


def _sources(model: PreTrainedModel) -> list[Angles]:
    """A way to ask each rotary module of the model, for each kind of layer; those that say the same are one."""
    text = text_config(model)
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or []))
    found: list[Angles] = []
    said: list[Tensor] = []
    for module in model.modules():
        if "rotary" not in type(module).__name__.lower():
            continue
        parameters = list(inspect.signature(type(module).forward).parameters)[3:]  # self, states, positions
        for kind in kinds if parameters and "type" in parameters[0] else [None]:
            angles = _asking(module, kind)
            try:
                says = angles(2)
            except Exception:  # of an image tower, say, or of a kind of layer that it does not turn
                continue
            if not any(torch.equal(says, other) for other in said):
                said.append(says)
                found.append(angles)
    rotary_dim = getattr(text, "rotary_dim", None)
    if not found and isinstance(rotary_dim, int):  # GPT-J and CodeGen keep a table instead of a module
        table = 10000.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
        found.append(lambda length: table)
    return found


def _varies(angles: Angles) -> bool:
    """Whether they depend on the length of the text."""
    try:
        return not torch.equal(angles(2), angles(_LONG))
    except IndexError:  # a table has no more than it says
        return False


def _asking(module: nn.Module, kind: str | None) -> Angles:
    """A function from a text's length to the module's radians per position of each pair, float32 `[pairs]`."""

    def angles(length: int) -> Tensor:
        own = copy.deepcopy(module)  # some note the longest text they have seen
        device = next((buffer.device for buffer in own.buffers()), torch.device("cpu"))
        places = torch.tensor([[0, 1, max(2, length - 1)]], device=device)
        with torch.no_grad():
            said = own(torch.zeros((1, 3, 1), device=device), places, *([] if kind is None else [kind]))
        cos, sin = (said.real, said.imag) if isinstance(said, Tensor) else said[:2]
        cos, sin = (part.float().cpu().reshape(-1, 3, part.shape[-1])[0] for part in (cos, sin))
        if not bool(cos[0].any()):  # some return them the other way round
            cos, sin = sin, cos
        turned = torch.atan2(sin[1], cos[1])
        half = turned.numel() // 2
        if torch.equal(turned[:half], turned[half:]):
            return turned[:half].clone()
        if torch.equal(turned[::2], turned[1::2]):
            return turned[::2].clone()
        return turned

    return angles
