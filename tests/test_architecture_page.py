"""The walks of docs/architecture.md name files and functions that exist."""

import ast
import re
from pathlib import Path

import qwen3_vl_memory_optimizations

PACKAGE = Path(qwen3_vl_memory_optimizations.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"


def walk_rows():
    """Return the file and the names of each row of a walk."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        places = [n for n, cell in enumerate(cells[:2]) if re.fullmatch(r"`[\w/]+\.py`", cell)]
        if line.startswith("|") and places:
            names = re.findall(r"`(\w+)`", cells[places[0] + 1])
            found.append((cells[places[0]].strip("`"), names))
    return found


def test_every_step_of_a_walk_names_functions_that_are_in_its_file():
    rows = walk_rows()
    assert len(rows) > 50
    for file, names in rows:
        assert names, file
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        kinds = (ast.FunctionDef, ast.ClassDef)
        defined = {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
        assert set(names) <= defined, (file, set(names) - defined)


def test_every_file_that_the_page_names_exists():
    for file in re.findall(r"`((?:\w+/)+\w+\.py)`", PAGE.read_text(encoding="utf-8")):
        assert (PACKAGE / file).is_file() or (PAGE.parents[1] / file).is_file(), file
