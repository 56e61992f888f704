import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from satchel.core.errors import UserError
from satchel.core.units import BYTES, SECONDS, format_bytes, format_seconds, parse_bytes, parse_seconds
from tests.tolerances import TOLERANCE


@pytest.mark.parametrize(
    ("text", "count"),
    [("1.5GiB", 3 * 2**29), ("800 MB", 800_000_000), ("4096b", 4096), (".5kib", 512), (" 2TiB ", 2**41)],
)
def test_bytes_are_read_in_binary_and_decimal_units(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "1.5", "GiB", "-1GiB", "1e3MiB", "nanGiB", "1.5GiBs", "1,5GiB", "0GiB", "0.2B", "50ms"]
)
def test_nonsense_is_no_amount_of_memory(text):
    with pytest.raises(UserError):
        parse_bytes(text)


@pytest.mark.parametrize(("text", "cure"), [("2g", "2GiB"), ("1.5", "1.5GiB"), ("512M", "512MiB"), ("lots", "1.5GiB")])
def test_a_missing_unit_is_answered_with_the_likeliest(text, cure):
    with pytest.raises(UserError, match=f"such as {cure}$"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("10min", 600), ("50ms", 0.05), ("1h30min", 5400), ("2 h 05 min", 7500), ("1.5d", 129600)]
)
def test_seconds_are_read_alone_and_compound(text, seconds):
    assert parse_seconds(text) == pytest.approx(seconds, rel=TOLERANCE[torch.float64])


@pytest.mark.parametrize("text", ["", "10", "min", "-3s", "1m", "10min!", "0s", "1GiB", "1h-30min"])
def test_nonsense_is_no_length_of_time(text):
    with pytest.raises(UserError):
        parse_seconds(text)


@given(st.integers(1, 2**50))
def test_printed_bytes_are_read_back_within_half_of_the_last_digit(count):
    text = format_bytes(count)
    assert abs(parse_bytes(text) - count) <= half_of_last_digit(text, BYTES) + 0.5  # and a whole number of bytes


@given(st.floats(2e-6, 1e6))
def test_printed_seconds_are_read_back_within_half_of_the_last_digit(seconds):
    text = format_seconds(seconds)
    assert abs(parse_seconds(text) - seconds) <= half_of_last_digit(text, SECONDS) * (1 + TOLERANCE[torch.float64])


def half_of_last_digit(text, units):
    """Of `12.3 s`, 0.05 s; of `1 h 05 min`, half a minute."""
    *_, number, unit = text.split()
    return units[unit] * 0.5 / 10 ** len(number.partition(".")[2])


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (2**20, "1.00 MiB"), (1610612736, "1.50 GiB"), (663748608, "633 MiB")],
)
def test_bytes_print_three_digits(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.85, "850 ms"), (12.34, "12.3 s"), (200, "3 min 20 s"), (3900, "1 h 05 min"), (59.97, "1 min 00 s")],
)
def test_seconds_print_two_units_at_most(seconds, text):
    assert format_seconds(seconds) == text
