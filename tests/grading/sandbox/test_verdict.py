"""What an ended call means, whatever foreign code has left in its pipes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.grading.sandbox import AssertionTest, ProgramTest
from graft.grading.sandbox.verdict import grade_result, passed
from graft.grading.sandbox.worker import Ended
from graft.types import Outcome
from tests.grading.sandbox.sandboxes import LIMITS

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
KEYS = st.sampled_from(["nonce", "value", "error", "reason", "status"])
RECORDS = st.one_of(
    st.binary(max_size=100),
    st.binary(max_size=100).map(lambda data: b"ready\n" + data),
    JSON.map(lambda value: b"ready\n" + json.dumps(value).encode()),
    st.dictionaries(KEYS, JSON | st.just("right")).map(lambda value: b"ready\n" + json.dumps(value).encode()),
)


@given(record=RECORDS, output=st.binary(max_size=50), status=st.integers(-70, 255))
def test_no_bytes_break_it_and_only_a_record_with_the_nonce_gives_a_value(record, output, status):
    ended = Ended(status, 0.1, None, record, output, 0.1)
    result = grade_result(ended, "right", LIMITS)
    assert (result.value is not None) == (result.outcome is Outcome.GRADED)
    if result.value is not None:
        assert json.loads(record.removeprefix(b"ready\n"))["nonce"] == "right"
    (result.reason + result.stdout).encode()
    for test in (AssertionTest(""), ProgramTest("", "x")):
        assert passed(ended, "right", test, LIMITS).value in (0.0, 1.0, None)


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({}, Outcome.GRADED),
        ({"over": "wall_s"}, Outcome.TIMED_OUT),
        ({"over": "memory_mb"}, Outcome.OVER_LIMIT),
        ({"over": "output_kb"}, Outcome.OVER_LIMIT),
        ({"over": "record"}, Outcome.CRASHED),
        ({"record": b""}, Outcome.SANDBOX_FAILED),
        ({"record": b"ready\n"}, Outcome.CRASHED),
        ({"record": b"ready\n", "status": -9}, Outcome.CRASHED),
        ({"record": b"ready\n", "status": -9, "cpu_s": 60.0}, Outcome.TIMED_OUT),
        ({"record": b'ready\n{"nonce": "other", "value": 1.0}'}, Outcome.CRASHED),
        ({"record": b'ready\n{"nonce": "n", "value": 1}'}, Outcome.CRASHED),
        ({"record": b'ready\n{"nonce": "n", "value": true}'}, Outcome.CRASHED),
        ({"record": b'ready\n{"nonce": "n", "value": NaN}'}, Outcome.NOT_FINITE),
        ({"record": b'ready\n{"nonce": "n", "value": 1e999}'}, Outcome.NOT_FINITE),
        (
            {"record": b'ready\n{"nonce": "n", "error": "memory", "reason": "MemoryError"}'},
            Outcome.OVER_LIMIT,
        ),
        ({"record": b'ready\n{"nonce": "n", "error": "raised", "reason": 7}'}, Outcome.CRASHED),
    ],
)
def test_outcomes_by_hand(fields, outcome):
    usual = {"status": 0, "cpu_s": 0.1, "over": None, "record": b'ready\n{"nonce": "n", "value": 0.5}'}
    result = grade_result(Ended(**{**usual, "output": b"", "seconds": 0.1, **fields}), "n", LIMITS)
    assert result.outcome is outcome
    assert result.value == (0.5 if outcome is Outcome.GRADED else None)
    assert (result.reason == "") == (outcome is Outcome.GRADED)
