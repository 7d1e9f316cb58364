"""Parse and print quantities. One place decides what GiB, GB/s and TFLOP/s mean.

Lives here: the unit table, `parse`, and the printers. Comes in: text such as "80 GiB" or "3.35 TB/s".
Goes out: floats in base units (bytes, bytes/s, FLOP/s, seconds, 1/s, watts) and short text.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

GIB = 1 << 30
MIB = 1 << 20

_SI = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}

UNITS: dict[str, tuple[str, float]] = {
    **{f"{p}B": ("bytes", f) for p, f in (_SI | _BINARY).items()},
    **{f"{p}B/s": ("bytes/s", f) for p, f in (_SI | _BINARY).items()},
    **{f"{p}bit/s": ("bytes/s", f / 8) for p, f in _SI.items()},
    **{f"{p}b/s": ("bytes/s", f / 8) for p, f in _SI.items()},
    **{f"{p}FLOP/s": ("flop/s", f) for p, f in _SI.items()},
    **{f"{p}FLOPS": ("flop/s", f) for p, f in _SI.items()},
    "s": ("seconds", 1.0),
    "ms": ("seconds", 1e-3),
    "us": ("seconds", 1e-6),
    "µs": ("seconds", 1e-6),
    "ns": ("seconds", 1e-9),
    "min": ("seconds", 60.0),
    "h": ("seconds", 3600.0),
    "days": ("seconds", 86400.0),
    "W": ("watts", 1.0),
    "kW": ("watts", 1e3),
    "USD/h": ("usd/h", 1.0),
}
_QUANTITY = re.compile(r"^\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(\S+)?\s*$")


def parse(text: str, dimension: str) -> float:
    """`text` ("80 GiB") in base units of `dimension` ("bytes", "bytes/s", "flop/s", "seconds", "watts", "1").

    Raises ValueError with the units that would do.
    """
    match = _QUANTITY.match(text)
    if not match:
        raise ValueError(f"'{text}' is not a number with a unit")
    number, unit = float(match[1]), match[2] or ""
    if not math.isfinite(number):
        raise ValueError(f"'{text}' is not a finite number")
    if dimension == "1":
        if unit:
            raise ValueError(f"'{text}' should be a plain number, without '{unit}'")
        return number
    known = UNITS.get(unit)
    if known is None or known[0] != dimension:
        examples = ", ".join([u for u, (d, _) in UNITS.items() if d == dimension][:8])
        raise ValueError(f"'{text}' needs a unit of {dimension} ({examples})")
    return number * known[1]


_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"^\s*(\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:[eE]\+?(\d{1,3}))?\s*([KMBTkmbt]?)\s*$", re.ASCII)


def parse_count(text: str) -> int:
    """A whole number such as "15T", "300 B", "1.4e12" or "1_000"; K, M, B and T are powers of 1000, in either case.

    Exact: no floats on the way. Raises ValueError for other text, or when it is not whole.
    """
    match = _COUNT.match(text)
    if not match:
        raise ValueError("not a count")
    value = Decimal(match[1].replace("_", "")).scaleb(int(match[2] or 0)) * _COUNTS[match[3].upper()]
    if value != value.to_integral_value():
        raise ValueError("not a whole number")
    return int(value)


def days(value: float) -> str:
    """A long time, given in days: "21.3 days", "3,160 days"; below two days as `seconds` prints it."""
    return f"{significant(value)} days" if value >= 2 else seconds(value * 86400.0)


def gib(n_bytes: float, digits: int = 1) -> str:
    """Bytes as "12.3 GiB", or "123.4 MiB" below one GiB."""
    if abs(n_bytes) < GIB:
        return f"{n_bytes / MIB:,.{digits}f} MiB"
    return f"{n_bytes / GIB:,.{digits}f} GiB"


def seconds(value: float) -> str:
    """A duration with three significant digits: "812 µs", "45.6 ms", "12.3 s", "3 h 12 min"."""
    magnitude = abs(value)
    if magnitude >= 7200:
        minutes = round(value / 60)
        return f"{minutes // 60:,} h {minutes % 60} min"
    for limit, factor, unit in ((1.0, 1.0, "s"), (1e-3, 1e3, "ms"), (0.0, 1e6, "µs")):
        if magnitude >= limit:
            return f"{significant(value * factor)} {unit}"
    return "0 s"


def rate(value: float, unit: str) -> str:
    """`value` in base units with an SI prefix: rate(9.89e14, "FLOP/s") == "989 TFLOP/s"."""
    for prefix, factor in reversed(_SI.items()):
        if abs(value) >= factor:
            return f"{significant(value / factor)} {prefix}{unit}"
    return f"{significant(value)} {unit}"


def count(value: float) -> str:
    """A big count: 70.6 B, 8.03 B, 131 M."""
    for limit, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if abs(value) >= limit:
            return f"{significant(value / limit)}{suffix}"
    return f"{value:,.0f}"


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits, without an exponent."""
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e" in text or abs(value) >= 10 ** (digits - 1) else text
