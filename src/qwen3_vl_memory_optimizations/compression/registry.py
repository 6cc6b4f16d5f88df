"""Name -> codec. A new codec needs one file and one registration."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from ..errors import ConfigurationError
from .base import Codec
from .codecs.fp16 import FP16Codec
from .codecs.int4 import INT4Codec
from .codecs.int8 import INT8Codec
from .codecs.raw import RawCodec
from .codecs.rotated import RotatedINT8Codec
from .codecs.sparse import SparseCodec
from .codecs.svd import SVDCodec

_FACTORIES: dict[str, Callable[[], Codec]] = {}
_VARIANTS: set[str] = set()
_FORMER = ("int4_64", "int4_32")


def register_codec(name: str, factory: Callable[[], Codec], *, variant: bool = False) -> None:
    """Register a codec under `name`.

    Args:
        name: its name in settings and packed checkpoints.
        factory: returns a new codec.
        variant: the name appears only in packed checkpoints (see `Codec.stored_name`); `codec_names` omits it.

    Raises:
        ConfigurationError: the name is taken.
    """
    if name in _FACTORIES:
        raise ConfigurationError(f"a codec named {name!r} is already registered")
    _FACTORIES[name] = factory
    if variant:
        _VARIANTS.add(name)


def create_codec(name: str) -> Codec:
    """Return a codec by its name, or by the `stored_name` of a tensor.

    Raises:
        ConfigurationError: there is no such codec; the error lists the known names and suggests the nearest.
    """
    name, _, parameters = name.partition(":")
    if name in _FORMER:
        raise ConfigurationError(
            f"{name!r} is the INT4 format of version 0.2, which this one cannot read; pack the checkpoint again"
        )
    if name not in _FACTORIES:
        names = codec_names()
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ConfigurationError(f"codec: {name!r} is not one of auto, {', '.join(names)}; did you mean {near!r}?")
    codec = _FACTORIES[name]()
    return codec.restored(parameters) if parameters else codec


def codec_names() -> tuple[str, ...]:
    """Return the registered names, sorted."""
    return tuple(sorted(_FACTORIES.keys() - _VARIANTS))


register_codec(RawCodec.name, RawCodec)
register_codec(INT8Codec.name, INT8Codec)
register_codec(RotatedINT8Codec.name, RotatedINT8Codec)
register_codec(FP16Codec.name, FP16Codec)
register_codec(SVDCodec.name, SVDCodec)
register_codec(SparseCodec.name, SparseCodec)
register_codec(INT4Codec.name, INT4Codec)
register_codec(INT4Codec().stored_name, INT4Codec, variant=True)
