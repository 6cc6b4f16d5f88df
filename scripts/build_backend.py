"""setuptools' build backend, which asks for a compiler from a wheel where the machine has none."""

from __future__ import annotations

import os
import shutil

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

_COMPILERS = ("c++", "g++", "clang++")


def _compiler() -> list[str]:
    found = os.environ.get("CXX") or any(map(shutil.which, _COMPILERS))
    return [] if found else ["ziglang>=0.13"]


def get_requires_for_build_wheel(config_settings=None):
    """Return what building a wheel needs."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _compiler()


def get_requires_for_build_editable(config_settings=None):
    """Return what an editable installation needs."""
    return build_meta.get_requires_for_build_editable(config_settings) + _compiler()
