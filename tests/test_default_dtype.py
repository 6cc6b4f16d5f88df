"""No tensor of the package has the default dtype of the application, which may be any."""

from __future__ import annotations

import ast
from pathlib import Path

import qwen3_vl_memory_optimizations

MAKERS = {"empty", "zeros", "ones", "rand", "randn", "linspace", "eye", "logspace", "hann_window"}


def makers(path: Path) -> list[str]:
    """Calls that make a tensor and name no dtype."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "torch"
            and node.func.attr in MAKERS
            and not any(keyword.arg == "dtype" for keyword in node.keywords)
        ):
            found.append(f"{path.name}:{node.lineno} torch.{node.func.attr}")
    return found


def test_every_tensor_names_its_dtype():
    package = Path(qwen3_vl_memory_optimizations.__file__).parent
    assert [each for path in sorted(package.rglob("*.py")) for each in makers(path)] == []
