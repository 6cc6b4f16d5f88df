"""Entry point of `python -m qwen3_vl_memory_optimizations` and of `qwen3vl-mem`; it imports the command line."""

import sys

_EXIT_INTERRUPTED = 130


def main() -> None:
    """Run the command line; Ctrl-C during its import prints one line, not a traceback."""
    try:
        from .cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(_EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
