"""`take_snapshot`: the full state of an optimizer as one JSON-ready dict."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from ..compression import EncodingCounters
from ..figures.metrics import USE_KEYS
from ..model.run.progress import Progress
from ..model.run.response_times import Response
from ..optimizer import MemoryOptimizer

SCHEMA = 1
"""Incremented when a key is removed or changes its meaning."""

_LATELY_S = 300.0


def take_snapshot(optimizer: MemoryOptimizer, *, measure: bool = False) -> dict[str, Any]:
    """Return the state and counters of an optimizer; missing figures are `None`.

    Takes about a millisecond. Counters only grow: for rates, keep the previous snapshot.

    Args:
        optimizer: an open optimizer.
        measure: also take the one-time measurements that `metrics` needs (0.3 s).

    Returns:
        schema: `SCHEMA`.
        time_s: seconds since 1970; `uptime_s`: age of the optimizer.
        process: `rss_bytes`, `peak_rss_bytes`, `cpu_s` (CPU seconds so far, all threads).
        budget: limits, `accounts_bytes` by owner (`tensor_accounts_bytes`: those under `tensor_budget`), page frames
            (`frames_*_bytes`), bytes released under pressure; `peak_bytes`: peak of the process since the model began,
            which must not exceed `ram_budget_bytes`; `undroppable_bytes`, `capacity_bytes`,
            `undroppable_share`: see `MemoryFigures.occupancy`.
        memory_map: rows `tier` (`cpu`, `ssd`), `kind`, `codec`, `tensors`, `bytes`: encoded bytes in that tier; `ssd`
            counts bytes on the SSD only.
        tiers, kinds, codecs, paging, sessions_open: as in `get_memory_efficiency_stats`. Each kind also has
            `compression_ratio`, `relative_error`, `encode_bytes_per_s`,
            `decode_bytes_per_s`, `encodes`.
        pools: by kind: `size_bytes`, `used_bytes`, `requested_bytes`, `utilization`, `allocations`,
            `internal_fragmentation`, `external_fragmentation`. Empty without pooling.
        fragmentation: the value used by alerts, see `MemoryFigures.fragmentation`.
        cache: `hits`, `misses`, `hit_rate`, `saved_s`, `computed_s`, `levels` (`gpu`, `cpu`, `ssd`: each `None` or its
            counters, `hit_rate`, `prediction_efficiency`, `migrations`). `None`: disabled.
        swapping: `algorithm`, `decides`, `swapped_ahead_bytes`; `None`: disabled.
        migrations: `pages` moved between tiers; `tensors` prefetched by the tiering system, and `tensors_used`.
        prediction: `prefetch_accuracy`, `tier_effectiveness`, `improvement_over_lru`.
        gc: counters of the collector; `None`: no collector.
        life_cycles: by kind of runtime tensor: `births`, `deaths`, `alive`, `alive_bytes`, `mean_rounds`.
        progress: what is computed now, the fields of `model.run.progress.Progress`; `None`: nothing.
        responses: totals `count`, `tokens` (with those of the answer in progress), `seconds`; `running_s`; `last`;
            `current_s` for the alert: time of the last response if it ended within five minutes, or of the current one
            if that is longer; `tokens_per_s` and `first_token_s` of the answer in progress, otherwise means over the
            last 64; `cpu_s_per_token` of the last 64.
        verdict: what limits decoding, the fields of `figures.Verdict`.
        metrics: the keys of section 7.1.
        alerts: empty; filled from `AlertMonitor` (`alert_rows`).
    """
    figures, memory = optimizer.figures, optimizer.get_memory_efficiency_stats()
    uses = optimizer.pager.usage()
    occupancy = figures.occupancy(uses)
    budget, tiers, cache = memory["budget"], memory["tiers"], memory["cache"]
    metrics = optimizer.metrics(measure=measure, uses=uses)
    swapping, pressure = optimizer.swapping, optimizer.pressure
    progress = figures.responses.progress.now()
    return {
        "schema": SCHEMA,
        "time_s": time.time(),
        "uptime_s": figures.uptime_s,
        "process": {
            "rss_bytes": budget["process_rss_bytes"],
            "peak_rss_bytes": budget["process_peak_rss_bytes"],
            "cpu_s": time.process_time(),
        },
        "budget": {
            **{key: value for key, value in budget.items() if not key.startswith("process_")},
            "frames_free_bytes": optimizer.pager.frames.free_bytes,
            "given_up_bytes": 0 if pressure is None else pressure.given_up_bytes,
            "peak_bytes": figures.peak_bytes(),
            "undroppable_bytes": occupancy.undroppable_bytes,
            "capacity_bytes": occupancy.capacity_bytes,
            "undroppable_share": occupancy.share,
        },
        "memory_map": _memory_map(uses),
        "tiers": {name: tiers[name] for name in ("gpu", "cpu", "ssd")},
        "pools": memory["pools"],
        "fragmentation": figures.fragmentation(),
        "kinds": _kinds(memory["kinds"], figures.compression(uses)),
        "codecs": memory["codecs"],
        "cache": cache,
        "paging": memory["paging"],
        "swapping": None
        if swapping is None
        else {
            "algorithm": swapping.algorithm.name,
            "decides": getattr(swapping.algorithm, "decides", swapping.algorithm.name),
            "swapped_ahead_bytes": swapping.swapped_ahead_bytes,
        },
        "migrations": {
            "pages": figures.moves(),
            "tensors": tiers["migrations"],
            "tensors_used": tiers["migrations_used"],
        },
        "prediction": {
            "prefetch_accuracy": memory["paging"]["prefetch_accuracy"],
            "tier_effectiveness": None if optimizer.tiering is None else optimizer.tiering.effectiveness(),
            "improvement_over_lru": metrics["cache_hit_improvement"],
        },
        "gc": memory["gc"],
        "life_cycles": optimizer.lifecycle.stats()["kinds"],
        "progress": None if progress is None else asdict(progress),
        "responses": _responses(optimizer, progress),
        "sessions_open": memory["sessions_open"],
        "verdict": asdict(figures.verdict()),
        "metrics": metrics,
        "alerts": [],
    }


def _memory_map(uses: list[Any]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for use in uses:
        for tier, n_bytes in (("cpu", use.resident_bytes), ("ssd", use.encoded_bytes - use.resident_bytes)):
            if n_bytes:
                key = (tier, use.kind, use.codec)
                row = rows.setdefault(
                    key, {"tier": tier, "kind": use.kind, "codec": use.codec, "tensors": 0, "bytes": 0}
                )
                row["tensors"] += 1
                row["bytes"] += n_bytes
    return [rows[key] for key in sorted(rows)]


def _kinds(held: dict[str, dict[str, int]], encoded: dict[str, EncodingCounters]) -> dict[str, dict[str, Any]]:
    nothing = dict.fromkeys(USE_KEYS, 0)
    kinds: dict[str, dict[str, Any]] = {}
    for kind in sorted({*held, *encoded}):
        row = encoded.get(kind, EncodingCounters())
        kinds[kind] = {
            **(held.get(kind) or nothing),
            "encodes": row.encodes,
            "compression_ratio": row.original_bytes / row.encoded_bytes if row.encoded_bytes else None,
            "relative_error": row.relative_error,
            "encode_bytes_per_s": row.encode_bytes_per_s,
            "decode_bytes_per_s": row.decode_bytes_per_s,
        }
    return kinds


def _responses(optimizer: MemoryOptimizer, progress: Progress | None) -> dict[str, Any]:
    times = optimizer.figures.responses
    recent, running_s, now_s = times.recent(), times.running_s(), times.timer()
    generated = [each for each in recent if each.generated and each.new_tokens]
    tokens = sum(each.new_tokens for each in generated)
    decode_s = sum(each.decode_s for each in recent)
    steps = sum(each.decode_steps for each in recent)
    first = [each.first_token_s for each in recent if each.first_token_s is not None]
    rate, first_token_s = steps / decode_s if decode_s else None, sum(first) / len(first) if first else None
    if progress is not None and progress.first_token_s is not None:
        first_token_s = progress.first_token_s
        rate = progress.tokens_per_s or rate
    return {
        "count": times.responses,
        "current_s": _current_s(recent, running_s, now_s),
        "tokens": times.tokens + times.progress.new_tokens(),
        "seconds": times.seconds,
        "running_s": running_s,
        "last": _response(recent[-1], now_s) if recent else None,
        "tokens_per_s": rate,
        "first_token_s": first_token_s,
        "cpu_s_per_token": sum(each.cpu_s for each in generated) / tokens if tokens else None,
    }


def _current_s(recent: list[Response], running_s: float | None, now_s: float) -> float | None:
    """Return the time of the last response if it ended recently, or of the current one if that is longer."""
    lately = recent and now_s - recent[-1].ended_s < _LATELY_S
    times = [running_s or 0.0, recent[-1].wall_s if lately else 0.0]
    return max(times) if lately or running_s is not None else None


def _response(response: Response, now_s: float) -> dict[str, Any]:
    row = asdict(response)
    return {"age_s": now_s - row.pop("ended_s"), **row}
