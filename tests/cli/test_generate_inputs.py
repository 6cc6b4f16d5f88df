"""What `generate` takes: pictures, folders, documents, several questions."""

import json

import pytest
from typer.testing import CliRunner

from qwen3_vl_memory_optimizations.cli import app
from qwen3_vl_memory_optimizations.cli.generate.inputs import MOST_PAGES, collect, pictures_as_options
from qwen3_vl_memory_optimizations.cli.generate.show import expected_wait
from qwen3_vl_memory_optimizations.errors import InputError
from qwen3_vl_memory_optimizations.model.inputs.documents import DocumentPage
from qwen3_vl_memory_optimizations.model.inputs.images import load_image
from qwen3_vl_memory_optimizations.model.inputs.processor import load_processor
from qwen3_vl_memory_optimizations.model.run.estimate import Estimate

VALUED = {"--image", "-i", "--prompt", "-p"}


@pytest.fixture(scope="session")
def processor(tiny):
    return load_processor(tiny)


@pytest.fixture(scope="session")
def folder(demo_images, tmp_path_factory):
    """Return a folder of three images in natural order and a document of two pages."""
    folder = tmp_path_factory.mktemp("scans")
    for number in (1, 2, 10):
        (folder / f"page {number}.png").write_bytes((demo_images / "digits_0.png").read_bytes())
    pages = [load_image(demo_images / f"digits_{number}.png") for number in (0, 1)]
    pages[0].save(folder / "z.pdf", save_all=True, append_images=pages[1:])
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").touch()
    return folder


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("m -i a b -p q c", "-i a --image b -p q --image c -- m"),
        ("-i a m b", "-i a --image b -- m"),
        ("m -p - --stats a", "-p - --stats --image a -- m"),
        ("m --image=a b -- -c", "--image=a --image b --image -c -- m"),
        ("-i", "-i"),
    ],
)
def test_words_after_the_model_are_pictures_in_their_order(line, expected):
    assert pictures_as_options(line.split(), VALUED) == expected.split()


def found(words, processor, **options):
    options = {"pages": None, "fetch": False, "max_pixels": None, **options}
    return collect([str(word) for word in words], processor=processor, **options)


def test_a_folder_is_its_images_and_documents_in_natural_order(folder, processor):
    pictures = found([folder], processor)
    names = [each.name if isinstance(each, DocumentPage) else each for each in pictures.sources]
    assert names == [str(folder / name) for name in ("page 1.png", "page 2.png", "page 10.png", "z.pdf", "z.pdf")]
    assert pictures.notes == [f"{folder}: 3 images and 1 PDF document"]


def test_a_glob_is_expanded_unless_a_file_has_its_name(folder, processor, tmp_path):
    assert found([folder / "page ?.png"], processor).sources == [str(folder / f"page {n}.png") for n in (1, 2)]
    (tmp_path / "a[1].png").write_bytes((folder / "page 1.png").read_bytes())
    assert found([tmp_path / "a[1].png"], processor).sources == [str(tmp_path / "a[1].png")]
    with pytest.raises(InputError, match="no file matches"):
        found([folder / "*.gif"], processor)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images or PDF documents"):
        found([tmp_path / "empty"], processor)


def test_pages_are_those_named_or_the_first_ten(folder, processor, tmp_path):
    assert [page.number for page in found([folder / "z.pdf"], processor, pages="2").sources] == [2]
    page = load_image(folder / "page 1.png")
    page.save(tmp_path / "long.pdf", save_all=True, append_images=[page] * 24)
    pictures = found([tmp_path / "long.pdf"], processor)
    assert [each.number for each in pictures.sources] == list(range(1, MOST_PAGES + 1))
    assert f"25 pages; the first {MOST_PAGES} are used, about 16 tokens each" in pictures.notes[0]
    assert "--pages 11-20" in pictures.notes[0]
    with pytest.raises(InputError, match="none of the pictures is a PDF document"):
        found([folder / "page 1.png"], processor, pages="1")


