"""The page on which a run is seen: served on this machine alone, while it runs or from its record."""

from .server import Dashboard, serve_run, start_dashboard

__all__ = ["Dashboard", "serve_run", "start_dashboard"]
