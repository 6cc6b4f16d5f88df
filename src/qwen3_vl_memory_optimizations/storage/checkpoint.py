"""A checkpoint directory: find and check `config.json` and the safetensors files, without reading data."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, CorruptDataError
from .checksums import PageChecksums
from .direct_io import DISK_BLOCK_BYTES, AlignedBuffer, DirectFile
from .safetensors_file import FORMAT_KEY, PADDING_PREFIX, SafetensorsHeader, TensorExtent, read_header, unreadable

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
_CHECK_CHUNK_BYTES = 4 << 20
_DOWNLOAD_AGAIN = "download the checkpoint again"


class Checkpoint:
    """A Hugging Face or packed checkpoint directory. Created by `Checkpoint.open`.

    Attributes:
        directory: the directory.
        config: `config.json`, parsed.
        metadata: the metadata of the safetensors headers.
        tensors: position of each tensor, by name; file by file, in file order.
        headers: headers of its files.
    """

    def __init__(
        self,
        directory: Path,
        config_text: bytes,
        headers: list[SafetensorsHeader],
        tensors: dict[str, TensorExtent],
    ) -> None:
        self.directory = directory
        self.config: dict[str, Any] = _json_object(directory / CONFIG_FILE, config_text)
        self.headers = headers
        self.metadata = {key: text for header in headers for key, text in header.metadata.items()}
        self.tensors = tensors
        self._fingerprint = _fingerprint(config_text, headers)

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Read the configuration and the headers of the checkpoint in `directory`.

        Raises:
            CheckpointError: not a directory, not readable, no `config.json`, no safetensors file, a shard or a tensor
                named by the index is missing, or a header is damaged.
        """
        directory = Path(directory)
        try:
            present = set(os.listdir(directory))
        except NotADirectoryError as error:
            raise CheckpointError(
                f"{directory}: not a directory; give the directory that holds {CONFIG_FILE}", path=directory
            ) from error
        except OSError as error:
            raise unreadable(directory, error) from error
        if CONFIG_FILE not in present:
            raise CheckpointError(
                f"{directory}: no {CONFIG_FILE}, not a checkpoint; give the directory that holds it",
                path=directory,
            )
        config_text = _read_text(directory / CONFIG_FILE)
        if SINGLE_FILE in present:
            header = read_header(directory / SINGLE_FILE)
            headers, tensors = [header], _without_padding(header)
        elif INDEX_FILE in present:
            headers, tensors = _read_shards(directory, present)
        else:
            raise _no_weights(directory, present)
        return cls(directory, config_text, headers, tensors)

    @property
    def name(self) -> str:
        """Base name of packed forms: the name of the directory, or of the model whose snapshot it is in a hub cache."""
        directory = self.directory.resolve()
        if directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--"):
            return directory.parent.parent.name.rpartition("--")[2]
        return directory.name or "model"

    @property
    def packed(self) -> bool:
        """Return whether this library wrote the checkpoint."""
        return FORMAT_KEY in self.metadata

    @property
    def total_bytes(self) -> int:
        """Size of all tensors in bytes, without padding."""
        return sum(extent.n_bytes for extent in self.tensors.values())

    def fingerprint(self) -> str:
        """Return 32 hexadecimal digits that change when the checkpoint does.

        They cover `config.json`, the headers, and the name, size and modification time of each file; no data is read.
        """
        return self._fingerprint

    def check(self) -> None:
        """Check that the files are unchanged since `open`, and verify the data's checksums if there are any.

        Reads all of a packed checkpoint, with a few megabytes of memory.

        Raises:
            CheckpointError: the files changed since they were opened.
            CorruptDataError: the data differs from what was written.
        """
        if Checkpoint.open(self.directory).fingerprint() != self._fingerprint:
            raise CheckpointError(
                f"{self.directory}: the files changed since they were opened; load the checkpoint again",
                path=self.directory,
            )
        for header in self.headers:
            with DirectFile(header.path) as file, AlignedBuffer(_CHECK_CHUNK_BYTES) as buffer:
                for extent in header.tensors.values():
                    if extent.checksums is not None:
                        _check_pages(file, buffer, extent)


