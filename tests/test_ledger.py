"""Receipts and attempts survive any death of the driver."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from denoise_batch.errors import ResumeError
from denoise_batch.inference.ledger import Failure, Ledger, Receipt

if TYPE_CHECKING:
    from pathlib import Path


def _receipt(unit: int, attempt: int = 1, rows: int = 10, bad: int = 0) -> Receipt:
    return Receipt(unit, attempt, f"unit-{unit}.parquet", rows, rows, 100, "d" * 32, {"null": bad} if bad else {})


def test_a_new_session_finds_what_was_committed(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.commit(_receipt(0))
        ledger.fail(Failure(1, 1, "damaged"))
        ledger.commit(_receipt(2, bad=3))
        assert ledger.session == 1
    with Ledger(tmp_path) as again:
        assert again.session == 2
        assert sorted(again.receipts) == [0, 2]
        assert again.failures[1][0].reason == "damaged"
        assert (again.rows_in, again.rows_out, again.bad_rows()) == (20, 20, {"null": 3})


def test_a_unit_is_never_counted_twice(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.commit(_receipt(0))
        with pytest.raises(ValueError, match="committed already"):
            ledger.commit(_receipt(0, attempt=2))


def test_a_withdrawn_unit_is_open_again(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.commit(_receipt(0))
        ledger.withdraw(0, "gone")
    with Ledger(tmp_path) as again:
        assert not again.receipts
        again.commit(_receipt(0, attempt=2))
    with Ledger(tmp_path) as third:
        assert third.receipts[0].attempt == 2


def test_a_damaged_line_is_an_error_and_a_torn_one_is_not(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.commit(_receipt(0))
        ledger.commit(_receipt(1))
    segment = tmp_path / "000001.jsonl"
    whole = segment.read_bytes()
    segment.write_bytes(whole[:-5])
    with Ledger(tmp_path) as again:
        assert sorted(again.receipts) == [0]
    segment.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    with pytest.raises(ResumeError, match="line 1 is damaged"):
        Ledger(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sessions=st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=8), st.integers(0, 200)), min_size=1, max_size=5)
)
def test_any_crash_loses_only_what_was_not_yet_acknowledged(
    tmp_path_factory: pytest.TempPathFactory, sessions: list[tuple[list[int], int]]
) -> None:
    """Each session commits units and dies; the crash tears up to so many bytes off its last line."""
    folder = tmp_path_factory.mktemp("ledger")
    expected: set[int] = set()
    for units, torn in sessions:
        with Ledger(folder) as ledger:
            assert set(ledger.receipts) == expected
            for unit in units:
                if unit not in ledger.receipts:
                    ledger.commit(_receipt(unit))
                    expected.add(unit)
            session = ledger.session
        # A line that was being written when the driver died was never acknowledged.
        segment = folder / f"{session:06d}.jsonl"
        with segment.open("ab") as file:
            file.write((b'0123456789abcdef ["receipt",{"unit":5' * 6)[:torn])
    with Ledger(folder) as final:
        assert set(final.receipts) == expected
        assert final.rows_in == 10 * len(expected)
