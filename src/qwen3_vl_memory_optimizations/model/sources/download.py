"""Download a model into the hub cache, resumable within a file (`Download`).

huggingface_hub lists, transfers and links the files, so its mirror, token, proxy and offline settings apply. It does
not continue a file that an earlier process began. Here a large file is kept as `<etag>.incomplete` beside its blob and
continued by the next process.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, CorruptDataError, InsufficientDiskSpaceError, StorageError, format_bytes
from ...storage import free_disk_bytes
from .hub import CONFIG_FILES, SINGLE_FILES, HubName, hub_cache, missing_files, snapshot

Progress = Callable[[str, int, int], None]
"""Called with a description, the bytes done and the total bytes."""

_WANTED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")
_RESUMED_BYTES = 1 << 20
"""Smaller files are downloaded whole."""
_SPARE_BYTES = 64 << 20
_SHA256_DIGITS = 64
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a model.

    Attributes:
        name: in the repository.
        n_bytes: its size.
        blob: name of its content in the hub cache; a SHA-256 for large files.
        done_bytes: bytes already on the disk.
        linked: it is complete and in the snapshot.
    """

    name: str
    n_bytes: int
    blob: str
    done_bytes: int
    linked: bool


class Download:
    """The download of one model. Created by `plan_download`; nothing is written before `run`.

    Attributes:
        hub: the model.
        commit: the commit that its revision names now.
        files: what is needed.
    """

    def __init__(self, hub: HubName, cache: Path, commit: str, files: list[HubFile]) -> None:
        self.hub, self.commit, self.files = hub, commit, files
        self._cache = cache

    @property
    def total_bytes(self) -> int:
        """Size of all files in bytes."""
        return sum(file.n_bytes for file in self.files)

    @property
    def missing_bytes(self) -> int:
        """Bytes still to be downloaded, as of planning."""
        return sum(file.n_bytes - file.done_bytes for file in self.files)

    @property
    def is_complete(self) -> bool:
        """Whether all files were there already."""
        return all(file.linked for file in self.files)

    def done_bytes(self) -> int:
        """Return the bytes that are on the disk now."""
        blobs = _blobs(self._cache, self.hub)
        return sum(_present_bytes(blobs, file.blob, file.n_bytes) for file in self.files)

    def run(self, progress: Progress | None = None) -> Path:
        """Download what is missing and return the directory of the model.

        After an interruption or an error, everything written so far is kept for the next run.

        Args:
            progress: called as bytes arrive.

        Raises:
            CheckpointError: the hub refused or failed.
            CorruptDataError: a file does not have the checksum that the hub names; it was removed.
            InsufficientDiskSpaceError: the disk lacks room; nothing was written.
            StorageError: the hub cache cannot be written.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        self._require_room()
        report = progress or (lambda description, done, total: None)
        disable_progress_bars()  # our own says more
        done_bytes = self.total_bytes - self.missing_bytes
        with _explained(self.hub, self._cache, self):
            report("downloading", done_bytes, self.total_bytes)
            for file in self.files:
                if file.n_bytes >= _RESUMED_BYTES and file.done_bytes < file.n_bytes:
                    self._resume(file, _Shifted(report, done_bytes - file.done_bytes, self.total_bytes))
                    done_bytes += file.n_bytes - file.done_bytes
            # One worker: Ctrl-C would wait for the others.
            directory = snapshot_download(
                self.hub.repo,
                revision=self.hub.revision,
                cache_dir=self._cache,
                allow_patterns=[file.name for file in self.files],
                max_workers=1,
            )
        report("downloading", self.total_bytes, self.total_bytes)
        missing = missing_files(Path(directory))
        if missing:
            raise CheckpointError(
                f"{self.hub}: downloaded, but {missing[0]} is not among its files on the hub; the repository is "
                "incomplete: choose another one, or another --revision",
                path=directory,
            )
        return Path(directory)

    def _require_room(self) -> None:
        available = free_disk_bytes(_existing(self._cache))
        if self.missing_bytes and self.missing_bytes + _SPARE_BYTES > available:
            raise InsufficientDiskSpaceError(
                f"{self.hub}: {format_bytes(self.missing_bytes)} of {format_bytes(self.total_bytes)} are still to be "
                f"downloaded, but the disk of {self._cache} has {format_bytes(available)} free; free "
                f"{format_bytes(self.missing_bytes + _SPARE_BYTES - available)}, or set HF_HUB_CACHE to a directory on "
                "another disk",
                path=self._cache,
                required_bytes=self.missing_bytes,
                available_bytes=available,
            )

    def _resume(self, file: HubFile, on_bytes: Callable[[int], None]) -> None:
        """Download one file as a blob, continuing what is there."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import WeakFileLock, build_hf_headers

        blobs = _blobs(self._cache, self.hub)
        blobs.mkdir(parents=True, exist_ok=True)
        lock = self._cache / ".locks" / blobs.parent.name / f"{file.blob}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        partial = blobs / f"{file.blob}.incomplete"
        with WeakFileLock(lock):
            if (blobs / file.blob).exists():  # another process was faster
                return
            with _Counted(partial, on_bytes) as out:
                if out.tell() > file.n_bytes:
                    out.truncate(0)
                    out.seek(0)
                http_get(
                    hf_hub_url(self.hub.repo, file.name, revision=self.commit),
                    out,
                    resume_size=out.tell(),
                    headers=build_hf_headers(),
                    expected_size=file.n_bytes,
                )
            _require_content(partial, file)
            os.replace(partial, blobs / file.blob)


