"""Prefetch the files that importing transformers' models reads, and drop them from the page cache afterwards.

The import opens about four thousand files one after another, including the source of every model in transformers. On a
cold disk it would wait for each, behind the weights being read at the same time.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_THREADS = 4
_ENDINGS = (".py", ".pyc", ".so")


class ImportFiles:
    """Remembers which files an earlier import read, in a list stored in a directory.

    The list is a hint: missing entries are read on demand, and deleted files are skipped.

    Args:
        directory: holds one list per set of versions; nothing is stored while it does not exist.
    """

    def __init__(self, directory: Path) -> None:
        versions = "-".join(importlib.metadata.version(name) for name in ("transformers", "torch"))
        self._list = directory / f"imports-{sys.implementation.cache_tag}-{versions}.txt"
        spec = importlib.util.find_spec("transformers")
        assert spec is not None and spec.origin is not None
        self._package = Path(spec.origin).parent
        self._loaded = set(_files_of_modules())

    def read_ahead(self) -> None:
        """Ask the system to read the files into its cache, unless they are cached; returns immediately."""
        paths = self._listed()
        if not paths or _is_cached(paths[0]):
            return
        for first in range(_THREADS):
            part = paths[first::_THREADS]
            arguments = (part, os.POSIX_FADV_WILLNEED)
            threading.Thread(target=_advise, args=arguments, name=f"ahead-{first}", daemon=True).start()

    def drop(self) -> None:
        """Drop the files from the system's cache: they count toward the control group, and are not read again."""
        _advise(self._listed(), os.POSIX_FADV_DONTNEED)

    def record(self) -> None:
        """Store the list of files imported since construction, unless a list exists."""
        if self._list.exists() or not self._list.parent.is_dir():
            return
        files = [path for path in _files_of_modules() if path not in self._loaded]
        files += sorted(str(path) for path in (self._package / "models").rglob("*.py"))
        root = self._package.parent
        names = [os.path.relpath(path, root) for path in files if Path(path).is_relative_to(root)]
        try:
            descriptor, temporary = tempfile.mkstemp(dir=self._list.parent, prefix=self._list.name)
            with os.fdopen(descriptor, "w") as file:
                file.write("\n".join(names))
            os.replace(temporary, self._list)
        except OSError as error:  # the next start is as slow as this one
            logger.info("%s: cannot be written; the next start does not prefetch: %s", self._list, str(error))

    def _listed(self) -> list[Path]:
        try:
            names = self._list.read_text().splitlines()
        except (OSError, ValueError):
            return []
        root = self._package.parent
        return [root / name for name in names if name.endswith(_ENDINGS) and ".." not in Path(name).parts]


def _files_of_modules() -> Iterator[str]:
    """Yield the files of loaded modules: compiled Python, or a library."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        path = names.get("__cached__") or names.get("__file__")
        if isinstance(path, str):
            yield path


def _is_cached(path: Path) -> bool:
    """Return whether the beginning of a file is in the system's cache; false if the system does not report it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT) == 1
    except OSError:  # the read would wait for the disk
        return False
    finally:
        os.close(descriptor)


def _advise(paths: list[Path], advice: int) -> None:
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:  # deleted since, or not readable
            continue
        try:
            os.posix_fadvise(descriptor, 0, 0, advice)
        except OSError:  # not a file with a cache
            pass
        finally:
            os.close(descriptor)
