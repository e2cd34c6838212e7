"""The description in a cache file, with every value checked for its type and range before anything is made of it."""

import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvcompress_hf.errors import CacheFormatError
from kvcompress_hf.io.container import DTYPES, StoredFile, parse_bounded
from kvcompress_hf.io.form import FORMAT, FORMAT_VERSIONS, ORDERS
from kvcompress_hf.io.identity import ModelIdentity
from kvcompress_hf.paging.store import Geometry
from kvcompress_hf.presets import resolve_rows
from kvcompress_hf.recipe import Recipe
from kvcompress_hf.runtime.attention import AttentionState
from kvcompress_hf.units import parse_bytes

__all__ = ["Header", "StoreValues"]

_MOST = 2**31 - 1  # lengths and page numbers are int32
_MOST_SEEN = 2**30  # so are positions, and there must be some left for tokens to come
_MOST_PAGE_BYTES = 2**24
_MOST_BYTES = 2**60
_MOST_REASON = 500  # characters of a message that quote the file
_MOST_POOL = 4095  # neighbours that scores are pooled over: work per slot
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class StoreValues:
    """What a header says of one store.

    Args:
        layers (`list[int]`): Layers of the model whose rows it holds, in this order.
        pages (`list[int]`): Pages of each tier.
        evicted (`bool`): Whether slots have ever been dropped or moved.
        page_bytes (`int`): Size of a page.
        order (`str`): Inner order of its pages.
        tail_capacity (`int`): Tokens its tail had room for.
        rotates_values (`bool`): Whether its values are rotated.
    """

    layers: list[int]
    pages: list[int]
    evicted: bool
    page_bytes: int
    order: str
    tail_capacity: int
    rotates_values: bool


