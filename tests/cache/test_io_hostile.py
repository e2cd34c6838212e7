"""Files that are damaged or made to do harm: a clear error, or a cache that is safe to use."""

import copy
import json
import struct
import zlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM

import kvcompress_hf as kvc

QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def model():
    """One layer with a window and one without, so that there are two stores."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        eos_token_id=None,
        initializer_range=0.2,
    )
    return kvc.patch(Gemma2ForCausalLM(config).eval(), "lossless")


def tokens(batch, count, seed=0):
    return torch.randint(3, 96, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def feed(model, cache, ids, mask=None):
    return model(ids, past_key_values=cache, attention_mask=mask, use_cache=True).logits


class Data(bytes):
    """A file's bytes; failures shall not print them."""

    def __repr__(self):
        return f"<{len(self)} bytes>"


@pytest.fixture(scope="module", params=["auto", "roco"])
def whole(request, model, tmp_path_factory):
    """The bytes of a file with two stores, a tail, padding, statistics, shared pages; with `auto` several tiers."""
    cache = kvc.CompressedPagedCache(model.config, request.param)
    cache.belongs_to(model)
    ids, mask = tokens(2, 220), torch.ones(2, 220, dtype=torch.long)
    mask[1, :13] = 0
    feed(model, cache, ids[:, :210], mask[:, :210])
    for i in range(210, 220):
        feed(model, cache, ids[:, i : i + 1], mask[:, : i + 1])
    cache.batch_select_indices(torch.tensor([0, 1, 0]))
    path = tmp_path_factory.mktemp("file") / "cache"
    cache.save(path)
    return Data(path.read_bytes())


def take_apart(data):
    """Header, its parsed state, and the tensors' bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    state = json.loads(header["__metadata__"]["state"])
    body = bytearray(data[8 + length :])
    return header, state, body


def put_together(header, state, body, sign=True, start=4096):
    """The file again, with checksums that agree, as somebody who means harm would make it.

    Where data do not begin at a multiple of 64, pages are copied out of the file instead of mapped.
    """
    header = copy.deepcopy(header)
    text = header["__metadata__"]["state"] = state if isinstance(state, str) else json.dumps(state)

    def part(name):
        start, stop = header[name]["data_offsets"]
        return bytes(body[start:stop])

    if sign:
        pages = [name for name in header if name.endswith(".pages")]
        rest = zlib.crc32(text.encode())
        for name in sorted(set(header) - {"__metadata__", "checksums", *pages}):
            rest = zlib.crc32(part(name), rest)
        sums = [zlib.crc32(part(f"store.{i}.pages")) for i in range(len(pages))]
        start, stop = header["checksums"]["data_offsets"]
        body = bytearray(body)
        body[start:stop] = struct.pack(f"<{len(sums) + 1}q", *sums, rest)[: stop - start]
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(len(encoded) + 8) % start)
    return struct.pack("<Q", len(encoded)) + encoded + bytes(body)


def load_and_use(model, data, folder):
    """Loads, and where that is not refused does everything that reads pages, tables and fields."""
    path = folder / "mutated"
    path.write_bytes(data)
    try:
        cache = kvc.CompressedPagedCache.load(path, model)
        cache.rows()
    except kvc.CacheFormatError as error:
        assert str(path) in str(error) and len(str(error)) < 1000 + len(str(path))
        return False
    batch = max(cache.batch_size, 1)
    for store in cache.inspect().stores:
        ids = store.live_ids()
        assert not ids.numel() or (int(ids.min()) >= 0 and bool((store.arena.references[ids.long()] > 0).all()))
        assert int(store.lengths.min()) >= 0
    assert cache.memory().total >= 0 and repr(cache)
    fork = cache.fork()
    for _ in range(2):
        feed(model, fork, tokens(batch, 1))
    feed(model, cache, tokens(batch, 40))
    for step in range(2):
        feed(model, cache, tokens(batch, 1, seed=step))
    cache.reorder_cache(torch.arange(batch).flip(0))
    if cache.is_recording_past(0):
        cache.stop_past_recording()
    cache.save(path)
    assert kvc.CompressedPagedCache.load(path, model).get_seq_length() == cache.get_seq_length()
    return True


def test_the_harness_itself_makes_a_good_file(model, whole, tmp_path):
    assert load_and_use(model, whole, tmp_path)
    for start in (4096, 1):
        assert load_and_use(model, put_together(*take_apart(whole), start=start), tmp_path)


@QUICK
@given(data=st.data())
def test_flipped_bytes(model, whole, data, tmp_path_factory):
    """Damage by accident: whatever byte it hits, it is noticed, at the latest when the pages are read."""
    mutated = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    if load_and_use(model, mutated, tmp_path_factory.mktemp("flip")):
        # Blanks between the header's values, or names in it that nobody reads.
        length = struct.unpack("<Q", whole[:8])[0]
        assert mutated[8 + length :] == whole[8 + length :]


@QUICK
@given(data=st.data())
def test_cut_off_or_longer_files(model, whole, data, tmp_path_factory):
    size = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 4200))
    folder = tmp_path_factory.mktemp("cut")
    assert not load_and_use(model, whole[:size], folder)
    assert not load_and_use(model, whole + bytes(size + 1), folder)
    assert not load_and_use(model, whole[size:], folder) or size == 0


INTERESTING = st.sampled_from([0, 1, 2, 3, -1, 127, 2**15, 2**24, 2**31 - 1, -(2**31), 2**30])


@QUICK
@given(data=st.data())
def test_tables_and_lengths_with_a_right_checksum(model, whole, data, tmp_path_factory):
    header, state, body = take_apart(whole)
    names = [n for n in header if not n.endswith(".pages") and n not in ("__metadata__", "checksums", "model.weights")]
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(names))
        start, stop = header[name]["data_offsets"]
        size = 8 if header[name]["dtype"] == "I64" else 4
        if start == stop:
            continue
        at = start + size * data.draw(st.integers(0, (stop - start) // size - 1))
        old = int.from_bytes(body[at : at + size], "little", signed=True)
        new = data.draw(INTERESTING | st.integers(old - 2, old + 2))
        new = max(-(2 ** (8 * size - 1)), min(2 ** (8 * size - 1) - 1, new))
        body[at : at + size] = new.to_bytes(size, "little", signed=True)
    load_and_use(model, put_together(header, state, body), tmp_path_factory.mktemp("table"))


VALUES = st.sampled_from(
    [
        None,
        True,
        False,
        "",
        "auto",
        -1,
        0,
        1,
        2,
        3,
        7,
        64,
        2**31 - 1,
        2**62,
        2**63,
        10**400,
        0.5,
        float("nan"),
        [],
        {},
        [0],
    ]
)


def places(value, path=()):
    """Every place in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@QUICK
