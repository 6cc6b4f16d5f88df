"""Recording of runs in memory and on disk."""
