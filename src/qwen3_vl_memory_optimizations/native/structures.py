"""The structures of `core/core.h`, field by field."""

from __future__ import annotations

import ctypes

_POINTER, _NUMBER, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


INT8_ROWS, INT4_ROWS, BF16_ROWS, FP16_ROWS = range(4)
"""Values of `Weight.format`."""


class Weight(ctypes.Structure):
    """Rows of a weight; `signs` is set if they are rotated in blocks of `block` columns, `tables` for 4 bits."""

    _fields_ = [
        ("data", _POINTER),
        ("scale", _POINTER),
        ("signs", _POINTER),
        ("block", _NUMBER),
        ("rows", _NUMBER),
        ("columns", _NUMBER),
        ("tables", _POINTER),
        ("format", _NUMBER),
    ]


class Encoding(ctypes.Structure):
    """Values to write as 4-bit rows (`qm_encoding`)."""

    _fields_ = [
        ("values", _POINTER),
        ("rows", _NUMBER),
        ("columns", _NUMBER),
        ("tables", _POINTER),
        ("errors", _POINTER),
        ("nearest", _POINTER),
        ("data", _POINTER),
        ("products", _POINTER),
    ]


class Compensation(ctypes.Structure):
    """64 columns of rows to encode, with feedback of errors (`qm_compensation`)."""

    _fields_ = [
        ("targets", _POINTER),
        ("stride", _NUMBER),
        ("fed_back", _POINTER),
        ("rows", _NUMBER),
        ("feedback", _POINTER),
        ("importance", _POINTER),
        ("tables", _POINTER),
        ("errors", _POINTER),
        ("nearest", _POINTER),
        ("numbers", _POINTER),
        ("codes", _POINTER),
        ("row_bytes", _NUMBER),
    ]


class LayerStart(ctypes.Structure):
    """What comes before attention (`qm_layer_start`)."""

    _fields_ = [
        ("hidden", _POINTER),
        ("dtype", _NUMBER),
        ("sequences", _NUMBER),
        ("length", _NUMBER),
        ("columns", _NUMBER),
        ("norm", _POINTER),
        ("weight", Weight),
        ("query_heads", _NUMBER),
        ("key_heads", _NUMBER),
        ("head_size", _NUMBER),
        ("query_norm", _POINTER),
        ("key_norm", _POINTER),
        ("cosine", _POINTER),
        ("sine", _POINTER),
        ("norm_epsilon", _REAL),
        ("head_epsilon", _REAL),
        ("query", _POINTER),
        ("keys", _POINTER),
        ("values", _POINTER),
        ("cache_dtype", _NUMBER),
        ("sequence_stride", _NUMBER),
        ("head_stride", _NUMBER),
        ("work", _POINTER),
    ]


class Attention(ctypes.Structure):
    """Attention to blocks and to the newest tokens (`qm_attention`)."""

    _fields_ = [
        ("query", _POINTER),
        ("sequences", _NUMBER),
        ("length", _NUMBER),
        ("query_heads", _NUMBER),
        ("key_heads", _NUMBER),
        ("head_size", _NUMBER),
        ("scale", _REAL),
        ("n_blocks", _NUMBER),
        ("block_tokens", _NUMBER),
        ("block_keys", _POINTER),
        ("block_values", _POINTER),
        ("key_scales", _POINTER),
        ("value_scales", _POINTER),
        ("keys", _POINTER),
        ("values", _POINTER),
        ("cache_dtype", _NUMBER),
        ("sequence_stride", _NUMBER),
        ("head_stride", _NUMBER),
        ("tokens", _NUMBER),
        ("out", _POINTER),
    ]


class LayerEnd(ctypes.Structure):
    """What comes after attention (`qm_layer_end`)."""

    _fields_ = [
        ("attended", _POINTER),
        ("attention", Weight),
        ("gate_up", Weight),
        ("down", Weight),
        ("norm", _POINTER),
        ("norm_epsilon", _REAL),
        ("rows", _NUMBER),
        ("columns", _NUMBER),
        ("dtype", _NUMBER),
        ("hidden", _POINTER),
        ("out", _POINTER),
        ("work", _POINTER),
    ]


class Layer(ctypes.Structure):
    """A whole layer (`qm_layer`)."""

    _fields_ = [("start", LayerStart), ("attention", Attention), ("end", LayerEnd)]


class FullAttention(ctypes.Structure):
    """Attention of all tokens to all (`qm_full_attention`)."""

    _fields_ = [
        ("query", _POINTER),
        ("keys", _POINTER),
        ("values", _POINTER),
        ("dtype", _NUMBER),
        ("tokens", _NUMBER),
        ("heads", _NUMBER),
        ("head_size", _NUMBER),
        ("token_stride", _NUMBER),
        ("scale", _REAL),
        ("out", _POINTER),
        ("out_stride", _NUMBER),
        ("work", _POINTER),
    ]
