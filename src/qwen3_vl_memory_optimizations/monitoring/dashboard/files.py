"""Location of the static files of the page."""

from __future__ import annotations

from pathlib import Path

STATIC = Path(__file__).parent / "static"
