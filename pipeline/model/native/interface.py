"""The structures and functions of training.cpp, for ctypes."""

from ctypes import POINTER, c_float, c_int, c_int64, c_uint64, c_void_p

from pipeline.native.interface import Functions, Struct


class StepSizes(Struct):
    """`StepSizes` of training.cpp."""

    _fields_ = (
        ("query_components", c_int),
        ("item_components", c_int),
        ("width", c_int),
        ("hidden", c_int),
        ("negatives", c_int),
        ("num_groups", c_int64),
        ("group_size", c_int64),
        ("scale", c_float),
        ("num_dropped", c_int),
        ("seed", c_uint64),
    )


class StepInputs(Struct):
    """`StepInputs` of training.cpp."""

    _fields_ = (
        ("query_components", c_void_p),
        ("query_gates", c_void_p),
        ("positives", c_void_p),
        ("weights", c_void_p),
        ("item_components", c_void_p),
        ("item_gates", c_void_p),
        ("corrections", c_void_p),
        ("is_left_out", c_void_p),
        ("in_weight", c_void_p),
        ("in_bias", c_void_p),
        ("out_weight", c_void_p),
        ("out_bias", c_void_p),
    )


class StepOutputs(Struct):
    """`StepOutputs` of training.cpp."""

    _fields_ = (
        ("losses", c_void_p),
        ("query_components", c_void_p),
        ("query_gates", c_void_p),
        ("positives", c_void_p),
        ("item_components", c_void_p),
        ("item_gates", c_void_p),
        ("in_weight", c_void_p),
        ("in_bias", c_void_p),
        ("out_weight", c_void_p),
        ("out_bias", c_void_p),
    )


FUNCTIONS: Functions = {
    "nr_train_pairs": (None, (POINTER(StepSizes), POINTER(StepInputs), POINTER(StepOutputs), c_int)),
    "nr_gate_masks": (None, (POINTER(StepSizes), c_void_p)),
}
