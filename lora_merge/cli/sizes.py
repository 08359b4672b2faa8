"""Sizes of files and of memory, for people."""


def size_text(count: float) -> str:
    """`count` bytes in the largest unit that leaves a number above 1: `328 B`, `160.0 MB`."""
    power = next((power for power in range(4) if count < 1000 ** (power + 1)), 4)
    return f"{count / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
