"""Run a model: turns, budget, prompts in pieces, and response times."""
