"""Name -> codec. A new codec is one file and one registration."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ConfigurationError
from .base import Codec
from .int8 import INT8Codec
from .kernels import KernelSelector
from .raw import RawCodec
from .rotated import RotatedINT8Codec

_FACTORIES: dict[str, Callable[[KernelSelector], Codec]] = {}


def register_codec(name: str, factory: Callable[[KernelSelector], Codec]) -> None:
    """Make a codec known under `name`.

    Raises:
        ConfigurationError: the name is taken.
    """
    if name in _FACTORIES:
        raise ConfigurationError(f"a codec named {name!r} is already registered")
    _FACTORIES[name] = factory


def create_codec(name: str, kernels: KernelSelector | None = None) -> Codec:
    """Return a codec by its name.

    Raises:
        ConfigurationError: no such codec; the error lists the known ones.
    """
    if name not in _FACTORIES:
        raise ConfigurationError(f"no codec is named {name!r}; there are {', '.join(codec_names())}")
    return _FACTORIES[name](kernels or KernelSelector())


def codec_names() -> tuple[str, ...]:
    """Return the registered names, sorted."""
    return tuple(sorted(_FACTORIES))


register_codec(RawCodec.name, lambda kernels: RawCodec())
register_codec(INT8Codec.name, INT8Codec)
register_codec(RotatedINT8Codec.name, RotatedINT8Codec)