@dataclass(frozen=True, slots=True)
class _Shifted:
    """Reports the bytes of one file as part of all."""

    report: Progress
    before_bytes: int
    total_bytes: int

    def __call__(self, n_bytes: int) -> None:
        self.report("downloading", self.before_bytes + n_bytes, self.total_bytes)


class _Counted(io.FileIO):
    """A file that continues at its end and reports its size as it grows."""

    def __init__(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        super().__init__(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
        self._on_bytes = on_bytes
        self.seek(0, os.SEEK_END)

    def write(self, data: Any) -> int:
        """Write all bytes."""
        view = memoryview(data)
        while len(view):
            view = view[super().write(view) :]
        self._on_bytes(self.tell())
        return len(data)


def plan_download(hub: HubName, cache: Path | None = None) -> Download:
    """Ask the hub for the files of a model, and compare them with the hub cache; nothing is written.

    Args:
        hub: the model.
        cache: the hub cache; default: that of huggingface_hub.

    Raises:
        CheckpointError: offline, no such model or revision, no access, or no weights in safetensors.
    """
    from huggingface_hub import HfApi

    cache = cache or hub_cache()
    with _explained(hub, cache):
        info = HfApi().model_info(hub.repo, revision=hub.revision, files_metadata=True)
    siblings = list(info.siblings or ())
    wanted = [each for each in siblings if "/" not in each.rfilename and _is_wanted(each.rfilename)]
    names = {each.rfilename for each in wanted}
    if not names.intersection(CONFIG_FILES) or not any(name.endswith(".safetensors") for name in names):
        gguf = next((each.rfilename for each in siblings if each.rfilename.endswith(".gguf")), None)
        held = "no config.json and safetensors files" if gguf is None else f"GGUF files such as {gguf}"
        remedy = (
            "choose a repository that has them"
            if gguf is None
            else "download one with huggingface_hub (hf download), and pass the path of the file"
        )
        raise CheckpointError(f"{hub}: this repository has {held}; {remedy}", path=cache)
    if any(name in names for name in SINGLE_FILES):  # some repositories have the weights twice, split as well
        wanted = [each for each in wanted if each.rfilename in SINGLE_FILES or not _is_weights(each.rfilename)]
    blobs, files = _blobs(cache, hub), []
    commit = str(info.sha)
    for each in wanted:
        blob = each.lfs.sha256 if each.lfs is not None else str(each.blob_id)
        n_bytes = int(each.size or 0)
        linked = (blobs.parent / "snapshots" / commit / each.rfilename).exists()
        done = n_bytes if linked else _present_bytes(blobs, blob, n_bytes)
        files.append(HubFile(each.rfilename, n_bytes, blob, done, linked))
    return Download(hub, cache, commit, files)


def _is_wanted(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in _WANTED)


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def _blobs(cache: Path, hub: HubName) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return cache / repo_folder_name(repo_id=hub.repo, repo_type="model") / "blobs"


def _present_bytes(blobs: Path, blob: str, n_bytes: int) -> int:
    for name in (blob, f"{blob}.incomplete"):
        with contextlib.suppress(OSError):
            return min(n_bytes, (blobs / name).stat().st_size)
    return 0


def _existing(path: Path) -> Path:
    """Return the nearest directory that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _require_content(path: Path, file: HubFile) -> None:
    """Compare a whole file with its checksum, if the hub names one.

    Raises:
        CorruptDataError: they differ; the file was removed.
    """
    if len(file.blob) != _SHA256_DIGITS:
        return
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as content:
        while chunk := content.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != file.blob:
        path.unlink()
        raise CorruptDataError(
            f"{file.name}: the downloaded {format_bytes(file.n_bytes)} do not have the SHA-256 that the hub names "
            f"({file.blob[:12]}); they were removed: download again",
            path=path,
        )


@contextlib.contextmanager
def _explained(hub: HubName, cache: Path, download: Download | None = None) -> Iterator[None]:
    """Turn errors of huggingface_hub into one line that says what is missing and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    transport_error: Any = HfHubHTTPError.__bases__[0]  # of the HTTP library that this version uses
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"{hub}: access is restricted; accept its terms at {_address(hub)}, then set HF_TOKEN or run hf auth login",
            path=cache,
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{hub.repo}: the hub has no revision {hub.revision!r} of it; check --revision", path=cache
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{hub}: the hub ({_endpoint()}) has no such model, or it is private; check the id, or set HF_TOKEN",
            path=cache,
        ) from error
    except OfflineModeIsEnabled as error:
        raise _not_reached(hub, cache, download, "HF_HUB_OFFLINE is set", "unset it and try again") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, transport_error, ConnectionError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            raise CheckpointError(
                f"{hub}: the hub ({_endpoint()}) refused the token; set HF_TOKEN to a valid one, or run hf auth login",
                path=cache,
            ) from error
        reason = f"HTTP {status}" if status else type(error).__name__
        remedy = "check the connection or HF_ENDPOINT and try again"
        raise _not_reached(hub, cache, download, f"{_endpoint()} did not deliver ({reason})", remedy) from error
    except OSError as error:  # a file, or fewer bytes than announced
        path = error.filename or cache
        raise StorageError(f"{path}: {error.strerror or str(error).splitlines()[0]}; try again", path=path) from error


def _not_reached(hub: HubName, cache: Path, download: Download | None, why: str, remedy: str) -> CheckpointError:
    directory = snapshot(hub, cache)
    if download is not None:
        state = f"{format_bytes(download.done_bytes())} of {format_bytes(download.total_bytes)} are kept"
    elif directory is None:
        state = "nothing of this model is on this machine"
    else:
        missing = missing_files(directory)
        more = f" and {len(missing) - 3} more files" if len(missing) > 3 else ""
        state = (
            f"missing on this machine: {', '.join(missing[:3])}{more}" if missing else "an earlier download is complete"
        )
    return CheckpointError(f"{hub}: {why}; {state}; {remedy}", path=cache)


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _address(hub: HubName) -> str:
    return f"{_endpoint()}/{hub.repo}"
