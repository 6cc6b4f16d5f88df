"""Codecs: tensor <-> encoded rows, and products computed on the encoded form. Pure: no file, no pool, no policy."""

from .base import ROW_MULTIPLE, Codec, LinearInput, Scratch, Segment, columns_of
from .fp16 import FP16Codec
from .int4 import INT4Codec
from .int8 import INT8Codec
from .kernels import KernelSelector
from .raw import RawCodec
from .registry import codec_names, create_codec, register_codec
from .sparse import SparseCodec
from .svd import SVDCodec

__all__ = [
    "ROW_MULTIPLE",
    "Codec",
    "FP16Codec",
    "INT4Codec",
    "INT8Codec",
    "KernelSelector",
    "LinearInput",
    "RawCodec",
    "SVDCodec",
    "Scratch",
    "Segment",
    "SparseCodec",
    "codec_names",
    "columns_of",
    "create_codec",
    "register_codec",
]
