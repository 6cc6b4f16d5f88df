import json

from safetensors import safe_open


def test_a_checkpoint_is_packed_once(run, tiny, tmp_path):
    first = run("pack", tiny, "--cache-dir", tmp_path)
    assert first.exit_code == 0, first.stderr
    assert "packed in" in first.stdout
    assert "10.8 MB -> " in first.stdout
    directory = first.stdout.strip().splitlines()[-1]
    assert directory.startswith(str(tmp_path))

    second = run("pack", tiny, "--cache-dir", tmp_path)
    assert second.exit_code == 0
    assert "is packed already" in second.stdout
    assert second.stdout.strip().splitlines()[-1] == directory


def test_json_says_where_and_how_large(run, tiny, tmp_path):
    packed = json.loads(run("pack", tiny, "--cache-dir", tmp_path, "--json").stdout)
    assert set(packed) == {
        "directory",
        "codec",
        "already_packed",
        "source_bytes",
        "packed_bytes",
        "seconds",
    }
    assert not packed["already_packed"]
    assert packed["packed_bytes"] < packed["source_bytes"] / 3
    with safe_open(f"{packed['directory']}/model.safetensors", framework="pt") as checkpoint:
        assert "model.language_model.norm.weight" in checkpoint.keys()
    again = json.loads(run("pack", tiny, "--cache-dir", tmp_path, "--json").stdout)
    assert again["already_packed"]
    assert again["seconds"] is None
