"""The dashboard of a live or recorded run, served on this machine only."""

from .server import Dashboard, serve_run, start_dashboard

__all__ = ["Dashboard", "serve_run", "start_dashboard"]
