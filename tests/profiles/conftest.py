from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def user_directory(tmp_path_factory, monkeypatch) -> Path:
    """Return an empty directory for the user's profiles: none of the person who runs the tests count."""
    base = tmp_path_factory.mktemp("config")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(base))
    directory = base / "qwen3vl-mem/profiles"
    directory.mkdir(parents=True)
    return directory
