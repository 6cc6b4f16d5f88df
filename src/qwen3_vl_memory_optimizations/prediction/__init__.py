"""Access history -> next use. Pure: fed events, asked questions; no I/O, no lock, no clock."""

from .residency import choose_kept
from .schedule import PassSchedule

__all__ = ["PassSchedule", "choose_kept"]
