"""Codecs: tensor <-> encoded rows, and products computed on the encoded form. No files, pools or policies."""

from .base import ROW_MULTIPLE, Codec, Compensation, Encoded, LinearInput, Scratch, Segment, columns_of
from .codecs.fp16 import FP16Codec
from .codecs.int4 import INT4Codec
from .codecs.int8 import INT8Codec
from .codecs.raw import RawCodec
from .codecs.rotated import RotatedINT8Codec
from .codecs.sparse import SparseCodec
from .codecs.svd import SVDCodec
from .kv import KV_CODECS, KVBlock, KVCodec, Partial, attend_causal, attend_plain, merge, merge_two
from .kv_integers import create_kv_codec
from .log import DecodedSample, EncodingCounters, EncodingLog
from .manager import (
    CompressedTensor,
    FP16QuantizationCompressor,
    INT8QuantizationCompressor,
    MemoryCompressionManager,
    SparseCompressionCompressor,
    SVDDecompositionCompressor,
    TensorCompressor,
)
from .registry import codec_names, create_codec, register_codec
from .selection import TOLERANCES, Candidate, CompressionMethodSelector, Selection
from .speeds import CodecSpeeds, measure_codec_speeds

__all__ = [
    "Candidate",
    "Codec",
    "CodecSpeeds",
    "Compensation",
    "CompressedTensor",
    "CompressionMethodSelector",
    "DecodedSample",
    "Encoded",
    "EncodingCounters",
    "EncodingLog",
    "FP16Codec",
    "FP16QuantizationCompressor",
    "INT4Codec",
    "INT8Codec",
    "INT8QuantizationCompressor",
    "KVBlock",
    "KVCodec",
    "KV_CODECS",
    "LinearInput",
    "MemoryCompressionManager",
    "Partial",
    "ROW_MULTIPLE",
    "RawCodec",
    "RotatedINT8Codec",
    "SVDCodec",
    "SVDDecompositionCompressor",
    "Scratch",
    "Segment",
    "Selection",
    "SparseCodec",
    "SparseCompressionCompressor",
    "TOLERANCES",
    "TensorCompressor",
    "attend_causal",
    "attend_plain",
    "codec_names",
    "columns_of",
    "create_codec",
    "create_kv_codec",
    "measure_codec_speeds",
    "merge",
    "merge_two",
    "register_codec",
]
