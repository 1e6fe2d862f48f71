from dataclasses import replace

import pytest

from dsg.errors import UserError
from dsg.io.rows import read_table


def table(tmp_path, text):
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_table(path)


def test_other_programs_spellings_are_read(tmp_path):
    # A byte order mark, blanks, floats for ids, an empty line, a short last row.
    text = '\ufeffid, value ,note\r\n 3.0,-2e1,"a, b"\r\n\r\n0,-20.000\r\n'
    read = table(tmp_path, text)
    assert read.integers("id") == [3, 0]
    assert read.numbers("value") == [-20.0, -20.0]
    assert read.one("value", read.numbers("value")) == -20.0
    assert read.texts("note") == ["a, b", ""]
    assert read.texts("absent") == ["", ""]


def test_aliases_are_read_and_named_in_errors(tmp_path):
    read = replace(table(tmp_path, "index,size\n4,2\n5,x\n"), aliases={"id": "index", "n": "size"})
    read.require(["id", "n"])
    assert read.integers("id") == [4, 5]
    with pytest.raises(UserError, match=r"`size` must be a finite number .* got 'x'; correct it"):
        read.numbers("n")
    with pytest.raises(UserError, match="the same `index`, got 4 and 5; make one file for each"):
        read.one("id", read.integers("id"))
    with pytest.raises(UserError, match="must have the columns index, kind, misses kind; add them"):
        read.require(["id", "kind"])


@pytest.mark.parametrize("text", ["nan", "inf", "", "1,5", "0x10"])
def test_only_finite_numbers_are_numbers(tmp_path, text):
    with pytest.raises(UserError, match="`v` must be a finite number in each row"):
        table(tmp_path, f'v,w\n"{text}",\n').numbers("v")


def test_ids_are_whole(tmp_path):
    with pytest.raises(UserError, match=r"`v` must be a whole number in each row .* got '17.5'"):
        table(tmp_path, "v\n3\n17.5\n").integers("v")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a header and at least one row, got 0 lines; add a row"),
        ("a,b\n", "must hold a header and at least one row, got 1 lines"),
        ("a,b\n1,2\n1,2,3\n", "at most the header's 2 cells, got 3 in '1,2,3'"),
        (b"a,b\n\xff\xfe,1\n", "is not text in UTF-8"),
    ],
)
def test_other_files_are_refused_in_one_sentence(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        table(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"missing.csv. cannot be read \(no such file"):
        read_table(tmp_path / "missing.csv")
