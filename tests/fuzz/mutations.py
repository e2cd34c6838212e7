"""Cache files made wrong on purpose: taken apart, changed in some way, and put together with right checksums."""

import json
import random
import struct
import zlib

__all__ = ["KINDS", "Parts", "mutate"]

INTEGERS = (0, 1, 2, 3, 7, -1, 127, 2**15, 2**16, 2**24, 2**30, 2**31 - 1, -(2**31), 2**32, 2**62, 2**63, 2**64, 10**40)
VALUES = (
    None,
    True,
    False,
    "",
    "auto",
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    [],
    {},
    [0],
    "x" * 5000,
    *INTEGERS,
)
SIZES = {"U8": 1, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8}


class Parts:
    """A file taken apart: header, its parsed state, and the bytes of the tensors."""

    def __init__(self, data):
        length = struct.unpack("<Q", data[:8])[0]
        self.header = json.loads(data[8 : 8 + length])
        self.state = json.loads(self.header["__metadata__"]["state"])
        self.body = bytearray(data[8 + length :])

    def names(self, *, pages=False):
        """Tensors that say something; those with the pages, or the others."""
        fixed = ("__metadata__", "checksums", "model.weights")
        return [n for n in self.header if n not in fixed and n.endswith(".pages") == pages]

    def place(self, name):
        start, stop = self.header[name]["data_offsets"]
        return start, stop

    def replace(self, name, content, shape=None, dtype=None):
        """Gives a tensor other bytes; what lies behind it moves."""
        start, stop = self.place(name)
        self.body[start:stop] = content
        moved = len(content) - (stop - start)
        for other, entry in self.header.items():
            if other not in ("__metadata__", name) and entry["data_offsets"][0] >= stop:
                entry["data_offsets"] = [offset + moved for offset in entry["data_offsets"]]
        entry = self.header[name]
        entry["data_offsets"] = [start, start + len(content)]
        entry["shape"] = entry["shape"] if shape is None else shape
        entry["dtype"] = entry["dtype"] if dtype is None else dtype

    def together(self, *, state=None, sign=True, align=4096, repeat=None):
        """The file again, as somebody who means harm would make it.

        Args:
            state: Text in place of the state.
            sign: Whether the checksums are made to agree.
            align: Data begin at a multiple of it; where it is 1, pages are copied out of the file instead of mapped.
            repeat: A key of the header that is written twice.
        """
        text = json.dumps(self.state) if state is None else state
        header = {**self.header, "__metadata__": {**self.header["__metadata__"], "state": text}}
        body = bytearray(self.body)
        if sign:
            pages = [name for name in header if name.endswith(".pages")]
            rest = zlib.crc32(text.encode("utf-8", "surrogatepass"))
            for name in sorted(set(header) - {"__metadata__", "checksums", *pages}):
                rest = zlib.crc32(body[slice(*header[name]["data_offsets"])], rest)
            sums = [zlib.crc32(body[slice(*header[f"store.{i}.pages"]["data_offsets"])]) for i in range(len(pages))]
            start, stop = header["checksums"]["data_offsets"]
            body[start:stop] = struct.pack(f"<{len(sums) + 1}q", *sums, rest)[: stop - start]
        encoded = json.dumps(header)
        if repeat is not None:
            encoded = encoded[:-1] + f", {json.dumps(repeat)}: {json.dumps(header[repeat])}}}"
        return raw(encoded.encode("utf-8", "surrogatepass"), bytes(body), align)


def raw(header, body=b"", align=1):
    """A file of this header."""
    header += b" " * (-(len(header) + 8) % align)
    return struct.pack("<Q", len(header)) + header + body


