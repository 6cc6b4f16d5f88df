"""`qwen3vl-mem generate`: its arguments, pictures, questions and output."""
