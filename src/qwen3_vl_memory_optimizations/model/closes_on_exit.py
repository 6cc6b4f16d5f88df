"""Make a model a context manager that closes its optimizer, without changing its class for other models.

Python looks `__enter__` up on the class. So the model alone gets a class of its own, derived from its class and of the
same name, as `torch.nn.utils.parametrize` does for a module.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import nn

_PLAIN = "_plain_class"


class ClosesOnExit:
    """Add `with` to a model class: the block yields the model, and its end closes the optimizer."""

    __slots__ = ()

    def __enter__(self) -> Any:
        """Return the model."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the optimizer, also after an exception; a model that was released within the block has none."""
        optimizer = getattr(self, "memory_optimizer", None)
        if optimizer is not None:
            optimizer.close()


def attach_closing(model: nn.Module) -> None:
    """Let a model be used in a `with` statement; its class keeps its name and module."""
    plain = type(model)
    if not issubclass(plain, ClosesOnExit):
        names = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
        model.__class__ = type(plain.__name__, (plain, ClosesOnExit), {_PLAIN: plain, **names})


def detach_closing(model: nn.Module) -> None:
    """Give a model the class back that it had before `attach_closing`."""
    plain = vars(type(model)).get(_PLAIN)
    if plain is not None:
        model.__class__ = plain
