"""The native core: products on encoded rows and steps of a decoder layer in C++, behind a plain C interface.

`core()` is `None` where it was not compiled or is switched off; torch's kernels then do the same work. See
docs/native.md.
"""

from .binding import COLUMN_MULTIPLE, DTYPES, ISA_VARIABLE, MOST_HEAD_SIZE, Core, Integers, core, float_weight
from .structures import INT4_ROWS, INT8_ROWS, Attention, Layer, LayerEnd, LayerStart, Weight

__all__ = [
    "COLUMN_MULTIPLE",
    "DTYPES",
    "INT4_ROWS",
    "INT8_ROWS",
    "ISA_VARIABLE",
    "MOST_HEAD_SIZE",
    "Attention",
    "Core",
    "Integers",
    "Layer",
    "LayerEnd",
    "LayerStart",
    "Weight",
    "core",
    "float_weight",
]
