import dataclasses
import time

from qwen3_vl_memory_optimizations.process import process_memory, rss_bytes


def test_process_memory_adds_up():
    memory = process_memory()
    assert memory.rss_bytes == memory.anonymous_bytes + memory.file_bytes
    assert 0 < memory.rss_bytes <= memory.peak_rss_bytes


def test_process_memory_counts_shared_memory_as_anonymous(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text(
        "Name:\tpython\nVmHWM:\t    900 kB\nVmRSS:\t    600 kB\n"
        "RssAnon:\t    300 kB\nRssFile:\t    200 kB\nRssShmem:\t    100 kB\n"
    )
    memory = process_memory(root=tmp_path)
    assert dataclasses.astuple(memory) == (600 * 1024, 400 * 1024, 200 * 1024, 900 * 1024)


def test_process_memory_without_proc(tmp_path):
    memory = process_memory(root=tmp_path)
    assert 0 < memory.anonymous_bytes == memory.rss_bytes <= memory.peak_rss_bytes


def test_rss_sees_an_allocation_and_is_fast():
    before = rss_bytes()
    block = bytearray(64 * 2**20)
    assert 50 * 2**20 < rss_bytes() - before < 90 * 2**20
    del block

    def seconds_per_call() -> float:
        start = time.perf_counter()
        for _ in range(200):
            rss_bytes()
        return (time.perf_counter() - start) / 200

    # The best of several: other work on the machine must not fail this.
    assert min(seconds_per_call() for _ in range(10)) < 50e-6