@given(data=st.data())
def test_descriptions_with_a_right_checksum(model, whole, data, tmp_path_factory):
    header, state, body = take_apart(whole)
    state["model"] = {**state["model"], "config": {}}  # what is compared with the model is safe anyway
    path = data.draw(st.sampled_from(sorted(places(state), key=str)))
    target = state
    for key in path[:-1]:
        target = target[key]
    old = target[path[-1]]
    how = data.draw(st.sampled_from(["replace", "nudge", "remove", "repeat"]))
    if how == "remove":
        del target[path[-1]]
    elif how == "nudge" and type(old) is int:
        target[path[-1]] = old + data.draw(st.sampled_from([-1, 1, 16, -16]))
    elif how == "repeat" and isinstance(old, list):
        target[path[-1]] = old * 2
    else:
        target[path[-1]] = data.draw(VALUES)
    load_and_use(model, put_together(header, state, body, start=1), tmp_path_factory.mktemp("state"))


@QUICK
@given(data=st.data())
def test_headers(model, whole, data, tmp_path_factory):
    header, state, body = take_apart(whole)
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    entry = header[name]
    how = data.draw(st.sampled_from(["dtype", "shape", "offset", "remove", "rename", "value"]))
    if how == "dtype":
        entry["dtype"] = data.draw(st.sampled_from(["U8", "I32", "I64", "F32", "F16", "BF16", "F64", "", None, 3]))
    elif how == "shape":
        entry["shape"] = data.draw(
            st.lists(st.sampled_from([0, 1, 2, 3, -1, 2**31, 2**62, 2**64, True, None, "1"]), max_size=9)
        )
    elif how == "offset":
        entry["data_offsets"] = data.draw(st.lists(st.integers(-9, len(body) + 9), max_size=3))
    elif how == "remove":
        del header[name]
    elif how == "rename":
        header[data.draw(st.sampled_from(["x", "store.0.sums", "store.9.pages", "padding", "distortion"]))] = (
            header.pop(name)
        )
    else:
        header[name] = data.draw(VALUES)
    try:
        made = put_together(header, state, body)
    except (KeyError, TypeError, ValueError, struct.error):  # cannot be signed any more
        header.setdefault("checksums", {"data_offsets": [0, 0]})
        made = put_together(header, state, body, sign=False)
    load_and_use(model, made, tmp_path_factory.mktemp("header"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, s: h["__metadata__"].update(format="other"), "its format is 'other'"),
        (lambda h, s: h["__metadata__"].update(format_version="4"), "version is '4', but this package reads 1, 2, 3;"),
        (
            lambda h, s: (h["__metadata__"].update(format_version="2"), s["stores"][0].pop("rotates_values", None)),
            "rotates_values is None, not true or false",
        ),
        (lambda h, s: s.update(byteorder="big"), "byte order 'big'"),
        (lambda h, s: s["recipes"][0].update(observer={"kind": "nobody"}), "Unknown kind 'nobody'"),
        (lambda h, s: s["stores"][0].update(order="mma"), "in the order 'mma'"),
        (lambda h, s: s["stores"][0].update(dtype="float16"), "of dtype|is torch.float32|where the recipe makes"),
        (lambda h, s: s["stores"][1].update(layers=[0]), "do not all attend alike|a layer in two stores"),
        (lambda h, s: s.update(seen=100), "more than the 100 tokens seen|would hold|not an integer"),
        (lambda h, s: s["stores"][0].update(kv_heads=1), "its layers have 2 KV heads, not 1"),
        (lambda h, s: s["stores"][1].update(kv_heads=4, head_dim=8), "its heads have 16 channels, not 8"),
        (lambda h, s: s["stores"][0].update(head_dim=32), "its heads have 16 channels, not 32"),
        (lambda h, s: s.update(recipes=s["recipes"] * 2), "2 recipes for 3 sequences"),
        (lambda h, s: s.update(recipes=[]), "recipes is empty"),
        (lambda h, s: s["recipes"][0].update(page_bytes=2**30), "page_bytes is 1073741824"),
        (lambda h, s: s["recipes"][0].update(page_bytes=64000), "where the recipe makes 64000"),
        (lambda h, s: s["stores"][0].update(page_bytes=64), "there are no such pages"),
        (lambda h, s: s["stores"][0].update(page_bytes=64001), "there are no such pages"),
        (lambda h, s: s["stores"][0].update(page_bytes=64000), r"pages.*64000"),
        (lambda h, s: s["recipes"][0].update(budget="2097152TiB"), "its budget is 2097152TiB"),
        (lambda h, s: s["recipes"][0]["protect"].update(sinks=2**40), "numbers beyond 32 bits"),
    ],
)
def test_the_reason_is_named(model, whole, change, message, tmp_path):
    header, state, body = take_apart(whole)
    change(header, state)
    (tmp_path / "cache").write_bytes(put_together(header, state, body))
    with pytest.raises(kvc.CacheFormatError, match=message):
        kvc.CompressedPagedCache.load(tmp_path / "cache", model)


