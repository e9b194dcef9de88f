"""The structures and functions of the C++ side, for ctypes. B queries, N items, M candidates, P pairs, D width."""

from ctypes import POINTER, c_double, c_float, c_int, c_int64, c_void_p

from pipeline.native.interface import Functions, Struct


class Model(Struct):
    """`Model` of mol.h."""

    _fields_ = (
        ("query_components", c_int),
        ("item_components", c_int),
        ("width", c_int),
        ("hidden", c_int),
        ("in_weight", c_void_p),
        ("in_bias", c_void_p),
        ("out_weight", c_void_p),
        ("out_bias", c_void_p),
        ("is_pair", c_void_p),
        ("scale", c_double),
    )


class Items(Struct):
    """`Items` of items.h."""

    _fields_ = (
        ("high", c_void_p),
        ("low", c_void_p),
        ("num_items", c_int64),
        ("stride", c_int64),
        ("width", c_int),
    )


class Queries(Struct):
    """`Queries` of stage2.cpp."""

    _fields_ = (("components", c_void_p), ("gates", c_void_p), ("num_queries", c_int64))


class Table(Struct):
    """`Table` of stage1.cpp."""

    _fields_ = (
        ("groups", c_void_p),
        ("starts", c_void_p),
        ("num_items", c_int64),
        ("num_groups", c_int),
        ("dtype", c_int),
    )


class Vectors(Struct):
    """`Vectors` of stage1.cpp."""

    _fields_ = (
        ("rows", c_void_p),
        ("num_queries", c_int64),
        ("dim", c_int),
        ("scales", c_void_p),
        ("factors", c_void_p),
    )


class Mask(Struct):
    """`Mask` of reservoir.h."""

    _fields_ = (("allowed", c_void_p), ("offsets", c_void_p), ("excluded", c_void_p))


class Limits(Struct):
    """`Limits` of stage2.cpp."""

    _fields_ = (("floors", c_void_p), ("margins", c_void_p), ("max_scored", c_int64))


class Best(Struct):
    """`Best` of reservoir.h."""

    _fields_ = (("scores", c_void_p), ("items", c_void_p), ("num_kept", c_int))


# Each function's result and arguments; `threads` is a number of threads.
_threads, _pointer = c_int, c_void_p
FUNCTIONS: Functions = {
    "nr_rows": (c_int, ()),
    "nr_num_blocks": (c_int64, (c_int64,)),
    "nr_pack_table": (None, (_pointer, c_int, c_float, POINTER(Table), _pointer, _pointer)),
    "nr_stage1": (None, (POINTER(Vectors), POINTER(Table), POINTER(Mask), _threads, POINTER(Best))),
    "nr_score_pairs": (
        None,
        (POINTER(Model), POINTER(Items), POINTER(Queries), _pointer, c_int64, c_int, _threads, _pointer),
    ),
    "nr_scan": (
        None,
        (
            *(POINTER(kind) for kind in (Model, Items, Queries, Mask, Limits)),
            _threads,
            POINTER(Best),
            _pointer,
        ),
    ),
}
