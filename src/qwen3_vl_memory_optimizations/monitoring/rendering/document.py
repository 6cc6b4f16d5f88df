"""The frame of a report: one HTML file that fetches nothing and runs no script."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ...errors import StorageError
from ..dashboard.files import STATIC
from .formatting import NOT_MEASURED


def document(title: str, content: str) -> str:
    """Return a page with the style of reports.

    Args:
        title: text of its title and first heading.
        content: HTML below the heading.
    """
    style = (STATIC / "report.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{style}</style></head><body><main><h1>{escape(title)}</h1>{content}</main></body></html>\n"
    )


def section(title: str, content: str) -> str:
    """Return a section with a heading."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def folded(title: str, content: str) -> str:
    """Return a section that is closed until the reader opens it."""
    return f"<details><summary><h2>{escape(title)}</h2></summary>{content}</details>"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], nothing: str = NOT_MEASURED) -> str:
    """Return a table of texts; without rows, `nothing` is shown."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    body = body or f'<tr><td colspan="{len(headings)}" class="absent">{escape(nothing)}</td></tr>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def write_document(text: str, output: Path) -> Path:
    """Write a report and return its path.

    Raises:
        StorageError: it cannot be written; an existing file is kept.
    """
    partial = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{output}: the report cannot be written: {error.strerror}", path=output) from error
    return output
