import re
from pathlib import Path

RECORDS = Path(__file__).parents[1] / "docs" / "adr"


def records():
    return sorted(RECORDS.glob("[0-9]*.md"))


def test_numbers_are_unique():
    numbers = [path.name.split("-")[0] for path in records()]
    assert sorted(set(numbers)) == numbers


def test_the_index_lists_every_record_by_number_and_title():
    rows = re.findall(r"^\| (\d+) \| \[(.+)\]\((.+)\) \|$", (RECORDS / "README.md").read_text(), re.MULTILINE)
    expected = []
    for path in records():
        number, title = re.fullmatch(r"# (\d+)\. (.+)", path.read_text().splitlines()[0]).groups()
        assert int(number) == int(path.name.split("-")[0]), path.name
        expected.append((number, title, path.name))
    assert rows == expected
