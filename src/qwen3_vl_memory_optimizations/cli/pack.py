"""`qwen3vl-mem pack`: encode a checkpoint once, ahead of its first use."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ._output import CacheDirOption, CodecOption, DebugOption, JsonOption, console, print_json, progress_bar


def pack(
    model: Annotated[Path, typer.Argument(help="A checkpoint directory.")],
    codec: CodecOption = "auto",
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Encode a checkpoint for fast reading from the SSD; it is done once.

    The first `generate` does the same. Stopped in between, it goes on where it was.

    Example: qwen3vl-mem pack ~/models/Qwen3-VL-2B-Instruct
    """
    from ..config import MemoryConfig
    from ..errors import ConfigurationError, format_bytes

    config = MemoryConfig(codec=codec, cache_dir=cache_dir)
    chosen = config.weight_codec()
    if chosen == "none":
        raise ConfigurationError("codec 'none' needs no packing: the checkpoint is read as it is")

    from ..model.packing import pack_checkpoint, packed_directory
    from ..storage import Checkpoint

    source = Checkpoint.open(model)
    was_there = packed_directory(source, chosen, config).is_dir()
    start = time.perf_counter()
    with progress_bar(quiet=as_json) as progress:
        directory = pack_checkpoint(model, codec=chosen, config=config, progress=progress)
    seconds = time.perf_counter() - start
    before_bytes, after_bytes = source.total_bytes, Checkpoint.open(directory).total_bytes
    if as_json:
        print_json(
            {
                "directory": str(directory),
                "codec": chosen,
                "already_packed": was_there,
                "source_bytes": before_bytes,
                "packed_bytes": after_bytes,
                "seconds": None if was_there else seconds,
            }
        )
        return
    share = f"{100 * after_bytes / before_bytes:.0f} %"
    done = "is packed already" if was_there else f"packed in {seconds:.1f} s"
    screen = console()
    sizes = f"{format_bytes(before_bytes)} -> {format_bytes(after_bytes)} ({share}, {chosen})"
    screen.print(f"[green]{done}[/green]: {sizes}", highlight=False)
    screen.print(str(directory), markup=False, highlight=False, soft_wrap=True)
