"""Numbers as a reader wants them: as many digits as their uncertainty leaves."""

import math


def number(value: float | None, error: float | None = None, digits: int = 4) -> str:
    """A number with two digits of its uncertainty, or with a few significant digits.

    Arguments:
        value: the number; None and NaN become a dash.
        error: its standard error, or half the width of its interval.
        digits: significant digits where there is no error.
    """
    if value is None or not math.isfinite(value):
        return "–"
    if error is not None and math.isfinite(error) and error > 0:
        # not more than six significant ones, however small the error
        most = 5 - math.floor(math.log10(abs(value))) if value else 8
        text = f"{value:,.{max(0, min(most, 1 - math.floor(math.log10(error))))}f}"
    elif value == 0 or 1e-4 <= abs(value) < 1e6:
        text = f"{value:.{digits}g}" if abs(value) < 10 ** (digits - 1) else f"{value:,.0f}"
    else:
        text = f"{value:.{digits - 1}e}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def interval(low: float, high: float) -> str:
    """An interval with as many digits as its width deserves, as `1.20 to 1.85`."""
    half = (high - low) / 2
    return f"{number(low, half)} to {number(high, half)}"


def spread(values: list[float]) -> float | None:
    """Half the distance between the smallest and the largest; None below two values."""
    return (max(values) - min(values)) / 2 if len(values) > 1 else None


def count(n: int, word: str, plural: str = "") -> str:
    """`1 run`, `3 runs`."""
    return f"{n:,} {word if n == 1 else plural or word + 's'}"


def listed(words: list[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}" if words else ""


def rounded(value: float | None) -> float | None:
    """A number of six significant digits for a plot; None where there is none."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
