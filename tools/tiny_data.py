"""Public image data the tiny checkpoint is trained and judged on, brought to 64x64 RGB.

Nothing here is drawn by this project: easy-VQA and Fashion-MNIST are used as published, and a page of digits
is a 4x4 sheet of scanned handwriting. Test splits never meet training: the published splits are kept, and
pages for testing are composed only of digits that no training page uses.
"""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SIDE = 64
"""Height and width in pixels of every image."""

TASKS = ("vqa", "fashion", "digits")
FASHION_DIR = Path("/usr/share/datasets/fashion-mnist")
DIGITS_FILE = Path("/usr/share/doc/opencv-doc/examples/data/digits.png")
FASHION_QUESTION = "what clothing item is this?"
DIGITS_QUESTION = "read the digits."
FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)

_PAGE_CELLS = 4
_CELL_SIDE = IMAGE_SIDE // _PAGE_CELLS
# digits.png is a sheet of 50 x 100 scans of 20x20 pixels, five rows a digit. The columns split it, so that
# both parts hold every digit equally often.
_SHEET_ROWS, _SHEET_COLUMNS, _SCAN_SIDE, _TRAIN_COLUMNS = 50, 100, 20, 80

Turn = tuple[str, str]
"""A question and its answer."""


class MissingDataError(RuntimeError):
    """A data set is not installed; the message says which package provides it."""


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """One split of a data set.

    Attributes:
        images: uint8, `(N, 64, 64, 3)`.
        turns: the questions and answers of each image, by its index.
    """

    images: np.ndarray
    turns: dict[int, list[Turn]]

    def flat(self) -> list[tuple[int, Turn]]:
        """Every question of the split with the index of its image, in a fixed order."""
        return [(index, turn) for index in sorted(self.turns) for turn in self.turns[index]]


@dataclass(frozen=True, slots=True)
class DigitPages:
    """Endless pages of 16 handwritten digits, drawn from one split of the scans.

    Attributes:
        scans: uint8, `(N, 16, 16)`.
        labels: the digit of each scan.
    """

    scans: np.ndarray
    labels: np.ndarray

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, Turn]:
        """Compose one page.

        Args:
            rng: decides which scans; equal states give equal pages.

        Returns:
            The page, uint8 `(64, 64, 3)`, and its question with the 16 digits in reading order.
        """
        chosen = rng.integers(0, len(self.scans), _PAGE_CELLS**2)
        cells = self.scans[chosen].reshape(_PAGE_CELLS, _PAGE_CELLS, _CELL_SIDE, _CELL_SIDE)
        page = cells.transpose(0, 2, 1, 3).reshape(IMAGE_SIDE, IMAGE_SIDE)
        return np.repeat(page[..., None], 3, -1), (DIGITS_QUESTION, " ".join(map(str, self.labels[chosen])))


@dataclass(frozen=True, slots=True)
class TinyData:
    """The loaded data sets by split (`train`, `test`); a task that was not asked for is absent."""

    images: dict[tuple[str, str], LabelledImages]
    pages: dict[str, DigitPages]


def load(
    tasks: tuple[str, ...] = TASKS,
    *,
    splits: tuple[str, ...] = ("train", "test"),
    fashion_dir: Path = FASHION_DIR,
    digits_file: Path = DIGITS_FILE,
) -> TinyData:
    """Load the given tasks.

    Args:
        tasks: names out of `TASKS`.
        splits: which of `train` and `test`.
        fashion_dir: folder of the four gzipped IDX files of Fashion-MNIST.
        digits_file: the sheet of handwritten digits that OpenCV ships as an example.

    Raises:
        ValueError: a task is unknown.
        MissingDataError: a data set is not installed.
    """
    unknown = set(tasks) - set(TASKS)
    if unknown:
        raise ValueError(f"unknown tasks {sorted(unknown)}; known: {', '.join(TASKS)}")
    images: dict[tuple[str, str], LabelledImages] = {}
    for split in splits:
        if "vqa" in tasks:
            images["vqa", split] = _load_easy_vqa(split)
        if "fashion" in tasks:
            images["fashion", split] = _load_fashion(split, fashion_dir)
    pages = _load_digits(digits_file) if "digits" in tasks else {}
    return TinyData(images, {split: pages[split] for split in splits if split in pages})


def _load_easy_vqa(split: str) -> LabelledImages:
    try:
        import easy_vqa
    except ImportError as error:
        raise MissingDataError("easy-VQA is not installed: pip install easy-vqa==1.0") from error
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    order = sorted(paths)
    index_of = {key: index for index, key in enumerate(order)}
    turns: dict[int, list[Turn]] = {}
    for question, answer, key in zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True):
        turns.setdefault(index_of[key], []).append((question, answer))
    return LabelledImages(np.stack([np.asarray(Image.open(paths[key]).convert("RGB")) for key in order]), turns)


def _load_fashion(split: str, folder: Path) -> LabelledImages:
    prefix = {"train": "train", "test": "t10k"}[split]
    try:
        images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    except FileNotFoundError as error:
        raise MissingDataError(
            f"Fashion-MNIST is not in {folder}: install the Debian package dataset-fashion-mnist, "
            "or pass the folder of its four .gz files with --fashion-dir"
        ) from error
    turns = {index: [(FASHION_QUESTION, FASHION_CLASSES[label])] for index, label in enumerate(labels)}
    return LabelledImages(np.stack([_to_rgb(image, IMAGE_SIDE) for image in images]), turns)


def _load_digits(path: Path) -> dict[str, DigitPages]:
    try:
        sheet = np.asarray(Image.open(path).convert("L"))
    except FileNotFoundError as error:
        raise MissingDataError(
            f"the sheet of handwritten digits is not at {path}: install the Debian package opencv-doc, "
            "or pass OpenCV's digits.png with --digits"
        ) from error
    scans = sheet.reshape(_SHEET_ROWS, _SCAN_SIDE, _SHEET_COLUMNS, _SCAN_SIDE).transpose(0, 2, 1, 3)
    small = np.stack([_to_rgb(scan, _CELL_SIDE)[..., 0] for scan in scans.reshape(-1, _SCAN_SIDE, _SCAN_SIDE)])
    small = small.reshape(_SHEET_ROWS, _SHEET_COLUMNS, _CELL_SIDE, _CELL_SIDE)
    labels = np.repeat(np.arange(_SHEET_ROWS) // 5, _SHEET_COLUMNS).reshape(_SHEET_ROWS, _SHEET_COLUMNS)
    columns = {"train": slice(None, _TRAIN_COLUMNS), "test": slice(_TRAIN_COLUMNS, None)}
    return {
        split: DigitPages(small[:, part].reshape(-1, _CELL_SIDE, _CELL_SIDE), labels[:, part].ravel())
        for split, part in columns.items()
    }


def _read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file of unsigned bytes, the format of the MNIST family."""
    with gzip.open(path) as file:
        data = file.read()
    dimensions = data[3]
    header = 4 + 4 * dimensions
    return np.frombuffer(data, np.uint8, offset=header).reshape(struct.unpack(f">{dimensions}I", data[4:header]))


def _to_rgb(gray: np.ndarray, side: int) -> np.ndarray:
    """Scale a grey image to `(side, side, 3)`."""
    return np.asarray(Image.fromarray(gray).resize((side, side), Image.Resampling.BICUBIC).convert("RGB"))
