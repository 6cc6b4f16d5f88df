"""What is kept on the SSD, in groups that a user recognizes: a picture, or the keys and values of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigurationError
from ..storage import ContentStore, Facts, StoredEntry

PICTURES, UNKNOWN = "pictures", "unknown"
_VISION = "vision"
_LEAST_DIGITS = 4


@dataclass(frozen=True, slots=True)
class KeptResult:
    """Entries that belong together: the features of a picture, or blocks and tails that begin with the same tokens.

    Attributes:
        key: of the entry used last; its beginning names the result.
        label: file names and the beginning of the prompt; `None`: not known.
        kind: `pictures`, `keys and values`, or what the entries were stored as.
        keys: of all entries.
        n_bytes: size of the files.
        hits: times found again, of the entry found most often.
        saved_s: expected seconds saved per hit, of all entries together; `None`: not known.
        made_at, used_at: seconds since 1970; `None`: not known.
    """

    key: str
    label: str | None
    kind: str
    keys: list[str]
    n_bytes: int
    hits: int
    saved_s: float | None
    made_at: float | None
    used_at: float | None


def kept_results(store: ContentStore) -> list[KeptResult]:
    """Return what is kept, most recently used first."""
    groups: dict[tuple[str, str], list[tuple[str, StoredEntry]]] = {}
    for key, entry in store.index().entries.items():
        group = entry.facts.get("group")
        groups.setdefault((kind_of(entry.facts), group if isinstance(group, str) else key), []).append((key, entry))
    results = [_result(kind, entries) for (kind, _), entries in groups.items()]
    return sorted(results, key=lambda result: result.used_at or 0.0, reverse=True)


def kind_of(facts: Facts) -> str:
    """Return the kind of an entry, without the digest of the model that computed it."""
    kind = str(facts.get("kind") or UNKNOWN)
    return PICTURES if kind.split(" ")[0] == _VISION else kind


def find_result(store: ContentStore, key: str) -> KeptResult:
    """Return the result that has an entry whose key begins with `key`.

    Raises:
        ConfigurationError: there is none, or more than one.
    """
    found = [result for result in kept_results(store) if any(each.startswith(key) for each in result.keys)]
    if len(found) != 1 or len(key) < _LEAST_DIGITS:
        what = "no result" if not found else f"{len(found)} results"
        raise ConfigurationError(
            f"{key}: {what} with this id; give at least {_LEAST_DIGITS} digits of an id that qwen3vl-mem cache ls shows"
        )
    return found[0]


def remove_result(store: ContentStore, result: KeptResult) -> None:
    """Remove all entries of a result.

    Raises:
        StorageError: the directory cannot be changed.
    """
    for key in result.keys:
        store.remove(key)


def _result(kind: str, entries: list[tuple[str, StoredEntry]]) -> KeptResult:
    by_use = sorted(entries, key=lambda pair: _number(pair[1].facts, "used_at") or 0.0, reverse=True)
    facts = [entry.facts for _, entry in by_use]
    saved = [value for each in facts if (value := _number(each, "saved_s")) is not None]
    made = [value for each in facts if (value := _number(each, "made_at")) is not None]
    return KeptResult(
        key=by_use[0][0],
        label=next((str(each["label"]) for each in facts if each.get("label")), None),
        kind=kind,
        keys=[key for key, _ in by_use],
        n_bytes=sum(entry.n_bytes for _, entry in entries),
        hits=max(max(0, int(_number(each, "uses") or 0) - 1) for each in facts),
        saved_s=sum(saved) if saved else None,
        made_at=min(made, default=None),
        used_at=_number(facts[0], "used_at"),
    )


def _number(facts: Facts, name: str) -> float | None:
    value: Any = facts.get(name)
    return float(value) if isinstance(value, int | float) else None