def _without_padding(header: SafetensorsHeader) -> dict[str, TensorExtent]:
    if FORMAT_KEY not in header.metadata:
        return header.tensors
    return {name: extent for name, extent in header.tensors.items() if not name.startswith(PADDING_PREFIX)}


def _read_text(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def _json_object(path: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); {_DOWNLOAD_AGAIN}", path=path) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object; {_DOWNLOAD_AGAIN}", path=path)
    return value


def _read_shards(directory: Path, present: set[str]) -> tuple[list[SafetensorsHeader], dict[str, TensorExtent]]:
    """Return the headers of the shards, and each tensor's position in the shard that the index names for it."""
    index = directory / INDEX_FILE
    file_of = _json_object(index, _read_text(index)).get("weight_map")
    if not isinstance(file_of, dict) or not file_of or not all(isinstance(file, str) for file in file_of.values()):
        raise CheckpointError(f"{index}: no weight_map of tensor names to files; {_DOWNLOAD_AGAIN}", path=index)
    files = sorted(set(file_of.values()))
    missing = [file for file in files if file not in present]
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} of {len(files)} files the index names are missing, {missing[0]!r} "
            f"first; {_DOWNLOAD_AGAIN}",
            path=directory / missing[0],
        )
    headers, tensors = [], {}
    for file in files:
        header = read_header(directory / file)
        headers.append(header)
        tensors.update({name: extent for name, extent in header.tensors.items() if file_of.get(name) == file})
    lost = [name for name in file_of if name not in tensors]
    if lost:
        raise CheckpointError(
            f"{directory}: {len(lost)} of {len(file_of)} tensors the index names are in none of the files, "
            f"{lost[0]!r} (in {file_of[lost[0]]}) first; {_DOWNLOAD_AGAIN}",
            path=directory / file_of[lost[0]],
        )
    return headers, tensors


def _no_weights(directory: Path, present: set[str]) -> CheckpointError:
    pickled = sorted(name for name in present if name.startswith("pytorch_model") and ".bin" in name)
    if pickled:
        return CheckpointError(
            f"{directory}: the weights are in {pickled[0]}, which is not read because loading it can run "
            "code; load it with transformers and call save_pretrained(), which writes safetensors",
            path=directory,
        )
    return CheckpointError(
        f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}; {_DOWNLOAD_AGAIN}", path=directory
    )


def _fingerprint(config_text: bytes, headers: list[SafetensorsHeader]) -> str:
    digest = hashlib.blake2b(config_text, digest_size=16)
    for header in headers:
        try:
            status = header.path.stat()
        except OSError as error:
            raise unreadable(header.path, error) from error
        digest.update(repr((header.path.name, status.st_size, status.st_mtime_ns)).encode())
        digest.update(repr(sorted(header.metadata.items())).encode())
        for extent in header.tensors.values():
            digest.update(repr((extent.name, extent.dtype, extent.shape, extent.offset_bytes)).encode())
    return digest.hexdigest()


def _check_pages(file: DirectFile, buffer: AlignedBuffer, extent: TensorExtent) -> None:
    assert extent.checksums is not None
    pages = PageChecksums(extent.n_bytes, extent.page_bytes)
    while pages.done_bytes < extent.n_bytes:
        offset = extent.offset_bytes + pages.done_bytes
        lead = offset % DISK_BLOCK_BYTES
        count = min(_CHECK_CHUNK_BYTES - lead, extent.n_bytes - pages.done_bytes)
        file.read_into(buffer.address + lead, offset, count)
        pages.update(buffer.view[lead : lead + count])
    for page, (found, written) in enumerate(zip(pages.result(), extent.checksums, strict=True)):
        if found != written:
            raise CorruptDataError(
                f"{extent.path}: page {page} of {extent.name!r} has the checksum {found:016x}, but "
                f"{written:016x} was written; delete this packed checkpoint to have it packed again",
                path=extent.path,
            )