def places(value, path=()):
    """Every place in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def _flips(rng, whole, parts):
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    return bytes(data)


def _cuts(rng, whole, parts):
    at, to = sorted((rng.randrange(len(whole)), rng.randrange(len(whole))))
    how = rng.randrange(5)
    if how == 0:
        return whole[:at]
    if how == 1:
        return whole + bytes(rng.randrange(1, 9000))
    if how == 2:
        return whole[:at] + whole[to:]
    if how == 3:
        return whole[:at] + whole[at:to] * 2 + whole[to:]
    return whole[at:]


def _header_length(rng, whole, parts):
    old = struct.unpack("<Q", whole[:8])[0]
    new = rng.choice((0, 1, 2, old - 1, old + 1, old + 8, old - 8, len(whole), len(whole) - 8, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", max(new, 0)) + whole[8:]


def _change_integers(rng, parts, name, count):
    start, stop = parts.place(name)
    size = SIZES[parts.header[name]["dtype"]]
    for _ in range(count if stop > start else 0):
        at = start + size * rng.randrange((stop - start) // size)
        old = int.from_bytes(parts.body[at : at + size], "little", signed=True)
        new = rng.choice((*INTEGERS, old - 1, old + 1, old + 2, old * 2, -old))
        high = 2 ** (8 * size - 1)
        parts.body[at : at + size] = max(-high, min(high - 1, new)).to_bytes(size, "little", signed=True)


def _tables(rng, whole, parts):
    for _ in range(rng.choice((1, 1, 2, 3))):
        _change_integers(rng, parts, rng.choice(parts.names()), rng.choice((1, 1, 3)))
    return parts.together(align=rng.choice((4096, 1)))


def _pages(rng, whole, parts):
    """Codes, scales and fields of pages: random bytes, and numbers that are none."""
    name = rng.choice(parts.names(pages=True))
    start, stop = parts.place(name)
    if stop > start:
        first = rng.randrange(start, stop)
        last = min(stop, first + rng.choice((1, 2, 16, 400, 5000, stop - start)))
        fill = rng.choice(
            (b"\xff", b"\x00", b"\x7e\x00", b"\x00\x7e", b"\x00\x7c", b"\x00\x00\xc0\x7f", b"\x80\x7f", None)
        )
        size = last - first
        parts.body[first:last] = rng.randbytes(size) if fill is None else (fill * (size // len(fill) + 1))[:size]
    return parts.together(align=rng.choice((4096, 1)))


def _floats(rng, whole, parts):
    """Tails, means and losses that are no numbers."""
    names = [n for n in parts.names() if parts.header[n]["dtype"] in ("F32", "F16", "BF16", "I64")]
    name = rng.choice(names or parts.names())
    start, stop = parts.place(name)
    for _ in range(rng.choice((1, 4, 64)) if stop > start else 0):
        at = rng.randrange(start, stop) & ~3
        parts.body[at : min(at + 4, stop)] = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff" * 4))[
            : stop - at
        ]
    return parts.together()


def _header_fields(rng, whole, parts):
    name = rng.choice(sorted(set(parts.header) - {"__metadata__"}))
    entry = parts.header[name]
    how = rng.randrange(9)
    if how == 0:
        entry["dtype"] = rng.choice((*SIZES, "F64", "", None, 3))
    elif how == 1:
        shape = entry["shape"]
        entry["shape"] = rng.choice((shape[::-1], [*shape, 1], [0, *shape], [*shape[:-1], 2**62], [rng.choice(VALUES)]))
    elif how == 2:
        entry["data_offsets"] = [offset + rng.choice((-8, -1, 0, 1, 8, 2**62)) for offset in entry["data_offsets"]]
    elif how == 3:  # two tensors of the same bytes
        entry["data_offsets"] = list(parts.place(rng.choice(sorted(set(parts.header) - {"__metadata__"}))))
    elif how == 4:
        del parts.header[name]
    elif how == 5:
        others = ("x", "store.0.sums", "store.9.pages", "store.0.tail_keys", "padding", "distortion", "y" * 3000)
        parts.header[rng.choice(others)] = parts.header.pop(name)
    elif how == 6:
        parts.header[name] = rng.choice(VALUES)
    elif how == 7:
        return parts.together(repeat=name)
    else:
        key = rng.choice(sorted(parts.header["__metadata__"]))
        parts.header["__metadata__"][key] = rng.choice(VALUES)
    try:
        return parts.together()
    except (KeyError, TypeError, ValueError, struct.error):  # cannot be signed any more
        parts.header.setdefault("checksums", {"data_offsets": [0, 0]})
        if not isinstance(parts.header.get("__metadata__"), dict):
            parts.header["__metadata__"] = {}
        return parts.together(sign=False)


def _state_values(rng, whole, parts):
    parts.state["model"] = {**parts.state["model"], "config": {}}  # what is compared with the model is safe anyway
    for _ in range(rng.choice((1, 1, 1, 2))):
        path = rng.choice(list(places(parts.state)))
        target = parts.state
        for key in path[:-1]:
            target = target[key]
        old, how = target[path[-1]], rng.randrange(6)
        if how == 0:
            del target[path[-1]]
        elif how in (1, 2) and type(old) is int:
            target[path[-1]] = old + rng.choice((-1, 1, 2, 16, -16, old))
        elif how == 3 and isinstance(old, list):
            target[path[-1]] = rng.choice((old * 2, old[::-1], old[:-1]))
        else:
            target[path[-1]] = rng.choice(VALUES)
    return parts.together(align=rng.choice((4096, 1)))


def _state_text(rng, whole, parts):
    """JSON that is deep, giant, repeats its keys, or none at all."""
    text = json.dumps(parts.state)
    key, value = rng.choice(list(parts.state.items()))
    deep = rng.choice((10, 40, 2000, 200_000))
    many = rng.choice((10, 3000, 60_000, 400_000))
    text = rng.choice(
        (
            lambda: text[:-1] + f", {json.dumps(key)}: {json.dumps(value)}}}",
            lambda: text[:-1] + f', "x": {"[" * deep}{"]" * deep}}}',
            lambda: text[:-1] + f', "x": {"[" * deep}}}',
            lambda: text[:-1] + f', "x": {chr(123)}"a":' * min(deep, 2000) + "0" + "}" * min(deep, 2000),
            lambda: text[:-1] + f', "x": [{",".join(["[]"] * many)}]}}',
            lambda: text[:-1] + f', "x": {"9" * many}}}',
            lambda: text[:-1] + f', "x": "{chr(0x1F600) * (many // 4)}"}}',
            lambda: text[:-1] + f', "x": "{chr(92) * 2 * many}"}}',
            lambda: text[: rng.randrange(len(text))],
            lambda: text.replace('"', "'"),
            lambda: text.replace(":", rng.choice((",", "::", "")), 1),
        )
    )()
    return parts.together(state=text)


def _giant_headers(rng, whole, parts):
    """Headers that take much longer to parse than to send."""
    many = rng.choice((1000, 40_000, 300_000, 600_000))
    empty = '{"dtype":"I32","shape":[0],"data_offsets":[0,0]}'
    return rng.choice(
        (
            lambda: raw(b"[" + b"[]," * many + b"[]]"),
            lambda: raw(b"[" * many),
            lambda: raw(b'{"a":' * many + b"0" + b"}" * many),
            lambda: raw(b"{" + b",".join(b'"%d":0' % i for i in range(many)) + b"}"),
            lambda: raw(b"{" + b",".join(b'"%d":%s' % (i, empty.encode()) for i in range(many // 10)) + b"}"),
            lambda: raw(b'{"a":' + b"9" * many + b"}"),
            lambda: raw(b'{"a":"' + "\U0001f600".encode() * (many // 4) + b'"}'),
            lambda: raw(b'{"__metadata__":{"format":"kvcompress_hf.cache","state":"' + b"\\u0000" * many + b'"}}'),
            lambda: raw("[1]".encode("utf-16")),
            lambda: raw(rng.randbytes(many // 100)),
        )
    )()


def _claims(rng, whole, parts):
    """Numbers that ask for memory or work that no bytes of the file stand for, and agree with each other."""
    state, big = parts.state, rng.choice((5000, 2**20, 2**27, 2**31 - 1))
    store = rng.choice(state["stores"])
    how = rng.randrange(11)
    if how == 0:
        state["seen"] = big
    elif how == 1:
        state["seen"], store["tail_capacity"] = big, 2 * (big + 1)
    elif how == 2:
        state["seen"], state["tail_used"] = big, [big] * len(state["tail_used"])
    elif how == 3:
        state["recipes"] = state["recipes"] * rng.choice((2, 3, 500, 20_000))
    elif how == 4:
        for recipe in state["recipes"]:
            for part in ("observer", "protect", "when", "plan"):
                numbers = [k for k, v in (recipe.get(part) or {}).items() if type(v) in (int, float)]
                if numbers:
                    recipe[part][rng.choice(numbers)] = rng.choice((big, big | 1, -big, 10**300))
    elif how == 5:
        state["stores"] = state["stores"] * rng.choice((2, 100, 5000))
    elif how == 6:
        for key in ("kv_heads", "head_dim"):
            store[key] = rng.choice((store[key] * 2, max(1, store[key] // 2), 65536))
    elif how == 7:
        state["batch"] = rng.choice((big, 1, 2, 4))
    elif how == 8:
        for recipe in state["recipes"]:
            recipe.update(positions="reindexed", tiers=["native"], centre_keys=None)
    elif how == 9:
        store["page_bytes"] = big
        state["recipes"][0]["page_bytes"] = big
    else:
        state["groups"] = [rng.choice((1, 2, 65536, 65537))] * len(state["groups"])
        state["prompt_tokens"] = big
    return parts.together()


def _large_tensors(rng, whole, parts):
    """Megabytes in a tensor that should be small."""
    name = rng.choice([*parts.names(), "model.weights", "checksums"])
    entry = parts.header[name]
    size, shape = SIZES[entry["dtype"]], list(entry["shape"])
    rest = 1
    for each in shape[:-1]:
        rest *= max(each, 1)
    last = rng.choice((2**16, 2**18, 2**20)) // (rest * size) + 1
    content = bytes(rest * last * size) if rng.random() < 0.5 else b"\x01" * (rest * last * size)
    parts.replace(name, content, [max(each, 1) for each in shape[:-1]] + [last])
    return parts.together()


def _swaps(rng, whole, parts):
    """The content of one tensor under the name of another, and stores in another order."""
    a, b = rng.sample(sorted(set(parts.header) - {"__metadata__"}), 2)
    parts.header[a], parts.header[b] = parts.header[b], parts.header[a]
    if rng.random() < 0.5:
        parts.state["stores"].reverse()
    return parts.together(align=rng.choice((4096, 1)))


#: Ways to change a file, by name: from a source of chance, the whole file and its parts to bytes.
KINDS = {
    "flipped bytes": _flips,
    "cut, doubled, longer": _cuts,
    "header length": _header_length,
    "header fields": _header_fields,
    "state values": _state_values,
    "state text": _state_text,
    "giant headers": _giant_headers,
    "lengths, page ids, positions": _tables,
    "page contents": _pages,
    "numbers that are none": _floats,
    "unbacked claims": _claims,
    "large tensors": _large_tensors,
    "swapped tensors": _swaps,
}
_NEED_STORES = (
    "lengths, page ids, positions",
    "page contents",
    "numbers that are none",
    "unbacked claims",
    "large tensors",
    "swapped tensors",
)
_WEIGHTS = (6, 4, 2, 14, 18, 4, 1, 18, 10, 6, 10, 2, 5)


def mutate(files, seed, index):
    """The mutation of this number.

    Args:
        files (`dict[str, bytes]`): Good files by name.
        seed (`int`): Of the run.
        index (`int`): Number of the mutation.

    Returns:
        `tuple[str, str, bytes]`: Its kind, the name of the file it is made from, and the bytes.
    """
    rng = random.Random(f"{seed}:{index}")
    kind = rng.choices(list(KINDS), _WEIGHTS)[0]
    name = rng.choice(sorted(files))
    parts = Parts(files[name])
    if not parts.state["stores"] and kind in _NEED_STORES:  # an empty cache
        kind = "state values"
    return kind, name, KINDS[kind](rng, files[name], parts)
