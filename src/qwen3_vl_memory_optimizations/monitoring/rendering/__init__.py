"""Text, charts and reports of a run."""
