"""A prompt in blocks: where it may be cut, and a key for each block that stands for all that comes before it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ..cache import digest

BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens that stand for one image or one video: never computed in part.

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


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens `start` to `stop`.

    Attributes:
        key: digest of all tokens and pictures up to `stop`.
        ends_whole: a prompt may be continued behind it: it does not end in the midst of a picture.
    """

    start: int
    stop: int
    key: str
    ends_whole: bool

    @property
    def n_tokens(self) -> int:
        """How many tokens it has."""
        return self.stop - self.start


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


def cut(ids: Sequence[int], spans: Sequence[Span], root: str, block_tokens: int | None = None) -> list[Block]:
    """Return the blocks of a prompt, up to the last one that is whole.

    Text is cut every `block_tokens` from where it begins, and where a picture begins; a picture as well from where it
    begins, and where it ends. The rest of a text that no picture follows is no block: it goes on in other prompts.

    Args:
        ids: the prompt.
        spans: its pictures, in order.
        root: digest of what all of it depends on.
        block_tokens: default: `BLOCK_TOKENS`.
    """
    step = BLOCK_TOKENS if block_tokens is None else block_tokens
    blocks: list[Block] = []
    key, start = root, 0
    for span in spans:
        for first, stop, shown in ((start, span.start, None), (span.start, span.stop, span.key)):
            for begin in range(first, stop, step):
                end = min(begin + step, stop)
                key = digest(key, list(ids[begin:end]), [shown, begin - first] if shown else None)
                blocks.append(Block(begin, end, key, ends_whole=shown is None or end == stop))
        start = span.stop
    for begin in range(start, len(ids) - step + 1, step):
        key = digest(key, list(ids[begin : begin + step]), None)
        blocks.append(Block(begin, begin + step, key, ends_whole=True))
    return blocks


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
