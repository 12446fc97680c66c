"""What a user hears of a choice."""

from __future__ import annotations

from dsv3_jax.quantization.choose import choose_formats
from dsv3_jax.quantization.formats import parse_format

COLUMNS = {
    "params/moe/attention/o_DHU": 64,
    "params/moe/attention/q_a_AD": 64,
    "params/moe/mlp/experts/down_EDF": 24,
}


def test_a_second_rounding_is_told() -> None:
    stored = dict.fromkeys(COLUMNS, "int8")
    formats, notes = choose_formats(COLUMNS, stored, parse_format("int4:32"), ["attention"])
    assert formats == stored | dict.fromkeys(list(COLUMNS)[:2], "int4:32")
    assert notes == ["2 leaves are stored as int8 and rounded a second time"]


def test_the_stored_format_and_a_first_rounding_need_no_word() -> None:
    for stored, asked in (
        (dict.fromkeys(COLUMNS, "int8"), "int8"),
        (dict.fromkeys(COLUMNS, "fp8"), "fp8+act8"),
        ({}, "fp8"),
    ):
        assert choose_formats(COLUMNS, stored, parse_format(asked)) == (dict.fromkeys(COLUMNS, asked), [])


def test_groups_that_do_not_divide_are_told() -> None:
    formats, notes = choose_formats(COLUMNS, {}, parse_format("int4:32"))
    assert set(formats) == set(list(COLUMNS)[:2])
    assert notes == [
        "params/moe/mlp/experts/down_EDF: no group of 16 or more divides its 24 columns: left as it is"
    ]
