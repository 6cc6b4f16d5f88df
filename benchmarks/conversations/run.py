"""Prove the budget for ordinary conversations with default settings: which finish, which are refused, and how fast.

Each cell (limit, prompt, kind) is a process of its own, cold, in a memory control group without swap whose limit is its
`ram_budget`. Results are kept after each cell: the same command goes on where it was stopped (Ctrl-C).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from benchmarks.control_group import control_group, drop_page_cache, run_in_group, unavailable_reason  # noqa: E402
from benchmarks.peers.layout import AVX2_ENVIRONMENT  # noqa: E402
from benchmarks.results import BEGIN, END, commit, cpu_name, failure, keep, machine, now, write_between  # noqa: E402

HERE = Path(__file__).resolve().parent
MEASURE = HERE / "measure.py"
EXIT_REFUSED = 3
FINISHED, REFUSED, REFUSED_LATER, KILLED, ERROR = (
    "finished",
    "refused before the first token",
    "refused later",
    "killed",
    "error",
)
KINDS = ("text", "page", "two-images", "document")
KEY = ("cpu", "isa", "model", "kind", "limit_bytes", "prompt", "restart")
"""What tells cells apart; the rest of a cell is what was measured."""
PAGE_PX = (1240, 1754)
QUESTIONS = ("What is this page about?", "Which numbers are on this page?")
ANSWER_TOKENS = 16
_DTYPE_CODE = """
import sys
from qwen3_vl_memory_optimizations.config import MemoryConfig
from qwen3_vl_memory_optimizations.model.checkpoint.skeleton import compute_dtype_of
from qwen3_vl_memory_optimizations.storage import Checkpoint
print(compute_dtype_of(Checkpoint.open(sys.argv[1]).config, None, MemoryConfig()))
"""
_COMMAND_CODE = "from qwen3_vl_memory_optimizations.cli import main; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint directory; packed first where it is not packed yet")
    parser.add_argument("--limits", nargs="+", type=float, default=[1.2, 1.6, 2.0, 2.6, 4.0], metavar="GB")
    parser.add_argument("--prompts", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384], metavar="TOKENS")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--avx2", action="store_true", help="hold the libraries to AVX2")
    parser.add_argument("--restart", action="store_true", help="give the last turn of each conversation a new process")
    parser.add_argument("--tokenizer", type=Path, help="directory with tokenizer files, for `document`")
    parser.add_argument("--cache-dir", type=Path, default=ROOT / ".bench" / "cache", help="holds packed checkpoints")
    parser.add_argument("--json", type=Path, default=HERE / "results.json", help="where results are kept")
    parser.add_argument("--again", action="store_true", help="measure cells that the file already has")
    parser.add_argument("--publish", action="store_true", help="write the tables of the file into the README")
    parser.add_argument("--timeout", type=float, default=1800, metavar="S", help="per cell (default: 1800)")
    arguments = parser.parse_args()
    reason = unavailable_reason()
    if reason is not None:
        sys.exit(f"no memory control group here: {reason}")
    content = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"cells": []}
    try:
        measure_all(arguments, content)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
    lines = list(report(content["cells"]))
    print("\n".join(lines))
    if arguments.publish:
        write_between(HERE / "README.md", BEGIN, END, ["", *lines])


# --- cells ------------------------------------------------------------------------------------------------------------


def measure_all(arguments: argparse.Namespace, content: dict[str, Any]) -> None:
    """Measure the cells that were asked for and are not there, and keep each as soon as it is measured."""
    child = child_environment(avx2=arguments.avx2)
    packed = pack(arguments.model, arguments.cache_dir)
    dtype = compute_dtype(packed, child)
    here = {"cpu": cpu_name(), "isa": "avx2" if arguments.avx2 else "native", "model": arguments.model.resolve().name}
    plan = list(make_plan(arguments, packed))
    for number, (kind, limit_bytes, prompt) in enumerate(plan, 1):
        restart = arguments.restart and kind != "document"
        key = {**here, "kind": kind, "limit_bytes": limit_bytes, "prompt": prompt, "restart": restart}
        known = [cell for cell in content["cells"] if all(cell[name] == key[name] for name in KEY)]
        if known and not arguments.again:
            continue
        cell = {**key, "date": now(), "commit": commit(), "machine": machine(), "compute_dtype": dtype}
        with fresh_directory(arguments.cache_dir) as directory:
            if kind == "document":
                figures = measure_document(packed, arguments.tokenizer, limit_bytes, directory, child, arguments)
            else:
                options = ["--kind", kind, "--prompt-tokens", str(prompt), *(["--restart"] if restart else [])]
                figures = measure(packed, limit_bytes, directory, options, env=child, timeout_s=arguments.timeout)
        cell |= figures
        content["cells"] = [other for other in content["cells"] if other not in known] + [cell]
        keep(content, arguments.json)
        where = f"{here['isa']} {kind} {limit_bytes / 1e9:g} GB {prompt or 'a page'}"
        print(f"[{number}/{len(plan)}] {where}: {outcome_text(cell)} ({cell['wall_s']} s)", flush=True)


def make_plan(arguments: argparse.Namespace, packed: Path) -> Iterator[tuple[str, int, int | None]]:
    """Give kind, limit and prompt of each cell; kinds that cannot be measured are left out, with the reason."""
    for kind in arguments.kinds:
        if kind == "document" and arguments.tokenizer is None and not (packed / "tokenizer.json").exists():
            print("document: left out, since the checkpoint has no tokenizer; give one with --tokenizer DIR")
            continue
        for limit in arguments.limits:
            for prompt in arguments.prompts if kind != "document" else [None]:
                yield kind, round(limit * 1e9), prompt


def measure(
    model: Path,
    limit_bytes: int,
    cache_dir: Path,
    options: Sequence[str],
    *,
    env: dict[str, str],
    timeout_s: float = 1800,
    cold: bool = True,
) -> dict[str, Any]:
    """Hold a conversation in a control group; return its outcome, its figures and the group's.

    Args:
        model: a packed checkpoint.
        limit_bytes: of the group, and of the process as its budget.
        cache_dir: for what the process keeps.
        options: of `measure.py`.
        env: of the process.
        timeout_s: how long it may take.
        cold: start with an empty page cache.
    """
    command = [sys.executable, str(MEASURE), str(model), "--ram-budget", str(limit_bytes)]
    figures: dict[str, Any] = {"cold": cold and drop_page_cache()}
    start_s = time.perf_counter()
    with control_group(limit_bytes) as group:
        done = run_within(
            [*command, "--cache-dir", str(cache_dir), *options], group=group, env=env, timeout_s=timeout_s
        )
        figures |= {"group_peak_bytes": group.peak_bytes(), "kills": group.kills()}
    figures["wall_s"] = round(time.perf_counter() - start_s, 1)
    if isinstance(done, str):
        return figures | {"outcome": ERROR, "error": done}
    if figures["kills"]:
        return figures | {"outcome": KILLED, "error": failure(done)}
    if done.returncode not in (0, EXIT_REFUSED):
        return figures | {"outcome": ERROR, "error": failure(done)}
    figures |= json.loads(done.stdout.splitlines()[-1])
    return figures | {"outcome": conversation_outcome(figures)}


def measure_document(
    packed: Path,
    tokenizer: Path | None,
    limit_bytes: int,
    directory: Path,
    child: dict[str, str],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Ask two questions about a page through the command line, a process each; see `measure`."""
    model = with_tokenizer(packed, tokenizer, directory)
    page = directory / "page.png"
    draw_page(page)
    command = [sys.executable, "-c", _COMMAND_CODE, "generate", str(model), "--ram-budget", str(limit_bytes)]
    command += ["--cache-dir", str(directory / "cache"), "-i", str(page), "--json", "--stats", "--debug"]
    command += ["--max-new-tokens", str(ANSWER_TOKENS)]
    figures: dict[str, Any] = {"cold": drop_page_cache(), "turns": [], "swap_writes": 0, "swap_reads": 0}
    start_s = time.perf_counter()
    with control_group(limit_bytes) as group:
        for number, question in enumerate(QUESTIONS, 1):
            done = run_within([*command, "-p", question], group=group, env=child, timeout_s=arguments.timeout)
            if isinstance(done, str) or done.returncode:
                figures |= command_failure(done, number)
                break
            answer = json.loads(done.stdout)
            memory = answer["memory"]
            turn = {
                "prompt_tokens": answer["prompt_tokens"],
                "first_token_s": _rounded(answer["time_to_first_token_s"], 2),
                "token_per_s": _rounded(answer["tokens_per_s"], 3),
                "bytes_read_per_token": _rounded(answer["bytes_read_per_token"]),
                "bytes_written": memory["paging"]["bytes_written"],
                "new_tokens": answer["new_tokens"],
                "notes": answer["notes"],
            }
            figures["turns"].append(turn)
            figures["peak_rss_bytes"] = max(figures.get("peak_rss_bytes", 0), answer["peak_rss_bytes"])
            figures["frames_limit_bytes"] = memory["budget"]["frames_limit_bytes"]
            for name in ("swap_writes", "swap_reads"):
                figures[name] += memory["paging"][name]
            if "kv" in memory:
                figures["kv"] = memory["kv"]
        figures |= {"group_peak_bytes": group.peak_bytes(), "kills": group.kills()}
    figures["wall_s"] = round(time.perf_counter() - start_s, 1)
    if figures["kills"]:
        figures["outcome"] = KILLED
    return {"outcome": FINISHED} | figures


