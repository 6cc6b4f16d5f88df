"""The command line, `python -m qwen3_vl_memory_optimizations` or `qwen3vl-mem`: what it needs is imported here."""

import sys

_EXIT_INTERRUPTED = 130


def main() -> None:
    """Run the command line; Ctrl-C while it is imported is a line, not a traceback."""
    try:
        from .cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(_EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