def test_a_file_without_some_of_the_layers_is_refused(model, tmp_path):
    """As of a model of fewer layers, or another rank of a pipeline."""
    cache = kvc.CompressedPagedCache(model.config, "lossless")
    keys = torch.randn(1, 2, 40, 16)
    cache.attend(0, keys, keys, keys, None, scaling=0.25, dense=lambda: keys.transpose(1, 2))
    cache.save(tmp_path / "cache")  # whose keys these are is not known, so nothing is compared
    with pytest.raises(kvc.CacheFormatError, match=r"it has layers \[1\] as well"):
        kvc.CompressedPagedCache.load(tmp_path / "cache", model)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("store.1.table.0", [10**6], "page numbers outside"),
        ("store.1.table.0", [-1], "page numbers outside"),
        ("store.1.table.0", [1, 1], "pages that no table names|two different places"),
        ("store.1.lengths", [2**31 - 1], "slots in a row"),
        ("store.1.lengths", [-5], "negative lengths"),
        ("store.1.tail_lengths", [1000], "a tail is longer"),
        ("store.1.tail_positions", [-7], "positions in the tail"),
        ("padding", [-3], "padding is not between"),
    ],
)
def test_each_check_of_the_tables_fires(model, whole, name, values, message, tmp_path):
    header, state, body = take_apart(whole)
    start, _ = header[name]["data_offsets"]
    size = 8 if header[name]["dtype"] == "I64" else 4
    for i, value in enumerate(values):
        body[start + i * size : start + (i + 1) * size] = value.to_bytes(size, "little", signed=True)
    (tmp_path / "cache").write_bytes(put_together(header, state, body))
    with pytest.raises(kvc.CacheFormatError, match=message):
        kvc.CompressedPagedCache.load(tmp_path / "cache", model)


def test_damaged_pages_are_refused_before_they_are_used(model, whole, tmp_path):
    header, state, body = take_apart(whole)
    body[header["store.0.pages"]["data_offsets"][0] + 100] ^= 1
    path = tmp_path / "cache"
    path.write_bytes(put_together(header, state, body, sign=False))
    cache = kvc.CompressedPagedCache.load(path, model)
    fork = cache.fork()
    for use in (
        lambda: feed(model, cache, tokens(3, 1)),
        lambda: feed(model, fork, tokens(3, 2)),
        lambda: cache.save(tmp_path / "other"),
        cache.rows,
    ):
        with pytest.raises(kvc.CacheFormatError, match="its pages are damaged"):
            use()
    assert not (tmp_path / "other").exists()


def test_what_is_no_cache_file_at_all(model, tmp_path):
    path = tmp_path / "cache"
    for content in (
        b"",
        b"x",
        bytes(8),
        bytes(100),
        b"\xff" * 100,
        b"{}" * 60,
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 30) + b'{"a":1,"a":2}'.ljust(30),
        struct.pack("<Q", 40) + b'{"__metadata__":{"format":3}}'.ljust(40),
    ):
        path.write_bytes(content)
        with pytest.raises(kvc.CacheFormatError, match="is not a valid cache file"):
            kvc.CompressedPagedCache.load(path, model)
    model.save_pretrained(tmp_path)
    with pytest.raises(kvc.CacheFormatError, match="its format is None|its format is 'pt'"):
        kvc.CompressedPagedCache.load(tmp_path / "model.safetensors", model)
