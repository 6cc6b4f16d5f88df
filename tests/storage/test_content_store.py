"""The store of entries on the SSD: real files, real processes, real kills."""

import json
import os
import random
import stat
import subprocess
import sys
import threading

import pytest

from qwen3_vl_memory_optimizations.errors import CorruptDataError, StorageError
from qwen3_vl_memory_optimizations.storage import ContentStore, Index, StoredEntry

LIMIT_BYTES = 400_000


def key_of(i):
    return f"{i:064x}"


def content_of(i):
    return random.Random(i).randbytes(random.Random(-i).randrange(0, 40_000))


def oldest_first(index, file_bytes):
    victims, needed = [], index.used_bytes + file_bytes - LIMIT_BYTES
    for key, entry in index.entries.items():
        if needed <= 0:
            break
        victims.append(key)
        needed -= entry.n_bytes
    return victims


def put(store, i):
    content = memoryview(content_of(i))
    return store.put(key_of(i), {"i": i}, [content[:100], content[100:]], {"note": i}, oldest_first)


def files_of(store):
    return [path for path in store.directory.rglob("*") if path.is_file()]


@pytest.fixture
def store(tmp_path):
    return ContentStore(tmp_path / "store")


def test_what_was_put_is_read_by_this_and_by_another_store(store):
    for i in range(5):
        assert put(store, i)
    for reader in (store, ContentStore(store.directory)):
        for i in range(5):
            loaded = reader.read(key_of(i))
            assert (bytes(loaded.payload), loaded.meta) == (content_of(i), {"i": i})
        assert reader.read(key_of(9)) is None
        assert {key: entry.facts for key, entry in reader.index().entries.items()} == {
            key_of(i): {"note": i} for i in range(5)
        }
    assert store.verify() == []


def test_nothing_is_made_until_something_is_put(store):
    assert store.read(key_of(1)) is None
    store.remove(key_of(1))
    store.flush()
    assert (store.clear(), store.verify()) == (0, [])
    assert not store.directory.exists()


def test_only_the_user_can_look_into_it(store):
    store.directory.mkdir(mode=0o755)
    os.chmod(store.directory, 0o755)
    put(store, 1)
    for path in (store.directory, *store.directory.rglob("*")):
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_it_stays_within_its_limit(store):
    for i in range(60):
        assert put(store, i)
    sizes = {path.name: path.stat().st_size for path in files_of(store) if len(path.name) == 64}
    assert 0 < sum(sizes.values()) <= LIMIT_BYTES
    assert sizes == {key: entry.n_bytes for key, entry in store.index().entries.items()}
    assert store.read(key_of(59)) is not None
    assert store.read(key_of(0)) is None


def test_make_room_can_refuse(store):
    put(store, 1)
    assert not store.put(key_of(2), {}, [memoryview(b"x")], {}, lambda index, file_bytes: None)
    assert store.read(key_of(2)) is None
    assert store.read(key_of(1)) is not None


@pytest.mark.parametrize("damage", ["payload", "header", "cut", "longer", "other key", "empty", "text", "symlink"])
def test_what_is_not_the_entry_is_an_error_and_no_answer(store, damage, tmp_path):
    put(store, 1)
    put(store, 3)
    path = next(path for path in files_of(store) if path.name == key_of(1))
    whole = path.read_bytes()
    assert len(content_of(1)) > 5000
    path.unlink()
    damaged = {
        "payload": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
        "header": whole[:60] + bytes([whole[60] ^ 1]) + whole[61:],
        "cut": whole[:-4096],
        "longer": whole + bytes(4096),
        "other key": next(path for path in files_of(store) if path.name == key_of(3)).read_bytes(),
        "empty": b"",
        "text": b"hello\n",
    }
    if damage == "symlink":
        (tmp_path / "elsewhere").write_bytes(whole)
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_bytes(damaged[damage])
    with pytest.raises(CorruptDataError, match=key_of(1)):
        store.read(key_of(1))
    assert [name for name, _ in store.verify()] == [str(path.relative_to(store.directory))]
    store.remove(key_of(1))
    assert store.read(key_of(1)) is None
    assert store.verify() == []


def test_a_file_that_is_none_of_its_own_is_reported_and_left_alone(store):
    put(store, 1)
    foreign = store.directory / "objects" / "00" / "notes.txt"
    foreign.write_text("mine")
    assert [name for name, _ in store.verify()] == ["objects/00/notes.txt"]
    store.clear()
    assert foreign.read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"entries": 3, "state": {}}', None])
def test_a_lost_index_is_made_again(store, text, caplog):
    for i in range(3):
        put(store, i)
    index = store.directory / "index.json"
    index.unlink() if text is None else index.write_text(text)
    again = ContentStore(store.directory)
    put(again, 7)
    entries = again.index().entries
    assert {key: entry.facts for key, entry in entries.items()} == {key_of(i): {"note": i} for i in (0, 1, 2, 7)}
    assert (text is None) == (caplog.text == "")


