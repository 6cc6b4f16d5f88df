"""`Bypassed`: modules that a replaced forward does not call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..compat import watches


class Bypassed:
    """Modules that a replaced forward computes itself, instead of calling them.

    Args:
        parts: each a module, and the names of its children that are not called.
    """

    def __init__(self, *parts: tuple[nn.Module, Sequence[str]]) -> None:
        # (children of a module, name, module, its attributes)
        self._parts = [
            (owner._modules, name, owner._modules[name], owner._modules[name].__dict__)
            for owner, names in parts
            for name in names
        ]

    def changed(self) -> bool:
        """Return whether one of them was replaced or is watched."""
        for children, name, part, attributes in self._parts:
            if children[name] is not part or "forward" in attributes:
                return True
            hooks, before = attributes["_forward_hooks"], attributes["_forward_pre_hooks"]
            if (hooks or before) and any(map(watches, (*hooks.values(), *before.values()))):
                return True
        return False
