"""What happens inside an optimizer, shown: snapshots, metrics, alerts."""

from .snapshot import take_snapshot

__all__ = ["take_snapshot"]
