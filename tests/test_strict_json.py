"""JSON of strangers: each thing that is refused, in a sentence, and what is accepted."""

import pytest

from retinanet_keras.storage import strict_json

pytestmark = pytest.mark.check


def test_what_is_json_is_read(tmp_path):
    assert strict_json.parse('{"a": [1, 2.5, null, true, "é"]}') == {"a": [1, 2.5, None, True, "é"]}
    marked = '\ufeff{"a": 9223372036854775807}'
    assert strict_json.parse(marked) == strict_json.parse(marked.encode()) == {"a": 2**63 - 1}
    (tmp_path / "a.json").write_bytes(marked.encode())
    assert strict_json.read(tmp_path / "a.json") == {"a": 2**63 - 1}


@pytest.mark.parametrize("text, message", [
    ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
    ('{"a": ' * 200_000 + "1" + "}" * 200_000, "nested too deeply"),
    ("1" * 5000, "64 bits"),
    ("1" + "0" * 400, "the integer 10000000000000000000... needs more than 64 bits"),
    ("-9223372036854775809", "64 bits"),
    ('{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice in one object. Remove one"),
    (b'{"a": "\xe9"}', "byte 7 is not UTF-8"),
    ('{"a": 1,\n "b" 2}', "line 2, column 6: Expecting ':' delimiter"),
    ("", "line 1, column 1: Expecting value"),
])  # fmt: skip
def test_what_is_refused(text, message):
    with pytest.raises(strict_json.JsonError, match=message):
        strict_json.parse(text)


def test_large_files_are_read_without_looking_at_each_number():
    assert strict_json.parse('{"a": 1, "a": 10000000000000000000000}', strict=False) == {"a": 10**22}
    for text, message in (("1" * 5000, "thousands of digits"), ("[" * 200_000, "nested too deeply")):
        with pytest.raises(strict_json.JsonError, match=message):
            strict_json.parse(text, strict=False)
