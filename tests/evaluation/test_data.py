import sys
from types import ModuleType

import pytest
import torch

from qwen3_vl_memory_optimizations import CheckpointError, ConfigurationError, InputError
from qwen3_vl_memory_optimizations.evaluation import text_windows
from qwen3_vl_memory_optimizations.evaluation.data import SHIPPED_TEXT, easy_vqa_questions, questions, shipped_questions
from qwen3_vl_memory_optimizations.model.inputs.processor import load_tokenizer

from ..model import tiny


def letters(text, add_special_tokens):
    assert not add_special_tokens
    return {"input_ids": [ord(letter) for letter in text]}


def test_windows_do_not_overlap_and_a_lone_token_predicts_nothing():
    windows = text_windows(letters, "abcdefg", window_tokens=3)
    assert [bytes(window["input_ids"][0].tolist()) for window in windows] == [b"abc", b"def"]
    windows = text_windows(letters, "abcdefg", window_tokens=3, max_tokens=5)
    assert [window["input_ids"].shape for window in windows] == [(1, 3), (1, 2)]
    assert windows[0]["input_ids"].dtype == torch.long
    with pytest.raises(InputError, match="fewer than two tokens"):
        text_windows(letters, "a")


def test_the_shipped_text_is_long_enough_and_the_shipped_questions_are_there():
    assert len(SHIPPED_TEXT.read_text(encoding="utf-8").split()) > 20_000
    assert questions(2) == shipped_questions()[:2]
    assert all(question.image.is_file() and question.answer for question in shipped_questions())


@pytest.fixture
def easy_vqa(monkeypatch, tmp_path):
    """The interface of the package easy-vqa, over three images with two questions each."""
    module = ModuleType("easy_vqa")
    module.get_test_image_paths = lambda: {number: str(tmp_path / f"{number}.png") for number in (2, 0, 1)}
    module.get_test_questions = lambda: (list("abcdef"), list("ABCDEF"), [0, 0, 1, 1, 2, 2])
    monkeypatch.setitem(sys.modules, "easy_vqa", module)
    return tmp_path


def test_each_image_is_asked_one_question_and_the_questions_take_turns(easy_vqa):
    chosen = easy_vqa_questions(3)
    assert [(each.image.name, each.question, each.answer) for each in chosen] == [
        ("0.png", "a", "A"),
        ("1.png", "d", "D"),
        ("2.png", "e", "E"),
    ]
    with pytest.raises(ConfigurationError, match="3 images that are not for training, not 4"):
        easy_vqa_questions(4)


def test_without_easy_vqa_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ConfigurationError, match="pip install easy-vqa"):
        questions(len(shipped_questions()) + 1)


def test_a_checkpoint_without_tokenizer_is_told(tmp_path):
    (tmp_path / "config.json").write_text((tiny.DIRECTORY / "config.json").read_text())
    with pytest.raises(CheckpointError, match="there is no tokenizer"):
        load_tokenizer(tmp_path)
