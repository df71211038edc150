"""Whatever a file or a class is called, what is shown of it is text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retinanet_keras.storage.printable import printable

pytestmark = pytest.mark.check


@pytest.mark.parametrize("text", ["cat", "größe", "ねこ　黒", "گربه‌ها", "👩‍🚀", "a\u00a0b", ""])
def test_what_people_write_is_left_alone(text):
    assert printable(text) == text == printable(text, most=20)


@pytest.mark.parametrize("text, shown", [
    ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"), ("a\nb\tc\r", r"a\nb\tc\r"), ("\x9b2J", r"\x9b2J"),
    ("abc\u202edcb", r"abc\u202edcb"), ("half \ud800", r"half \ud800"), ("\udcff.jpg", r"\xff.jpg"),
    ("a\u2028b", r"a\u2028b"), (7, "7"),
])  # fmt: skip
def test_what_a_terminal_obeys_is_written_out(text, shown):
    assert printable(text) == shown


def test_some_may_be_kept_and_length_is_bounded():
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert printable("x" * 100_000, most=10) == "x" * 9 + "…"
    assert printable("\x1b" * 100_000, most=10) == r"\x1b\x1b\…"


@given(st.text(st.characters(), max_size=30), st.none() | st.integers(1, 20))
def test_it_can_be_written_and_obeys_nothing(text, most):
    shown = printable(text, most)
    shown.encode("utf-8")
    assert most is None or len(shown) <= most
    assert not set(shown) & {chr(i) for i in (*range(32), *range(127, 160))} and printable(shown) == shown