class Header:
    """The metadata of a file, with every value checked for its type and range.

    Args:
        file (`StoredFile`): The file.
        layers (`int`): Layers of the model.

    Raises:
        CacheFormatError: If it is no cache file, of another version, or damaged.
    """

    def __init__(self, file: StoredFile, layers: int) -> None:
        self.file = file
        self._layers = layers
        metadata = file.metadata
        if metadata.get("format") != FORMAT:
            raise file.error(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        known = [str(each) for each in FORMAT_VERSIONS]
        if metadata.get("format_version") not in known:
            raise file.error(
                f"its format version is {metadata.get('format_version')!r}, but this package reads "
                f"{', '.join(known)}; make the cache again, or use the package version that wrote it"
            )
        self._says_rotation = metadata["format_version"] != known[0]
        text = metadata.get("state", "")
        try:
            values = parse_bounded(text)
        except (ValueError, RecursionError) as error:
            raise file.error(f"its state is not the JSON of a cache ({error})") from error
        if not isinstance(values, dict):
            raise file.error("its state is not a JSON object")
        self._values = values
        self.stores = self._list(values, "stores", dict)
        if len(self.stores) > layers:
            raise file.error(f"{len(self.stores)} stores, where the model has {layers} layers")
        self._check_checksum(text)
        if values.get("byteorder") != sys.byteorder:
            raise file.error(f"it is in byte order {values.get('byteorder')!r}, this machine in {sys.byteorder!r}")

    def _check_checksum(self, text: str) -> None:
        sums = self.file.read("checksums", torch.int64, (len(self.stores) + 1,)).tolist()
        crc = zlib.crc32(text.encode("utf-8", "surrogatepass"))
        pages = {f"store.{i}.pages" for i in range(len(self.stores))}
        for name in sorted(self.file.entries.keys() - pages - {"checksums"}):
            crc = self.file.crc(self.file.entries[name], crc)
        if crc != sums[-1]:
            raise self.file.error("its tables or its description are damaged (their checksum differs)")
        self.page_checksums = sums[:-1]

    def check_model(self, identity: ModelIdentity, windows: Sequence[int | None]) -> None:
        """Refuses a file of another model.

        Args:
            identity (`ModelIdentity`): The model at hand.
            windows (`Sequence[int | None]`): Sliding window of each of its layers.

        Raises:
            CacheFormatError: If the file is of another one.
        """
        model = self._values.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("config"), dict):
            raise self.file.error("it does not say which model it belongs to")
        dtype, parameters = model.get("dtype"), model.get("parameters")
        (count,) = self.file.expect("model.weights", torch.int64, (None,)).shape
        # More checksums than there are parameters are not even read.
        known = identity.weights and count <= len(identity.weights)
        weights = self.file.read("model.weights", torch.int64, (count,)).tolist() if known else [0] * min(count, 1)
        saved = ModelIdentity(model["config"], model.get("rope"), dtype, tuple(weights), parameters or 0)
        difference = saved.difference(identity)
        if difference is None and self._values.get("windows") != list(windows):
            difference = f"its sliding windows are {list(windows)}, not {self._values.get('windows')}"
        if difference is not None:
            raise self.other_model(difference)

    def other_model(self, difference: str) -> CacheFormatError:
        """What to raise about a file of another model.

        Args:
            difference (`str`): How the model given differs.

        Returns:
            `CacheFormatError`: The error, for the caller to raise.
        """
        return CacheFormatError(
            f"{self.file.path} belongs to another model than the one given: {difference[:_MOST_REASON]}. Load it "
            "with the model it was made with, or prefill again."
        )

    def recipes(self) -> tuple[Recipe, ...]:
        """The recipes.

        Returns:
            `tuple[Recipe, ...]`: One for all sequences, or one per sequence.

        Raises:
            CacheFormatError: If there are too many, or one of them is not valid.
        """
        listed = self._list(self._values, "recipes", dict)
        batch = self._batch()
        if batch and len(listed) > 1 and len(listed) != batch:
            raise self.file.error(f"{len(listed)} recipes for {batch} sequences")
        made: dict[str, Recipe] = {}  # most sequences of a batch have the recipe of another
        try:
            texts = [json.dumps(values, sort_keys=True) for values in listed]
            for text, values in zip(texts, listed, strict=True):
                if text not in made:
                    made[text] = _read_recipe(values)
            return resolve_rows([made[text] for text in texts])
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise self.file.error(f"its recipe cannot be used: {error}") from error

    def _batch(self) -> int:
        # No store holds more than the file does, so what is read next bounds the batch as well.
        return self._int(self._values, "batch", 1 if self.stores else 0, _MOST if self.stores else 0)

    def state(self, tiers: int) -> AttentionState:
        """What the cache knows besides its stores.

        Args:
            tiers (`int`): Tiers of the recipe.

        Returns:
            `AttentionState`: With numbers that agree with each other.

        Raises:
            CacheFormatError: If something is missing or out of range.
        """
        values, file = self._values, self.file
        seen = self._int(values, "seen", 0, _MOST_SEEN)
        batch = self._batch()
        if (seen > 0) != bool(self.stores):
            raise file.error(f"it says {seen} tokens, but has {len(self.stores)} stores")
        prompt_tokens = None if values.get("prompt_tokens") is None else self._int(values, "prompt_tokens", 0, _MOST)
        groups = self._list(values, "groups", int, self._layers)
        tail_used = self._list(values, "tail_used", int, self._layers)
        if any(not 1 <= group <= 65536 for group in groups):
            raise file.error(f"its groups of query heads are {groups}")
        if any(not 0 <= used <= seen for used in tail_used):
            raise file.error(f"its tails would hold {tail_used} tokens, but it has seen {seen}")
        padding = gaps = distortion = None
        if "padding" in file.entries:
            padding = file.read("padding", torch.int64, (batch,))
            if bool(((padding < 0) | (padding > seen)).any()):
                raise file.error(f"padding is not between 0 and the {seen} tokens seen")
            gaps = torch.stack([torch.zeros_like(padding), padding], dim=-1)[:, None]
            if "gaps" in file.entries:
                gaps = file.read("gaps", torch.int64, (batch, None, 2))
                outside = (gaps < 0).any() | (gaps > seen).any() | (gaps.sum(-1) > seen).any()
                if bool(outside | (gaps[..., 1].sum(1) > padding).any()):
                    raise file.error(f"its runs of padding are not within the {seen} tokens seen")
        if "distortion" in file.entries:
            distortion = file.read("distortion", torch.float32, (batch, None, tiers))
            if bool((distortion.isinf() | (distortion < 0)).any()):
                raise file.error("its measured losses are not numbers of at least 0")
        return AttentionState(
            seen=seen,
            batch=batch,
            prompt=self._int(values, "prompt", 0, seen),
            prompt_tokens=prompt_tokens,
            planned=self._int(values, "planned", 0, seen),
            faded=self._int(values, "faded", 0, seen),
            recording=self._bool(values, "recording"),
            unfinished=self._bool(values, "unfinished"),
            groups=groups,
            tail_used=tail_used,
            padding=padding,
            gaps=gaps,
            distortion=distortion,
        )

    def geometry(self, index: int) -> Geometry:
        """Shape and dtype of the keys and values of a store.

        Args:
            index (`int`): Which store.

        Returns:
            `Geometry`: Shape and dtype of the store's keys, on the CPU.

        Raises:
            CacheFormatError: If there is no such geometry.
        """
        values = self.stores[index]
        dtype = values.get("dtype")
        known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values() if dtype.is_floating_point}
        if not isinstance(dtype, str) or dtype not in known:
            raise self.file.error(f"keys of dtype {dtype!r}, not one of {', '.join(known)}")
        heads, dim = self._int(values, "kv_heads", 1, 65536), self._int(values, "head_dim", 1, 65536)
        return Geometry(_CPU, known[dtype], heads, dim, self._bool(values, "windowed"))

    def store(self, index: int, tiers: int, most_capacity: int) -> StoreValues:
        """Reads what the header says of a store.

        Args:
            index (`int`): Index of the store.
            tiers (`int`): Tiers of the recipe.
            most_capacity (`int`): Most tokens that its tail may say it has room for.

        Returns:
            `StoreValues`: Its layers, pages, order of pages and sizes, each within range.

        Raises:
            CacheFormatError: If one is missing or out of range.
        """
        values = self.stores[index]
        mine = self._list(values, "layers", int)
        if not mine or len(set(mine)) != len(mine) or not all(0 <= layer < self._layers for layer in mine):
            raise self.file.error(f"a store of layers {mine}, where the model has {self._layers}")
        counts = self._list(values, "pages", int, tiers)
        if any(not 0 <= count <= _MOST for count in counts):
            raise self.file.error(f"a store of {counts} pages")
        order = values.get("order")
        if order not in ORDERS:
            raise self.file.error(f"pages in the order {order!r}, not one of {', '.join(ORDERS)}")
        capacity = self._int(values, "tail_capacity", 0, most_capacity)
        page_bytes = self._int(values, "page_bytes", 1, _MOST_PAGE_BYTES)
        rotates = self._says_rotation and self._bool(values, "rotates_values")
        return StoreValues(mine, counts, self._bool(values, "evicted"), page_bytes, order, capacity, rotates)

    def _int(self, values: Mapping[str, Any], name: str, low: int, high: int) -> int:
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.file.error(f"{name} is {value!r}, not an integer between {low} and {high}")
        return value

    def _bool(self, values: Mapping[str, Any], name: str) -> bool:
        value = values.get(name)
        if not isinstance(value, bool):
            raise self.file.error(f"{name} is {value!r}, not true or false")
        return value

    def _list(self, values: Mapping[str, Any], name: str, kind: type, count: int | None = None) -> list[Any]:
        value = values.get(name)
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise self.file.error(f"{name} is {value!r}, not a list of {kind.__name__}")
        if count is not None and len(value) != count:
            raise self.file.error(f"{name} has {len(value)} entries, not {count}")
        return value


def _read_recipe(values: dict[str, Any]) -> Recipe:
    if any(not -_MOST <= number <= _MOST for number in _integers(values)):
        raise ValueError("it has numbers beyond 32 bits")
    recipe = Recipe.from_dict(values)
    pool = getattr(recipe.observer, "pool", 0)
    if pool > _MOST_POOL:
        raise ValueError(f"its scores are pooled over {pool} neighbours")
    if recipe.page_bytes is not None and recipe.page_bytes > _MOST_PAGE_BYTES:
        raise ValueError(f"page_bytes is {recipe.page_bytes}")
    amount = None if recipe.budget is None else recipe.budget.amount
    if isinstance(amount, str) and parse_bytes(amount) > _MOST_BYTES:
        raise ValueError(f"its budget is {amount}")
    return recipe


def _integers(value: Any) -> Iterator[int]:
    """All integers in nested dicts and lists."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _integers(inner)
