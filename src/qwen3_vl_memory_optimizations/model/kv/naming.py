"""The names of blocks: what a token is, with all that comes before it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ...cache import digest

Token = int | str
"""A token id; of a picture what it shows and which of its tokens this is."""


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens that stand for one image or one video.

    Attributes:
        start, stop: its tokens; of a video, from its first frame to its last, with what is said between them.
        key: digest of what it shows.
        modality: `image` or `video`.
        index: of the image, or video, in its call.
    """

    start: int
    stop: int
    key: str
    modality: str
    index: int


def find_spans(
    ids: Sequence[int],
    token_ids: dict[str, int],
    grids: dict[str, list[list[int]]],
    keys: dict[str, list[str]],
    merge: int,
) -> list[Span] | None:
    """Return the pictures of a prompt in order, or `None` where tokens and grids do not belong together.

    Args:
        ids: the prompt.
        token_ids: modality -> the token that stands for a patch of it.
        grids: modality -> for each picture groups of frames, rows and columns of patches.
        keys: modality -> for each picture the digest of what it shows.
        merge: patches of a side that make a token.
    """
    spans: list[Span] = []
    for modality, token_id in token_ids.items():
        runs = _runs(ids, token_id)
        for index, (groups, rows, columns) in enumerate(grids.get(modality, [])):
            # Each group of frames of a video has tokens of its own; an image is one group.
            mine, runs = runs[:groups], runs[groups:]
            if len(mine) < groups or any(n != rows * columns // merge**2 for _, n in mine):
                return None
            spans.append(Span(mine[0][0], mine[-1][0] + mine[-1][1], keys[modality][index], modality, index))
        if runs:
            return None
    return sorted(spans, key=lambda span: span.start)


def named_tokens(ids: Sequence[int], spans: Sequence[Span]) -> list[Token]:
    """Return what each token of a prompt is: equal lists have equal keys and values.

    A position depends on the grids of all pictures before it, and a picture's key on its grid: no token behind a
    picture is reached but through its tokens.
    """
    tokens: list[Token] = list(ids)
    for span in spans:
        for index in range(span.start, span.stop):
            tokens[index] = f"{span.key}:{index - span.start}:{ids[index]}"
    return tokens


def block_names(tokens: Sequence[Token], root: str, block_tokens: int) -> list[str]:
    """Return the name of each whole block: a digest of its tokens and of all before them.

    Args:
        tokens: of `named_tokens`.
        root: digest of what all of it depends on.
        block_tokens: of a block.
    """
    names, name = [], root
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        name = digest(name, list(tokens[start : start + block_tokens]))
        names.append(name)
    return names


def _runs(ids: Sequence[int], token_id: int) -> list[tuple[int, int]]:
    """Return where a token begins to repeat, and how often it does."""
    runs: list[tuple[int, int]] = []
    position = 0
    for found, group in itertools.groupby(ids):
        n = len(list(group))
        if found == token_id:
            runs.append((position, n))
        position += n
    return runs
