"""Keys of result tables over several windows: none comes twice, of whatever type."""

from __future__ import annotations

from datetime import date
from typing import Any

import pyarrow as pa
import pytest

from complete_fn.errors import InputError
from complete_fn.rows.result_tables import KeysSeen


@pytest.mark.parametrize(
    ("first", "again", "other"),
    [
        ([3, 1, -2], -2, 5),
        (["a", "é", ""], "é", "A"),
        ([b"a", b"\xff"], b"\xff", b"b"),
        ([date(2026, 1, 1), date(2026, 1, 2)], date(2026, 1, 2), date(2026, 1, 3)),
        ([2**64 - 1, 7], 2**64 - 1, 8),
    ],
)
def test_a_key_of_an_earlier_window_is_refused(first: list[Any], again: Any, other: Any) -> None:
    kind = pa.uint64() if first[0] == 2**64 - 1 else pa.array(first).type
    seen = KeysSeen()
    seen.add(pa.chunked_array([first], kind), "id")
    seen.add(pa.chunked_array([[other]], kind), "id")
    with pytest.raises(InputError, match=r"'id' has the value .* more than once"):
        seen.add(pa.chunked_array([[again]], kind), "id")
    seen.add(pa.chunked_array([[]], kind), "id")


def test_a_million_keys_in_windows() -> None:
    seen = KeysSeen()
    for low in range(0, 1_000_000, 200_000):
        seen.add(pa.chunked_array([range(low, low + 200_000)]), "id")
    with pytest.raises(InputError, match="the value 345678 more"):
        seen.add(pa.chunked_array([[2_000_000, 345_678]]), "id")
