"""ctypes mirrors of the argument structs in `include/abi.h`. `library.load_library` checks their sizes."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

MAX_TIERS = 4
MAX_FIELDS = 4
FEEDBACK_RANK = 4

KVC_OK, KVC_BAD_ARGUMENT, KVC_TAIL_FULL, KVC_NO_ISA, KVC_BAD_PAGE, KVC_NO_MEMORY = range(6)
LARGEST = 5  # in KvcScores.powers: the sums take the largest probability instead


def _fields(**groups: str) -> list[tuple[str, type]]:
    """`[(name, type)]` in order; group names are a C type, with a number to keep them apart."""
    types = {"ptr": c_void_p, "i64": c_int64, "i32": c_int32, "f32": c_float}
    return [(name, types[group.split("_")[0]]) for group, names in groups.items() for name in names.split()]


class KvcTier(Structure):
    _fields_ = _fields(
        i32="key_bits value_bits rotate_keys slots", i64="keys key_params values value_params fields used"
    )


class KvcLayout(Structure):
    _fields_ = [
        *_fields(i32="head_dim dtype n_tiers n_fields", i64="page_bytes", i32_b="rotation_block resting"),
        ("tier", KvcTier * MAX_TIERS),
    ]


class KvcRows(Structure):
    _fields_ = [
        *_fields(ptr="layout slabs", i32="slab_shift rows"),
        ("table", c_void_p * MAX_TIERS),
        ("table_stride", c_int64 * MAX_TIERS),
        ("length", c_void_p * MAX_TIERS),
        *_fields(ptr="slab_pages key_feedback evicted_means evicted_counts", i32="n_slabs reserved"),
    ]


class KvcTail(Structure):
    _fields_ = _fields(ptr="k v length position fields", i64="capacity")


class KvcAppend(Structure):
    _fields_ = [
        ("tail", KvcTail),
        *_fields(
            ptr="k v",
            i64="k_b k_h k_t v_b v_h v_t",
            ptr_b="valid",
            i32="position batch kv_heads n_k head_dim dtype n_fields reserved",
        ),
    ]


class KvcDecode(Structure):
    _fields_ = [
        ("rows", KvcRows),
        ("tail", KvcTail),
        *_fields(
            ptr="q k v",
            i64="q_b q_h k_b k_h v_b v_h",
            ptr_b="out",
            i64_b="out_b out_h",
            ptr_c="sinks valid key_shift",
            f32="scale softcap",
            i32="window position_field position batch kv_heads group append sum_field square_field rotates_values",
        ),
    ]


class KvcChunk(Structure):
    _fields_ = [
        ("rows", KvcRows),
        ("tail", KvcTail),
        *_fields(
            ptr="q k v",
            i64="q_b q_h q_t k_b k_h k_t v_b v_h v_t",
            ptr_b="out",
            i64_b="out_b out_h out_t",
            ptr_c="lse allowed bias sinks",
            f32="scale softcap",
            i32="window position_field position key_position batch kv_heads group n_q n_k",
        ),
    ]


class KvcSums(Structure):
    _fields_ = [("past", c_void_p * MAX_TIERS), *_fields(ptr="tail fresh")]


class KvcScores(Structure):
    _fields_ = [
        ("rows", KvcRows),
        ("tail", KvcTail),
        *_fields(ptr="q k", i64="q_b q_h q_t k_b k_h k_t", ptr_b="query_valid key_valid"),
        ("sum", KvcSums),
        ("square", KvcSums),
        ("past_stride", c_int64 * MAX_TIERS),
        *_fields(
            ptr="sinks",
            f32="scale softcap",
            i32="window position_field position key_position exclude powers batch kv_heads group n_q n_k",
        ),
    ]


class KvcNonCausal(Structure):
    _fields_ = _fields(
        ptr="q k",
        i64="q_b q_h q_t k_b k_h k_t",
        ptr_b="valid inv_freq sinks scores",
        f32="scale softcap",
        i32="pairs start interleaved dtype head_dim batch kv_heads group n reserved",
    )


class KvcLinear(Structure):
    _fields_ = _fields(
        ptr="x weight bias out", i64="x_stride weight_stride out_stride", i32="rows in_features out_features dtype"
    )


class KvcPack(Structure):
    _fields_ = [
        ("rows", KvcRows),
        *_fields(
            i32="tier batch kv_heads n_fields",
            ptr="k v",
            i64="k_b k_h k_t v_b v_h v_t",
            ptr_b="index",
            i64_b="index_b index_h",
            ptr_c="count",
            i64_c="count_b count_h",
        ),
        ("field", c_void_p * MAX_FIELDS),
        ("field_b", c_int64 * MAX_FIELDS),
        ("field_h", c_int64 * MAX_FIELDS),
        *_fields(i32="overflow reserved"),
    ]


class KvcMove(Structure):
    _fields_ = [("rows", KvcRows), *_fields(i32="tier n", ptr="row dst src")]


class KvcRetier(Structure):
    _fields_ = [("rows", KvcRows), *_fields(i32="src_tier dst_tier n overflow", ptr="row dst src")]


class KvcFields(Structure):
    _fields_ = [("rows", KvcRows), *_fields(i32="tier field write reserved", ptr="values", i64="stride")]


class KvcDense(Structure):
    _fields_ = [("rows", KvcRows), *_fields(i32="tier reserved", ptr="k v", i64="stride")]


class KvcSlotSums(Structure):
    _fields_ = [("rows", KvcRows), *_fields(i32="tier reserved", ptr="chosen sums", i64="stride")]


class KvcHadamard(Structure):
    _fields_ = _fields(ptr="x", i64="x_b x_h x_t", ptr_b="out", i32="batch outer inner head_dim block dtype")


class KvcConvert(Structure):
    _fields_ = _fields(ptr="layout from_pages to_pages", i32="tier n to_canonical reserved")


class KvcGather(Structure):
    _fields_ = [
        ("rows", KvcRows),
        *_fields(ptr="values place", i64="width values_l values_b values_h", i32="tier field batch kv_heads"),
    ]


class KvcLowest(Structure):
    _fields_ = _fields(ptr="scores positions candidates count chosen", i64="rows slots")


class KvcPrices(Structure):
    _fields_ = _fields(ptr="scores candidates first step price", i64="rows slots pages")


class KvcHoles(Structure):
    _fields_ = _fields(ptr="marks before kept row hole mover", i64="rows slots room found", i32="gone reserved")


class KvcPlaces(Structure):
    _fields_ = _fields(ptr="marks length count row slot rank", i64="rows slots room found", i32="wanted reserved")


class KvcTally(Structure):
    _fields_ = _fields(ptr="targets filled begin out counts", i64="rows slots", i32="batch tiers")


class KvcShares(Structure):
    _fields_ = _fields(
        ptr="importance filled protects tier_of slots_per_page page_bytes allowed room steps hull_tier offset targets",
        i64="batch rows slots",
        i32="tiers shift guesses reserved",
    )


class KvcKeyShift(Structure):
    _fields_ = _fields(
        ptr="k q",
        i64="k_b k_h k_t q_b q_h q_t",
        ptr_b="valid shift",
        f32="most",
        i32="bits dtype head_dim batch kv_heads group n n_q reserved",
    )


class KvcTierLosses(Structure):
    _fields_ = [
        *_fields(ptr="k v q", i64="k_b k_h k_t v_b v_h v_t q_b q_h q_t", ptr_b="count loss"),
        ("key_bits", c_int32 * MAX_TIERS),
        ("value_bits", c_int32 * MAX_TIERS),
        *_fields(f32="scale", i32="tiers dtype head_dim batch kv_heads group n"),
    ]


class KvcFitMaps(Structure):
    _fields_ = _fields(
        ptr="k q",
        i64="k_b k_h k_t q_b q_h q_t",
        ptr_b="inv_freq mapping offset explained",
        f32="ridge gain",
        i32="pairs start interleaved dtype head_dim batch kv_heads group n step apart reserved",
    )


class KvcForesee(Structure):
    _fields_ = _fields(
        ptr="k",
        i64="k_b k_h k_t",
        ptr_b="mapping offset inv_freq out",
        i32="pairs start interleaved dtype head_dim batch kv_heads group n reserved",
    )


OPERATIONS: dict[str, type[Structure]] = {
    "append": KvcAppend,
    "pack": KvcPack,
    "move": KvcMove,
    "retier": KvcRetier,
    "fields": KvcFields,
    "dense": KvcDense,
    "slot_sums": KvcSlotSums,
    "hadamard": KvcHadamard,
    "convert": KvcConvert,
    "decode": KvcDecode,
    "chunk": KvcChunk,
    "scores": KvcScores,
    "non_causal": KvcNonCausal,
    "linear": KvcLinear,
    "gather": KvcGather,
    "lowest": KvcLowest,
    "prices": KvcPrices,
    "holes": KvcHoles,
    "places": KvcPlaces,
    "tally": KvcTally,
    "shares": KvcShares,
    "key_shift": KvcKeyShift,
    "tier_losses": KvcTierLosses,
    "fit_maps": KvcFitMaps,
    "foresee": KvcForesee,
}


def declare(library: ctypes.CDLL) -> None:
    """Declares the exported functions and checks that both sides agree on every struct.

    Args:
        library: The loaded library.

    Raises:
        ImportError: The library was built from other sources than this package.
    """
    library.kvc_layout.argtypes = [c_void_p]
    library.kvc_isa_name.restype = ctypes.c_char_p
    library.kvc_sizeof.restype = c_int64
    library.kvc_sizeof.argtypes = [ctypes.c_char_p]
    structs: dict[str, type[Structure]] = {"layout": KvcLayout, **OPERATIONS}
    for name, struct in structs.items():
        if library.kvc_sizeof(name.encode()) != ctypes.sizeof(struct):
            raise ImportError(
                f"the native library does not match this package (arguments of {name!r}): reinstall kvcompress_hf"
            )
    for name in OPERATIONS:
        getattr(library, f"kvc_{name}").argtypes = [ctypes.c_int, c_void_p]
