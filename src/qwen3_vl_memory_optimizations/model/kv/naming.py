"""Name blocks by their tokens and everything before them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ...cache import digest

Token = int | str
"""A token id; for an image or video token: the digest of its content, and its index in it."""


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens that stand for one image or one video.

    Attributes:
        start, stop: token range; for a video from its first frame to its last, including the text between frames.
        key: digest of the content.
        modality: `image` or `video`.
        index: of the image or video in its call.
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
    """Return the images and videos of a prompt in order, or `None` if tokens and grids do not match.

    Args:
        ids: the prompt.
        token_ids: modality -> its placeholder token.
        grids: modality -> frame groups, rows and columns of patches per image or video.
        keys: modality -> content digest per image or video.
        merge: patches per token along each side.
    """
    spans: list[Span] = []
    for modality, token_id in token_ids.items():
        runs = _runs(ids, token_id)
        for index, (groups, rows, columns) in enumerate(grids.get(modality, [])):
            # Each frame group of a video has its own tokens; an image is one group.
            mine, runs = runs[:groups], runs[groups:]
            if len(mine) < groups or any(n != rows * columns // merge**2 for _, n in mine):
                return None
            spans.append(Span(mine[0][0], mine[-1][0] + mine[-1][1], keys[modality][index], modality, index))
        if runs:
            return None
    return sorted(spans, key=lambda span: span.start)


def named_tokens(ids: Sequence[int], spans: Sequence[Span]) -> list[Token]:
    """Return the content of each token of a prompt: equal lists have equal keys and values.

    A position depends on the grids of all images and videos before it, and their keys include their grids: a token
    after an image can be reached only through the image's tokens.
    """
    tokens: list[Token] = list(ids)
    for span in spans:
        for index in range(span.start, span.stop):
            tokens[index] = f"{span.key}:{index - span.start}:{ids[index]}"
    return tokens


def block_names(tokens: Sequence[Token], root: str, block_tokens: int) -> list[str]:
    """Return the name of each whole block: a digest of its tokens and of all tokens before them.

    Args:
        tokens: from `named_tokens`.
        root: digest of everything else they depend on.
        block_tokens: tokens per block.
    """
    names, name = [], root
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        name = digest(name, list(tokens[start : start + block_tokens]))
        names.append(name)
    return names


def _runs(ids: Sequence[int], token_id: int) -> list[tuple[int, int]]:
    """Return the start and length of each run of a token."""
    runs: list[tuple[int, int]] = []
    position = 0
    for found, group in itertools.groupby(ids):
        n = len(list(group))
        if found == token_id:
            runs.append((position, n))
        position += n
    return runs
