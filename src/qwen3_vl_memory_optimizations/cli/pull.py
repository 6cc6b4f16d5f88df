"""`qwen3vl-mem pull`: download a model from the Hugging Face Hub."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common.output import (
    EXIT_INTERRUPTED,
    INPUT,
    MEMORY,
    CacheDirOption,
    DebugOption,
    JsonOption,
    console,
    error_console,
    print_json,
)
from .common.progress import progress_line

if TYPE_CHECKING:
    from ..model.sources.download import Download


def pull(
    model: Annotated[
        str, typer.Argument(metavar="ID", help="Id of a model on the hub, such as Qwen/Qwen3-VL-2B-Instruct.")
    ],
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision",
            metavar="NAME",
            rich_help_panel=INPUT,
            help="Branch, tag or commit; afterwards the model is ID@NAME. (default: main)",
        ),
    ] = None,
    hub_cache: Annotated[
        Path | None,
        typer.Option(
            "--hub-cache",
            metavar="DIR",
            rich_help_panel=INPUT,
            help="Directory of downloaded models. (default: $HF_HUB_CACHE, or ~/.cache/huggingface/hub)",
        ),
    ] = None,
    pack: Annotated[
        bool, typer.Option("--pack", rich_help_panel=MEMORY, help="Encode the model afterwards, as the first use does.")
    ] = False,
    cache_dir: CacheDirOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Download a model; an interrupted download resumes where it stopped.

    Only weights in safetensors, configuration, tokenizer and processor are
    downloaded, into the cache that other Hugging Face programs share. Set
    HF_ENDPOINT for a mirror, and HF_TOKEN for models with restricted access.

    Example: qwen3vl-mem pull Qwen/Qwen3-VL-2B-Instruct
    """
    from ..errors import ConfigurationError
    from ..model.sources.download import plan_download
    from ..model.sources.hub import HubName, hub_name, missing_files, snapshot

    hub = hub_name(model)
    if hub is None:
        raise ConfigurationError(f"{model}: not the id of a model; it has the form owner/name")
    if revision is not None:
        hub = HubName(hub.repo, revision)
    from huggingface_hub import is_offline_mode

    there = snapshot(hub, hub_cache) if is_offline_mode() else None
    if there is not None and not missing_files(there):
        report: dict[str, Any] = {"model": str(hub), "directory": str(there), "downloaded_bytes": 0, "seconds": None}
    else:
        report = _downloaded(plan_download(hub, hub_cache), as_json)
    if pack:
        report["packed"] = str(_packed(Path(report["directory"]), cache_dir, as_json))
    if as_json:
        print_json(report)
        return
    _show(report, pack, hub_cache)


def _downloaded(download: Download, quiet: bool) -> dict[str, Any]:
    from ..errors import format_bytes

    missing_bytes, total_bytes = download.missing_bytes, download.total_bytes
    if not quiet and not download.is_complete:
        rest = "" if missing_bytes == total_bytes else f", {format_bytes(missing_bytes)} of them still missing"
        line = f"{download.hub}: {len(download.files)} files, {format_bytes(total_bytes)}{rest}"
        error_console().print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    start_s = time.perf_counter()
    try:
        with progress_line(quiet=quiet) as shown:
            directory = download.run(shown.report)
    except KeyboardInterrupt:
        error_console().print(
            f"stopped: {format_bytes(download.done_bytes())} of {format_bytes(total_bytes)} are kept; the same command "
            "resumes there",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    return {
        "model": str(download.hub),
        "directory": str(directory),
        "total_bytes": total_bytes,
        "downloaded_bytes": missing_bytes,
        "seconds": None if download.is_complete else time.perf_counter() - start_s,
    }


def _packed(directory: Path, cache_dir: Path | None, quiet: bool) -> Path:
    from ..planning import pack_model
    from ..profiles import configure

    with progress_line(quiet=quiet) as line:
        return pack_model(
            directory, configure({} if cache_dir is None else {"cache_dir": cache_dir}), progress=line.report
        )


def _show(report: dict[str, Any], packed: bool, hub_cache: Path | None) -> None:
    from ..errors import format_bytes

    screen, seconds, n_bytes = console(), report["seconds"], report["downloaded_bytes"]
    if seconds is None:
        screen.print("[green]complete already[/green]", highlight=False)
    else:
        rate = f", {format_bytes(n_bytes / seconds)}/s" if seconds > 0 else ""
        screen.print(f"[green]downloaded[/green] {format_bytes(n_bytes)} in {seconds:.1f} s{rate}", highlight=False)
    lines = [report["directory"]]
    if hub_cache is not None:
        lines.append(f"its id is found while HF_HUB_CACHE={hub_cache} is set; the directory above works always")
    if packed:
        lines.append(f"packed: {report['packed']}")
    name = report["model"] if hub_cache is None else report["directory"]
    lines.append(f'next: qwen3vl-mem generate {name} -i photo.jpg -p "What is this?"')
    if not packed:
        lines.append(f"its first use packs it, which takes minutes; ahead of time: qwen3vl-mem pack {name}")
    for line in lines:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
