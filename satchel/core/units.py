"""Bytes and seconds, as people write them and as satchel prints them.

`parse_bytes("1.5GiB")`, `parse_seconds("1h30min")`; a number without a unit is refused, because a guess would be wrong
half of the time. What the format functions print, the parse functions read.
"""

import re

from satchel.core.errors import UserError

BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
DECIMAL_BYTES = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}

_TERM = r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)"


def parse_bytes(text: str) -> int:
    """Bytes of `1.5GiB`, `800 MB`, `4096B`; letter case is free. Raises UserError on anything else, zero too."""
    units = {unit.lower(): size for unit, size in (BYTES | DECIMAL_BYTES).items()}
    match = re.fullmatch(_TERM, text.strip())
    if not match or match[2].lower() not in units:
        raise UserError(f"'{text}' is no amount of memory; write a number and a unit, such as {_memory_cure(text)}")
    amount = round(float(match[1]) * units[match[2].lower()])
    if amount < 1:
        raise UserError(f"'{text}' is no memory at all; a budget is at least 1B")
    return amount


def parse_seconds(text: str) -> float:
    """Seconds of `10min`, `50ms`, `1h30min`. Raises UserError on anything else, zero too."""
    terms = re.findall(_TERM, text)
    known = bool(terms) and all(unit in SECONDS for _, unit in terms)
    if not known or re.sub(_TERM, "", text).strip():
        raise UserError(f"'{text}' is no length of time; write a number and one of {', '.join(SECONDS)}, such as 10min")
    seconds = sum(float(number) * SECONDS[unit] for number, unit in terms)
    if seconds <= 0:
        raise UserError(f"'{text}' is no time at all; a budget is above 0s")
    return seconds


def format_bytes(count: float) -> str:
    """`1.50 GiB`, `632 MiB`: three significant digits in the largest unit that leaves a number of at least 1."""
    unit = max((u for u in BYTES if abs(count) >= BYTES[u]), key=BYTES.__getitem__, default="B")
    return f"{_three_digits(count / BYTES[unit]) if unit != 'B' else round(count)} {unit}"


def format_seconds(seconds: float) -> str:
    """`850 ms`, `12.3 s`, `3 min 20 s`, `1 h 05 min`: two units at most."""
    if abs(seconds) < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.0f} ms"
    if abs(seconds) < 59.95:
        return f"{seconds:.1f} s"
    if abs(seconds) < 3599.5:
        return "{} min {:02d} s".format(*divmod(round(seconds), 60))
    return "{} h {:02d} min".format(*divmod(round(seconds / 60), 60))


def _three_digits(number: float) -> str:
    return f"{number:.{2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0}f}"


def _memory_cure(text: str) -> str:
    """The likeliest reading of `2g` or `1.5`, or an example."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)i?b?\s*", text.lower())
    if not match:
        return "1.5GiB"
    return f"{match[1]}{match[2].upper() or 'G'}iB"
