"""Pages of PDF documents as pictures."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

import qwen3_vl_memory_optimizations
from qwen3_vl_memory_optimizations.errors import ConfigurationError, InputError
from qwen3_vl_memory_optimizations.model.inputs.documents import document_pages, parse_pages
from qwen3_vl_memory_optimizations.model.inputs.processor import load_processor

TINY = Path(qwen3_vl_memory_optimizations.__file__).parent / "assets" / "tiny-qwen3vl"


@pytest.fixture(scope="module")
def a4(tmp_path_factory) -> Path:
    """Three A4 pages; page n is black but for a white square whose place depends on n."""
    pages = []
    for number in range(3):
        page = Image.new("RGB", (620, 877))
        ImageDraw.Draw(page).rectangle([0, 200 * number, 199, 200 * number + 199], fill="white")
        pages.append(page)
    path = tmp_path_factory.mktemp("documents") / "a4.pdf"
    pages[0].save(path, save_all=True, append_images=pages[1:], resolution=75)
    return path


def write_pdf(path: Path, objects: list[bytes], trailer: bytes = b"") -> Path:
    content, starts = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        starts.append(len(content))
        content += b"%d 0 obj\n%b\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % start for start in starts)
    end = b"xref\n0 %d\n0000000000 65535 f \n%btrailer<</Size %d/Root 1 0 R%b>>\nstartxref\n%d\n%%%%EOF"
    path.write_bytes(content + end % (len(objects) + 1, table, len(objects) + 1, trailer, len(content)))
    return path


def test_a_page_has_150_dots_per_inch_and_no_more_pixels_than_wanted(a4):
    page = document_pages(a4)[0]
    assert (page.open().width, page.open().height) == (1240, 1754)
    assert page.open().decode().size == (1240, 1754)
    opened = page.open(1024 * 1024)
    assert 0.99 * 1024**2 < opened.width * opened.height <= 1.001 * 1024**2
    assert opened.decode().size == (opened.width, opened.height), "rendered at this size, not scaled"
    large = page.open(10**9)
    assert (large.width, large.height) == (2480, 3508), "300 dots per inch"


def test_a_page_is_rendered_no_larger_than_asked(a4):
    opened = document_pages(a4)[0].open()
    width, height = opened.decode((310, 300)).size
    assert (width, height) == (310, 438)
    assert opened.decode_bytes((310, 300)) < opened.decode_bytes()


def test_pages_come_in_the_order_named(a4):
    for page in document_pages(a4, "3,1-2"):
        image = page.open().decode()
        y = 400 * (page.number - 1) + 200  # the centre of its square at twice the size
        assert image.getpixel((200, y)) == (255, 255, 255)
        assert image.getpixel((200, (y + 400) % 1200)) == (0, 0, 0)
    assert [page.number for page in document_pages(a4, "3,1-2")] == [3, 1, 2]


def test_bytes_are_read_like_a_file(a4):
    (page,) = document_pages(a4.read_bytes(), "2")
    assert page.open().decode().tobytes() == document_pages(a4)[1].open().decode().tobytes()


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("1-3,7", [1, 2, 3, 7]), ("5", [5]), ("8-", [8, 9]), (" 2 , 4 - 5 ", [2, 4, 5]), ("2,1-3", [2, 1, 3])],
)
def test_page_numbers(text, numbers):
    assert parse_pages(text, 9) == numbers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", "page 0 does not exist; it has 9 pages"),
        ("3-12", "page 12 does not exist; it has 9 pages"),
        ("5-2", "runs backwards; write 2-5"),
        ("two", "not a list of page numbers"),
        ("", "not a list of page numbers"),
    ],
)
def test_page_numbers_that_are_none(text, words):
    with pytest.raises(InputError, match=words):
        parse_pages(text, 9)


def test_what_is_wrong_with_a_document_is_said_in_one_line(tmp_path, a4):
    (tmp_path / "empty.pdf").touch()
    (tmp_path / "damaged.pdf").write_bytes(b"%PDF-1.7\n" + bytes(range(256)))
    catalog, page = b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>"
    pages = b"<</Type/Pages/Kids[3 0 R]/Count 1>>"
    key = b"<</Filter/Standard/V 1/R 2/P -4/O<%b>/U<%b>>>" % (b"41" * 32, b"42" * 32)
    write_pdf(tmp_path / "locked.pdf", [catalog, pages, page, key], b"/Encrypt 4 0 R/ID[<00><00>]")
    for name, words in (
        ("missing.pdf", "no such document"),
        ("empty.pdf", "is empty"),
        ("damaged.pdf", "is damaged"),
        ("locked.pdf", "is encrypted"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            document_pages(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is empty"):
        document_pages(b"")
    with pytest.raises(InputError, match=r"is a PDF document; pass its pages, document_pages"):
        load_processor(TINY).prepare("read it", [a4])


def test_without_pypdfium2_the_extra_is_named(a4, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'qwen3-vl-memory-optimizations\[documents\]'"):
        document_pages(a4)


def test_pypdfium2_is_imported_for_documents_alone():
    code = (
        "import sys; from qwen3_vl_memory_optimizations.model.inputs.processor import load_processor; "
        f"load_processor({str(TINY)!r}).prepare('hi'); assert 'pypdfium2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pages_are_prepared_like_images_of_their_pixels(a4):
    processor = load_processor(TINY)
    pages = document_pages(a4)
    shown = processor.prepare("read it", pages, max_pixels=64 * 64)
    sizes = [page.open(64 * 64) for page in pages]
    same = processor.prepare("read it", [each.decode() for each in sizes], max_pixels=64 * 64)
    assert all(bool((shown[name] == same[name]).all()) for name in same)
    assert len(shown["image_grid_thw"]) == 3
    assert processor.prepare("read it", pages, detail="low")["image_grid_thw"].prod(-1).max() <= 1024


def test_another_question_has_the_pixels_of_the_first(a4):
    processor = load_processor(TINY)
    pages = document_pages(a4)
    first = processor.prepare("what shape is this?", pages, None, "Be brief.")
    again = processor.ask_again("read <|vision_end|> it", first)
    expected = processor.prepare("read <|vision_end|> it", pages, None, "Be brief.")
    assert again["pixel_values"] is first["pixel_values"]
    assert {name: value.tolist() for name, value in again.items()} == {
        name: value.tolist() for name, value in expected.items()
    }
    with pytest.raises(InputError, match="shows no picture"):
        processor.ask_again("and now?", processor.prepare("hi"))
