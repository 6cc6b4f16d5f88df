"""Each row of `docs/compatibility.md` and `docs/checkpoints.md` names a test that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_ROW = re.compile(r"^\|(?!-)(.+)\|$", re.MULTILINE)
_TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")


def rows(page: Path) -> list[str]:
    """The last cells of the rows of tables whose last column is `test`."""
    cells, of_tests = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        row = _ROW.match(line)
        if row is None:
            of_tests = of_tests and line.startswith("|")
        elif row[1].split("|")[-1].strip() == "test":
            of_tests = True
        elif of_tests:
            cells.append(row[1].split(" | ")[-1].strip())
    return cells


@pytest.mark.parametrize("page", ["compatibility.md"])
def test_each_row_is_held_by_a_test(page):
    found = rows(ROOT / "docs" / page)
    assert len(found) > 40
    for cell in found:
        named = _TEST.fullmatch(cell)
        if named is None:
            assert cell == "not tested", cell
            continue
        path = ROOT / "tests" / named[1]
        assert path.is_file() and f"def {named[2]}(" in path.read_text(encoding="utf-8"), cell