def ask(run, tiny, *arguments, code=0):
    result = run("generate", tiny, *arguments)
    assert result.exit_code == code, result.stderr
    return result


def test_two_questions_about_a_page_encode_it_once(run, tiny, folder, tmp_path):
    result = ask(
        run,
        tiny,
        *("-i", folder / "z.pdf", "--pages", 1, "-p", "read the digits.", "-p", "read the digits of this."),
        *("--json", "--stats", "--cache-dir", tmp_path, "--max-new-tokens", 4),
    )
    first, second = json.loads(result.stdout)
    assert (first["question"], second["question"]) == ("read the digits.", "read the digits of this.")
    assert first["answer"]
    for answer in (first, second):
        assert answer["memory"]["cache"]["levels"]["cpu"]["misses"] == 1, "one picture was looked for, and encoded"
    assert second["memory"]["kv"]["reused_tokens"] >= 16


def test_answers_come_in_order_and_questions_go_to_stderr(run, tiny, demo_images):
    result = ask(run, tiny, "-p", "read the digits.", "-p", "read the digits.", "-i", demo_images / "digits_0.png")
    first, second = result.stdout.splitlines()
    assert first == second
    # A slow machine also says what it did.
    assert [line for line in result.stderr.splitlines() if line.startswith(">")] == ["> read the digits."] * 2


def test_a_question_from_standard_input(tiny, demo_images, run):
    arguments = ["generate", str(tiny), "-i", str(demo_images / "digits_0.png"), "-p", "-", "--max-new-tokens", "3"]
    assert CliRunner().invoke(app, arguments, input="read the digits.\n").exit_code == 0
    for extra in ([], ["-p", "-"]):
        result = CliRunner().invoke(app, [*arguments, *extra], input="" if not extra else "a question")
        assert result.exit_code == 2
        assert "standard input is empty" in result.stderr


def test_an_empty_question_and_an_empty_answer_are_said(run, tiny, demo_images, monkeypatch):
    result = ask(run, tiny, "-i", demo_images / "digits_0.png", "-p", " ", code=2)
    assert "the prompt is empty" in result.stderr
    from qwen3_vl_memory_optimizations.model.inputs.processor import AnswerStreamer

    monkeypatch.setattr(AnswerStreamer, "on_finalized_text", lambda self, text, stream_end=False: None)
    result = ask(run, tiny, "-i", demo_images / "digits_0.png", "-p", "hi", "--max-new-tokens", 2, code=1)
    assert "the answer to 'hi' is empty: 2 tokens without text" in result.stderr


def test_options_that_contradict_each_other(run, tiny, folder):
    for arguments, words in (
        (["--detail", "low", "--max-pixels", 9999], "use only one of them"),
        (["--detail", "low", "--first-token", "30s"], "aim of --detail auto"),
        (["--first-token", "soon"], "is not a duration"),
        (["--detail", "best"], "is not one of low, medium"),
    ):
        assert words in ask(run, tiny, "-p", "hi", *arguments, code=2).stderr
    result = run("generate", "-i", folder / "page 1.png", folder / "page 2.png", tiny, "-p", "hi")
    assert result.exit_code == 2
    assert "is a picture, not a model" in result.stderr


def test_a_long_wait_is_announced_with_the_shorter_one(processor, demo_images):
    inputs = processor.prepare("what is this?", [load_image(demo_images / "digits_0.png").resize((256, 256))])

    class Estimator:
        def of_sizes(self, grids, tokens):
            return Estimate(9.6, True, tokens, 64)

    def line(seconds, measured=True, patches=64):
        return expected_wait(Estimate(seconds, measured, 99, patches), processor, Estimator(), inputs)

    assert line(9.9) is None
    assert line(70.0) == "about 70 s to the first token of this picture; --detail low: about 9.6 s"
    assert line(15.0) == "about 15 s to the first token of this picture"
    assert line(15.0, patches=0) == "about 15 s to the first token of this prompt"
    assert "a guess until this model has run here" in line(70.0, measured=False)
