"""Text that is not UTF-8: which bytes it has, and what stands for it where only UTF-8 is taken."""

from __future__ import annotations

import pyarrow as pa
import pytest

from complete_fn.text import (
    decode_bytes,
    encode_text,
    escape_surrogates,
    is_utf8,
    restore_bytes,
    text_column,
    to_texts,
    without_surrogates,
)


def test_different_texts_have_different_bytes() -> None:
    texts = ["a\ud800", "a\udfff", "a?", "a\ufffd", "a"]
    assert len({encode_text(t) for t in texts}) == len(texts)
    assert encode_text("naïve 𝄞") == "naïve 𝄞".encode()


def test_bytes_that_are_not_utf8_come_back_as_they_were() -> None:
    raw = b"caf\xe9 \xf0\x9d\x84\x9e"
    column = pa.array([raw, None], pa.large_binary()).view(pa.large_string())
    texts = to_texts(column)
    assert texts == [decode_bytes(raw), None]
    assert restore_bytes(texts[0]) == raw
    assert text_column(texts, restore_bytes).view(pa.large_binary()).to_pylist() == [raw, None]
    with pytest.raises(UnicodeEncodeError):
        restore_bytes("\ud800")


def test_a_lone_surrogate_is_kept_as_bytes_that_no_text_has() -> None:
    column = text_column(["a\ud800", "fine", None])
    assert column.view(pa.large_binary()).to_pylist() == [b"a\xed\xa0\x80", b"fine", None]
    assert [is_utf8(text) for text in to_texts(column)] == [False, True, True]


def test_what_stands_for_a_lone_surrogate() -> None:
    assert without_surrogates("a\ud800𝄞") == "a\ufffd𝄞"
    assert without_surrogates("\ud834\udd1e") == "𝄞"
    assert escape_surrogates("caf\udce9 é") == "caf\\udce9 é"
