"""`qwen3vl-mem doctor` and its measurements."""
