"""What `KVStore` keeps of sequences, and finds again: the blocks themselves, in memory and in files."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import pytest
import torch

from qwen3_vl_memory_optimizations.cache import SSDCache
from qwen3_vl_memory_optimizations.model.kv.attention import ATTENTION
from qwen3_vl_memory_optimizations.model.kv.cache import ManagedKVCache
from qwen3_vl_memory_optimizations.model.kv.files import tail_key
from qwen3_vl_memory_optimizations.model.kv.layer import ManagedKVLayer
from qwen3_vl_memory_optimizations.model.kv.store import KVStore
from qwen3_vl_memory_optimizations.paging import BlockSpace
from tests.paging.weights import settle

LAYERS, HEADS, HEAD_DIM, BLOCK = 3, 2, 32, 32
MIB = 2**20
ROOT = "root"


def config():
    found = SimpleNamespace(num_hidden_layers=LAYERS, _attn_implementation=ATTENTION)
    found.get_text_config = lambda decoder=True: found
    return found


class Machine:
    """A store in one process, and caches whose keys and values follow from the tokens."""

    def __init__(self, optimizer, directory, codec="int8", most_bytes=1 << 30):
        self.optimizer, self.pager, self.codec = optimizer, optimizer.pager, codec
        self.files = None if directory is None else SSDCache(1 << 30, directory)
        self.store = KVStore(BlockSpace(self.pager), self.files, most_bytes)

    def cache(self, batch=1):
        cache = ManagedKVCache(config(), codec=self.codec, pager=self.pager, block_tokens=BLOCK, keeps_all=False)
        for layer in cache.layers:
            layer.begin(batch, HEADS, HEAD_DIM, torch.float32)
        return cache

    def append(self, cache, rows):
        """Compute some tokens of each row: what they are decides their keys and values."""
        for index, layer in enumerate(cache.layers):
            layer.update(*states_of(rows, index))
            layer.settle()

    def run(self, tokens, **options):
        """Compute a sequence behind what is known, and let it rest; return how many tokens were known, and the cache's
        blocks."""
        cache = self.cache()
        match = self.store.find([*tokens, 0], ROOT, cache)
        past = self.store.adopt(match, cache) if match.n_tokens(BLOCK) else 0
        if past < len(tokens):
            self.append(cache, [tokens[past:]])
        assert_holds(cache, tokens, self.codec)
        blocks = [[stored.block for stored in layer.rows[0]] for layer in cache.layers]
        self.store.rest(cache, 0, tokens, ROOT, **{"persist": True, "saved_s": 1.0, **options})
        return past, blocks


def states_of(rows, layer):
    """Return keys and values `[batch, heads, tokens, head_dim]` of tokens."""
    sides = []
    for side in (0, 1):
        states = [
            torch.randn((HEADS, HEAD_DIM), generator=torch.Generator().manual_seed(hash((token, layer, side)) % 2**31))
            for row in rows
            for token in row
        ]
        sides.append(torch.stack(states).view(len(rows), -1, HEADS, HEAD_DIM).transpose(1, 2))
    return sides


def assert_holds(cache, tokens, codec, row=0):
    for index, layer in enumerate(cache.layers):
        assert layer.get_seq_length() == len(tokens)
        for found, expected in zip(layer.decoded(), states_of([tokens], index), strict=True):
            tolerance = {"none": 0.0, "int8": 0.05}[codec]
            assert float((found[row] - expected[0]).abs().max()) <= tolerance


@pytest.fixture
def start(make_optimizer, tmp_path):
    """Begin a process on one directory of files, within a budget."""

    def start(directory=tmp_path / "files", budget=64 * MIB, **options):
        return Machine(make_optimizer(budget), directory, **options)

    return start


def tokens_of(n_tokens, seed=0):
    return torch.randint(100, 10**6, (n_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def count_calls(monkeypatch, owner, name):
    calls, plain = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(args) or plain(*args, **kwargs))
    return calls


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_what_is_known_is_taken_as_it_lies_and_nothing_is_decoded_encoded_or_copied(start, codec, monkeypatch):
    machine, tokens = start(None, codec=codec), tokens_of(300)
    assert machine.run(tokens)[0] == 0
    n_blocks = (300 - 64) // BLOCK
    held = machine.pager.frames.used_bytes
    encoded = machine.pager.encodings.rows()["kv_cache"]
    decoded = count_calls(monkeypatch, ManagedKVLayer, "_decode")
    made = count_calls(monkeypatch, ManagedKVLayer, "_new_block")

    cache = machine.cache()
    match = machine.store.find([*tokens, 1], ROOT, cache)
    assert machine.store.adopt(match, cache) == 300
    assert not decoded and not made
    assert machine.pager.encodings.rows()["kv_cache"] == encoded
    assert machine.pager.frames.used_bytes == held
    stats = machine.store.stats()
    assert (stats["lookups"], stats["hits"], stats["reused_tokens"]) == (2, 1, 300)
    assert stats["blocks_shared"] == LAYERS * n_blocks and stats["tails_continued"] == 1
    assert (stats["tails_copied"], stats["blocks_from_ssd"], stats["blocks_written"]) == (0, 0, 0)
    assert stats["resting_blocks"] == LAYERS * n_blocks and stats["resting_tails"] == 0
    assert_holds(cache, tokens, codec)


def test_a_whole_tail_is_gone_on_in_where_it_lies(start):
    machine, tokens = start(None), tokens_of(100)
    machine.run(tokens)
    (rested,) = (tail for kept in machine.store.index._tails.values() for tail in kept)
    addresses = [block.data.data_ptr() for block in rested.layers]
    more = [*tokens, *tokens_of(10, seed=1)]
    assert machine.run(more)[0] == 100
    (rested,) = (tail for kept in machine.store.index._tails.values() for tail in kept)
    assert [block.data.data_ptr() for block in rested.layers] == addresses
    assert machine.store.stats()["tails_continued"] == 1 and machine.store.stats()["tails_copied"] == 0


def test_of_a_tail_that_differs_the_equal_part_is_copied(start):
    machine, tokens = start(None), tokens_of(100)
    machine.run(tokens)
    other = [*tokens[:80], *tokens_of(30, seed=1)]
    assert machine.run(other)[0] == 80
    stats = machine.store.stats()
    assert (stats["tails_continued"], stats["tails_copied"], stats["resting_tails"]) == (0, 1, 2)
    assert machine.run([*tokens, 5])[0] == 100  # the first one is as it was
    assert machine.run([*other, 5])[0] == 110


def test_at_least_one_token_is_left_to_compute(start):
    machine, tokens = start(None), tokens_of(200)
    machine.run(tokens)
    for length in (1, BLOCK, BLOCK + 1, 128, 200):
        match = machine.store.find(tokens[:length], ROOT, machine.cache())
        assert match.n_tokens(BLOCK) < length
    match = machine.store.find(tokens, ROOT, machine.cache())
    assert match.n_tokens(BLOCK) == 199


def test_another_root_shares_nothing(start):
    machine, tokens = start(), tokens_of(200)
    machine.run(tokens)
    machine.store.flush()
    assert machine.store.find(tokens, "another", machine.cache()).n_tokens(BLOCK) == 0


def test_prompts_that_share_a_beginning_share_its_blocks(start):
    machine, shared = start(None), tokens_of(128)
    first, second = ([*shared, *tokens_of(160, seed=seed)] for seed in (1, 2))
    _, one = machine.run(first)
    past, two = machine.run(second)
    assert past == 128
    for layer in range(LAYERS):
        assert [a is b for a, b in zip(one[layer], two[layer], strict=True)] == [True] * 4 + [False] * 3
    assert machine.store.stats()["resting_blocks"] == LAYERS * (4 + 3 + 3)


def test_a_sequence_that_was_computed_again_leaves_no_second_copy(start):
    machine, tokens = start(None), tokens_of(200)
    cache = machine.cache()
    machine.append(cache, [tokens])
    machine.run(tokens)
    before = machine.store.stats()
    machine.store.rest(cache, 0, tokens, ROOT, persist=False, saved_s=1.0)
    assert machine.store.stats()["resting_blocks"] == before["resting_blocks"]


def test_the_blocks_of_a_row_of_a_batch_are_found(start):
    machine, rows = start(None), [tokens_of(200, seed=seed) for seed in (1, 2, 3)]
    cache = machine.cache(batch=3)
    machine.append(cache, rows)
    for row in (0, 2):
        machine.store.rest(cache, row, rows[row], ROOT, persist=False, saved_s=1.0)
    n_known = (200 - 64) // BLOCK * BLOCK
    assert [machine.run(tokens)[0] for tokens in rows] == [n_known, 0, n_known]
    stats = machine.store.stats()
    assert stats["tails_continued"] == stats["tails_copied"] == 0


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 64 * MIB])
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_after_a_restart_blocks_and_tail_come_from_files(start, codec, budget):
    first, tokens = start(codec=codec, budget=budget), tokens_of(300)
    _, before = first.run(tokens)
    expected = [[block.data.clone() for block in layer] for layer in before]
    first.store.close()
    n_blocks = (300 - 64) // BLOCK
    assert first.store.stats()["blocks_written"] == LAYERS * (n_blocks + 1)

    machine = start(codec=codec, budget=budget)
    past, blocks = machine.run([*tokens, *tokens_of(20, seed=1)])
    assert past == 300
    for layer, theirs in zip(blocks, expected, strict=True):
        for block, bits in zip(layer[:n_blocks], theirs, strict=True):
            with machine.store.space.held([block]):
                assert torch.equal(block.data, bits)
    stats = machine.store.stats()
    assert stats["blocks_from_ssd"] == LAYERS * (n_blocks + 1)
    assert stats["corrupt"] == 0 and stats["tails_continued"] == 1
    machine.store.close()
    written = start(codec=codec, budget=budget)
    assert written.run([*tokens, *tokens_of(20, seed=1)])[0] == 320


def damage(machine, key):
    """Change a byte of the payload of a file; return its path."""
    path = machine.files.store_files._path(key)
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)
    return path


def names_of(tokens):
    from qwen3_vl_memory_optimizations.model.kv.naming import block_names

    return block_names(tokens, ROOT, BLOCK)


@pytest.mark.parametrize("budget", [None, 64 * MIB])
def test_a_damaged_block_is_a_miss_and_its_file_is_removed(start, caplog, budget):
    first, tokens = start(budget=budget), tokens_of(300)
    first.run(tokens)
    first.store.close()
    machine, names = start(budget=budget), names_of(tokens)
    path = damage(machine, names[3])
    files = set(path.parent.parent.rglob("*"))
    with caplog.at_level(logging.WARNING):
        match = machine.store.find(tokens, ROOT, machine.cache())
    assert match.n_tokens(BLOCK) == 3 * BLOCK
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "removed corrupt" in caplog.text and str(path.name) in caplog.text
    assert machine.store.stats()["corrupt"] == 1
    assert {each for each in files if not each.exists()} == {path}
    assert machine.run(tokens)[0] == 3 * BLOCK
    machine.store.close()
    assert start(budget=budget).run([*tokens, 1])[0] == 300  # it was written again


def test_a_damaged_tail_is_a_miss_and_its_file_is_removed(start, caplog):
    first, tokens = start(), tokens_of(300)
    first.run(tokens)
    first.store.close()
    machine, names = start(), names_of(tokens)
    n_blocks = (300 - 64) // BLOCK
    damage(machine, tail_key(names[n_blocks - 1]))
    with caplog.at_level(logging.WARNING):
        assert machine.run(tokens)[0] == n_blocks * BLOCK
    assert "removed corrupt" in caplog.text
    assert machine.store.stats()["corrupt"] == 1
    machine.store.flush()
    assert machine.store.stats()["resting_tails"] == 1


def test_a_file_of_another_shape_is_not_used(start):
    first, tokens = start(codec="none"), tokens_of(300)
    first.run(tokens)
    first.store.close()
    machine = start(codec="int8")
    assert machine.run(tokens)[0] == 0
    assert machine.store.stats()["corrupt"] == 0


def test_what_lies_in_a_file_leaves_memory_without_being_written(start):
    machine, tokens = start(), tokens_of(300)
    _, blocks = machine.run(tokens)
    machine.store.flush()
    expected = [[block.data.clone() for block in layer] for layer in blocks]
    entries = [block.entry for layer in blocks for block in layer]
    assert all(entry.source is not None for entry in entries)
    swapped = machine.pager.swap_used_bytes
    with machine.pager._lock:
        for page in (page for entry in entries for page in entry.pages):
            machine.pager._mover.evict(page)
    settle(machine.pager)
    assert all(entry.missing for entry in entries)
    assert machine.pager.swap_used_bytes == swapped
    for layer, theirs in zip(blocks, expected, strict=True):
        for block, bits in zip(layer, theirs, strict=True):
            with machine.store.space.held([block]):
                assert torch.equal(block.data, bits)
    assert machine.run([*tokens, 1])[0] == 300


def test_in_private_mode_and_where_the_model_is_not_that_of_a_file_nothing_is_written(start, tmp_path):
    private, tokens = start(None), tokens_of(300)
    private.run(tokens)
    private.store.close()
    machine = start()
    machine.run(tokens, persist=False)
    machine.store.close()
    assert machine.store.stats()["blocks_written"] == private.store.stats()["blocks_written"] == 0
    assert not list((tmp_path / "files").rglob("*.*")) or not machine.files.store_files.index().entries


def test_a_tail_of_a_file_is_read_where_it_goes_on_with_the_prompt_and_once(start):
    first, tokens = start(), tokens_of(90)
    first.run(tokens)
    first.store.close()
    machine = start()
    for seed in (1, 2, 3):  # prompts that begin in another way
        machine.store.find(tokens_of(90, seed=seed), ROOT, machine.cache())
    assert machine.store.stats()["blocks_from_ssd"] == 0
    for end in (1, 2, 3):
        assert machine.run([*tokens[:80], end])[0] == 80
    assert machine.store.stats()["blocks_from_ssd"] == LAYERS
    assert machine.store.stats()["resting_tails"] == 4


def test_a_tail_that_is_gone_on_in_while_it_is_written_leaves_no_file(start, monkeypatch):
    machine, tokens = start(), tokens_of(90)
    writes, goes_on = threading.Event(), threading.Event()
    plain = machine.files.store_encoded

    def slow(key, *args, **kwargs):
        if key == tail_key(ROOT) and not writes.is_set():
            writes.set()
            assert goes_on.wait(20)
        return plain(key, *args, **kwargs)

    monkeypatch.setattr(machine.files, "store_encoded", slow)
    machine.run(tokens)
    assert writes.wait(20)
    more = [*tokens, *tokens_of(100, seed=1)]  # its first block is encoded, and the rest of the tail moves
    assert machine.run(more, persist=False)[0] == 90
    goes_on.set()
    machine.store.close()
    assert machine.files.store_files.size_of(tail_key(ROOT)) is None
    assert machine.store._writer.failures == 0


def test_a_writer_that_fails_goes_on_with_the_next(start, monkeypatch, caplog):
    machine, tokens = start(), tokens_of(300)
    plain, calls = machine.files.store_encoded, []

    def fails_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("no")
        return plain(*args, **kwargs)

    monkeypatch.setattr(machine.files, "store_encoded", fails_once)
    machine.run(tokens)
    machine.store.close()
    assert machine.store._writer.failures == 1 and "could not be written" in caplog.text
    assert len(machine.files.store_files.index().entries) == (300 - 64) // BLOCK


# --- forgetting -------------------------------------------------------------------------------------------------------


def test_the_longest_unused_is_forgotten_to_keep_within_the_size(start):
    size = start(None)
    size.run(tokens_of(300, seed=1))
    one = size.store.stats()["resting_bytes"]
    machine = start(None, most_bytes=int(2.5 * one))
    for seed in (1, 2, 3, 4):
        machine.run(tokens_of(300, seed=seed))
        assert machine.store.stats()["resting_bytes"] <= 2.5 * one
    assert machine.store.stats()["dropped"] > 0
    known = [
        machine.store.find([*tokens_of(300, seed=seed), 0], ROOT, machine.cache()).n_tokens(BLOCK)
        for seed in (1, 2, 3, 4)
    ]
    assert known[0] == 0 and known[3] == 300 and known == sorted(known)
    machine.store.index.clear()
    stats = machine.store.stats()
    assert stats["resting_bytes"] == stats["resting_blocks"] == stats["resting_tails"] == 0


def test_what_is_forgotten_gives_its_memory_back(start):
    machine = start(None, most_bytes=0)
    held = machine.pager.frames.used_bytes
    machine.run(tokens_of(300))
    machine.pager.usage()  # runs what finalizers left
    assert machine.store.stats()["resting_bytes"] == 0
    assert machine.pager.frames.used_bytes == held


def test_more_than_fits_into_memory_rests_in_the_swap_file(start):
    machine = start(None, budget=8 * MIB)
    prompts = [tokens_of(400, seed=seed) for seed in range(48)]
    for tokens in prompts:
        assert machine.run(tokens)[0] == 0
    assert machine.store.stats()["resting_bytes"] > 8 * MIB
    assert machine.pager.frames.peak_bytes <= 8 * MIB
    assert all(machine.run([*tokens, 1])[0] >= (400 - 64) // BLOCK * BLOCK for tokens in prompts)
    assert machine.pager.frames.peak_bytes <= 8 * MIB