def conversation_outcome(figures: dict[str, Any]) -> str:
    """Return how a conversation ended that was neither killed nor failed."""
    if not figures.get("refused"):
        return FINISHED
    return REFUSED if (figures["turn"], figures["tokens_before"]) == (1, 0) else REFUSED_LATER


def command_failure(done: subprocess.CompletedProcess[str] | str, turn: int) -> dict[str, Any]:
    """Return how the command line ended.

    A refusal does not say how many tokens it had given out; its traceback (`--debug`) says whether it was decoding.
    """
    if isinstance(done, str):
        return {"outcome": ERROR, "error": done}
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = json.loads(done.stdout)["error"]
        if error["type"] == "MemoryBudgetExceeded":
            is_decoding = ", in _sample" in done.stderr and ", in _prefill" not in done.stderr
            tokens = None if is_decoding else 0
            refusal = {"refused": True, "turn": turn, "tokens_before": tokens, "error": error["message"]}
            return {**refusal, "outcome": conversation_outcome(refusal)}
    return {"outcome": ERROR, "error": failure(done)}


def run_within(
    command: list[str], *, group: Any, env: dict[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str] | str:
    """Run a command in a group; return the process, or in words that it took too long."""
    try:
        return run_in_group(command, group, env=env, timeout_s=timeout_s)
    except subprocess.TimeoutExpired:
        return f"not done within {timeout_s:g} s"


# --- files and processes ----------------------------------------------------------------------------------------------


def child_environment(*, avx2: bool) -> dict[str, str]:
    """Return the environment of a measurement; with `avx2`, libraries use no wider instructions."""
    kept = {key: value for key, value in os.environ.items() if key not in AVX2_ENVIRONMENT}
    kept |= {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    return kept | (AVX2_ENVIRONMENT if avx2 else {})


def compute_dtype(model: Path, env: dict[str, str]) -> str:
    """Return what a model is computed in with that environment; conversations that fail do not say."""
    command = [sys.executable, "-c", _DTYPE_CODE, str(model)]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip()


def pack(model: Path, cache_dir: Path) -> Path:
    """Return the packed form of a checkpoint, made now if it is not there."""
    from qwen3_vl_memory_optimizations.config import MemoryConfig
    from qwen3_vl_memory_optimizations.planning import pack_model
    from qwen3_vl_memory_optimizations.storage import Checkpoint

    if Checkpoint.open(model).packed:
        return model.resolve()
    return pack_model(model, MemoryConfig(cache_dir=cache_dir)).resolve()


@contextlib.contextmanager
def fresh_directory(cache_dir: Path) -> Iterator[Path]:
    """Make a directory for what one cell keeps, on the disk of the packed checkpoints; remove it afterwards."""
    cache_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="conversation-", dir=cache_dir.parent) as directory:
        yield Path(directory)


def with_tokenizer(packed: Path, tokenizer: Path | None, directory: Path) -> Path:
    """Return a checkpoint with a tokenizer: links to both, unless the checkpoint has one."""
    if tokenizer is None:
        return packed
    model = directory / packed.name
    model.mkdir()
    for source in (*tokenizer.resolve().iterdir(), *packed.iterdir()):
        link = model / source.name
        if source.is_file() and not link.exists():
            link.symlink_to(source)
    return model


def draw_page(path: Path) -> None:
    """Draw a page of text: A4 at 150 dots per inch."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("L", PAGE_PX, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(22)
    for number, top in enumerate(range(100, PAGE_PX[1] - 100, 34), 1):
        text = f"{number}. On day {7 * number % 31 + 1} the tank held {137 * number % 1000} litres, and the pump ran"
        draw.text((90, top), f"{text} for {53 * number % 240} minutes.", fill="black", font=font)
    image.save(path)


# --- tables -----------------------------------------------------------------------------------------------------------


def report(cells: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Give the lines of the tables: one per processor, dtype and kind of conversation."""
    cells = list(cells)
    groups = ("cpu", "isa", "compute_dtype", "model", "restart", "kind")
    order = {kind: number for number, kind in enumerate(KINDS)}
    keys = {tuple(cell[name] for name in groups) for cell in cells}
    for key in sorted(keys, key=lambda key: (*key[:-1], order[key[-1]])):
        rows = [cell for cell in cells if tuple(cell[name] for name in groups) == key]
        yield from table(dict(zip(groups, key, strict=True)), rows)


def table(group: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[str]:
    """Give the lines of one table, and above it what was measured on which machine."""
    dates, commits = sorted(row["date"] for row in rows), sorted({row["commit"] for row in rows})
    isa = "held to AVX2" if group["isa"] == "avx2" else "native"
    last = ", last turn in a new process" if group["restart"] else ""
    yield f"### {group['model']}, {group['kind']}, {group['compute_dtype'].removeprefix('torch.')} ({isa}){last}"
    yield ""
    here = rows[-1]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    yield f"{here['cpu']}, {here['cores']} cores, Linux {here['kernel']}, {versions}."
    yield f"{dates[0][:10]} to {dates[-1][:10]}, at {', '.join(commits)}."
    if warm := sum(not row["cold"] for row in rows):
        yield f"The page cache could not be dropped before {warm} of the cells."
    yield ""
    yield (
        "| limit | prompt | outcome | first token of each turn, s | tokens per second | peak of the group, GB "
        "| read per token, GB | blocks moved |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: (row["limit_bytes"], row["prompt"] or 0)):
        turns = row.get("turns", [])
        prompt = turns[0]["prompt_tokens"] if turns else row["prompt"]
        moved = row["swap_writes"] + row["swap_reads"] if "swap_writes" in row else None
        line = (
            f"{row['limit_bytes'] / 1e9:g} GB",
            "-" if prompt is None else f"{prompt}",
            outcome_text(row),
            _each(turns, "first_token_s", digits=1),
            _each(turns, "token_per_s", digits=2),
            f"{row['group_peak_bytes'] / 1e9:.2f}",
            _each(turns, "bytes_read_per_token", 1e9, digits=2),
            "-" if moved is None else f"{moved}",
        )
        yield f"| {' | '.join(line)} |"
    yield ""


def outcome_text(cell: dict[str, Any]) -> str:
    """Return the outcome of a cell with the turn that it ended in, and what was done to its images."""
    text = cell["outcome"]
    if cell["outcome"] == REFUSED_LATER:
        tokens = "some" if cell["tokens_before"] is None else cell["tokens_before"]
        text += f" (turn {cell['turn']}, after {tokens} tokens)"
    elif cell["outcome"] == ERROR:
        text += f" ({cell['error'][:120]})".replace("|", "/").replace("<", "&lt;")
    if any(turn.get("notes") for turn in cell.get("turns", [])):
        text += ", image scaled down"
    return text


def _each(turns: list[dict[str, Any]], name: str, scale: float = 1, *, digits: int) -> str:
    values = [turn.get(name) for turn in turns]
    return " / ".join("-" if value is None else f"{value / scale:.{digits}f}" for value in values) or "-"


def _rounded(value: float | None, digits: int = 0) -> float | None:
    return None if value is None else round(value, digits)


if __name__ == "__main__":
    main()
