"""Tables and sizes for people to read."""
from __future__ import annotations


def size(n: int) -> str:
    """1234567 -> 1.18 MiB."""
    if n < 1024:
        return f"{n} B"
    value = float(n)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1024 or unit == "TiB":
            break
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def duration(s: float) -> str:
    """7384 -> 2h03m04s; below a minute with a decimal."""
    if s < 60:
        return f"{s:.1f}s"
    minutes, seconds = divmod(int(s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m{seconds:02}s" if hours else f"{minutes}m{seconds:02}s"


def span(s: float) -> str:
    """340 ms, 1.2 s, 3m04s: how long something lasts."""
    return f"{s * 1000:.0f} ms" if s < 0.9995 else f"{s:.1f} s" if s < 60 else duration(s)


def bits(n: float) -> str:
    """Bits a second: 12.3 G."""
    for unit in ("", " k", " M", " G"):
        if n < 999.5 or unit == " G":
            return f"{n:.{0 if not unit or n >= 99.95 else 1 if n >= 9.995 else 2}f}{unit}"
        n /= 1000
    raise AssertionError


def table(head: list[str], rows: list[list[str]], left: frozenset[int] = frozenset({0})) -> str:
    """Columns lined up: those in `left` to the left, numbers to the right."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, ["-" * w for w in widths], *rows]:
        cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
