"""Run the stress test with many seeds: `python -m tests.stress 0 100`."""

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from tests.stress.machine import N_THREADS, Hung, Machine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("end", type=int)
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--directory", default="/dev/shm")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)
    failed = []
    for seed in range(arguments.first, arguments.end):
        start_s = time.monotonic()
        with tempfile.TemporaryDirectory(dir=arguments.directory, ignore_cleanup_errors=True) as directory:
            machine = Machine(Path(directory), seed)
            try:
                machine.run(arguments.operations // N_THREADS)
                assert not machine.failures, machine.failures[0]
                machine.close()
            except Exception as error:
                failed.append(seed)
                traceback.print_exc()
                if isinstance(error, Hung):
                    break  # its threads go on
        done, refused = (sum(getattr(each, name) for each in machine.workers) for name in ("done", "refused"))
        what = f"{time.monotonic() - start_s:.1f} s, {done} done, {refused} refused"
        print(f"seed {seed}: {what}, {sum(machine.met.values())} faults", flush=True)
    print(f"failed: {failed or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