def test_notes_are_written_with_the_next_change_or_when_asked(store):
    put(store, 1)
    store.note(key_of(1), lambda facts: facts.update(uses=1))
    store.note(key_of(1), lambda facts: facts.update(uses=facts["uses"] + 1))
    store.note(key_of(8), lambda facts: facts.update(uses=1))
    assert "uses" not in ContentStore(store.directory).index().entries[key_of(1)].facts
    store.flush(lambda state: state.update(clock=3))
    stored = json.loads((store.directory / "index.json").read_text())
    assert stored["entries"][key_of(1)][1] == {"note": 1, "uses": 2}
    assert stored["state"] == {"clock": 3}


def test_a_directory_of_another_user_is_refused(store, monkeypatch):
    store.directory.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)
    with pytest.raises(StorageError, match="another user"):
        put(store, 1)


def test_where_it_cannot_be_written_nothing_is_lost(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        put(ContentStore(tmp_path / "file" / "store"), 1)


def test_a_lock_that_is_held_for_too_long_means_no_entry(tmp_path, caplog):
    ticks = iter(range(0, 1000, 3))
    store = ContentStore(tmp_path / "store", clock=lambda: next(ticks))
    with ContentStore(tmp_path / "store")._locked() as held:
        assert held
        assert not put(store, 1)
    assert "held the lock" in caplog.text
    assert put(store, 1)


def test_threads_share_one_store(store):
    def work(first):
        for i in range(first, first + 8):
            assert put(store, i)
            assert store.read(key_of(i)) is None or bytes(store.read(key_of(i)).payload) == content_of(i)

    threads = [threading.Thread(target=work, args=(8 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.verify() == []
    assert len(store.index().entries) > 5


KILLS = """
import json, os, random, signal, sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tests.storage.test_content_store import ContentStore, LIMIT_BYTES, content_of, files_of, key_of, put

directory, delays = Path(sys.argv[1]), random.Random(11)
killed = served = 0
put(ContentStore(directory), 0)
for point in range(200):
    child = os.fork()
    if child == 0:
        numbers = random.Random(point)
        store = ContentStore(directory)
        while True:
            put(store, numbers.randrange(1, 300))
            store.read(key_of(numbers.randrange(1, 300)))
    time.sleep(delays.uniform(0.0, 0.012))
    os.kill(child, signal.SIGKILL)
    killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    store = ContentStore(directory)
    used = 0
    for path in files_of(store):
        if len(path.name) == 64:
            used += path.stat().st_size
            i = int(path.name, 16)
            assert bytes(store.read(path.name).payload) == content_of(i), (point, i)
            served += 1
    assert used <= LIMIT_BYTES, (point, used)
    assert store.verify() == [], point
    assert put(store, 300 + point), point
    assert bytes(store.read(key_of(300 + point)).payload) == content_of(300 + point)
print(json.dumps([killed, served]))
"""


def run(code, *arguments):
    root = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments), root], stdout=subprocess.PIPE, text=True, cwd=root
    )


def test_killed_at_200_moments_it_answers_nothing_wrong_and_stays_bounded(tmp_path):
    process = run(KILLS, tmp_path / "store")
    output = process.communicate()[0]
    assert process.returncode == 0
    killed, served = json.loads(output)
    assert killed == 200
    assert served > 1000


SHARES = """
import sys
sys.path.insert(0, sys.argv[3])
from tests.storage.test_content_store import ContentStore, content_of, key_of, put
import random
store, numbers = ContentStore(sys.argv[1]), random.Random(sys.argv[2])
for _ in range(150):
    i = numbers.randrange(40)
    put(store, i)
    loaded = store.read(key_of(numbers.randrange(40)))
    if loaded is not None:
        assert bytes(loaded.payload) == content_of(loaded.meta["i"])
"""


def test_two_processes_share_one_directory(tmp_path):
    processes = [run(SHARES, tmp_path / "store", name) for name in ("a", "b")]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    store = ContentStore(tmp_path / "store")
    assert store.verify() == []
    sizes = {path.name: path.stat().st_size for path in files_of(store) if len(path.name) == 64}
    assert sizes == {key: entry.n_bytes for key, entry in store.index().entries.items()}
    assert sum(sizes.values()) <= LIMIT_BYTES


def test_bytes_are_counted_while_another_thread_adds_an_entry():
    index = Index()

    class AnotherComes:
        @property
        def n_bytes(self):
            index.entries[key_of(1)] = StoredEntry(1, {})
            return 1

    index.entries[key_of(0)] = AnotherComes()
    assert index.used_bytes == 1


@pytest.mark.parametrize("key", ["../../outside", "", "A" * 64, "0" * 63, "0" * 64 + "\n", "..", "/etc/passwd"])
def test_a_key_that_is_none_names_no_file_also_without_assertions(store, key):
    put(store, 0)
    before = files_of(store)
    for use in (
        lambda: store.size_of(key),
        lambda: store.read(key),
        lambda: store.remove(key),
        lambda: store.put(key, None, [memoryview(b"x")], {}, lambda index, n_bytes: []),
    ):
        with pytest.raises(StorageError, match="not a key of this store") as caught:
            use()
        assert caught.value.path == store.directory
    assert files_of(store) == before and list(store.index().entries) == [key_of(0)]
