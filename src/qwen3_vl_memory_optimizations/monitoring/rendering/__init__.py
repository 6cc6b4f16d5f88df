"""Figures and records of a run as text, charts and reports."""
