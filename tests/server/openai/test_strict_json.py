"""Bodies that Python's own JSON reader would take, and the standard does not."""

import pytest

from gpt2ft.server.errors import ApiError
from gpt2ft.server.openai.strict_json import read_object


def test_an_object_is_read():
    assert read_object('{"a": [1, 2.5, null, true], "é🙂": {"b": "\\ud83d\\ude42"}}'.encode()) == {
        "a": [1, 2.5, None, True],
        "é🙂": {"b": "🙂"},
    }


@pytest.mark.parametrize(
    ("body", "fact"),
    [
        (b"", "line 1 column 1"),
        (b'{"a": 1,}', "line 1 column 9"),
        (b"{} {}", "line 1 column 4"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1, "a": 1}', "once"),
        (b'{"a": "\\ud83d"}', "surrogate"),
        (b'{"\\ude42": 1}', "surrogate"),
        (b'{"a": "\xff"}', "byte 7"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digits"),
        (b'{"a": ' + b"[" * 100_000, "deeply"),
    ],
)
def test_all_else_is_refused(body, fact):
    with pytest.raises(ApiError, match=fact) as error:
        read_object(body)
    assert (error.value.status, error.value.code, error.value.param) == (400, "invalid_json", None)
