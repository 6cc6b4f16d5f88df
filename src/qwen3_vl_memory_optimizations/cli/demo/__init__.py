"""`qwen3vl-mem demo` and what it measures."""
