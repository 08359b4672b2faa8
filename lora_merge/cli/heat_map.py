"""A matrix of cosines as block characters: one row and one column for each client."""

from collections.abc import Iterator, Sequence

BLOCKS, ASCII = " ░▒▓█", " .:*#"  # below 0.2, 0.4, 0.6, 0.8, and above
AWAY, UNKNOWN = "-", "?"  # below 0, not measured
MOST = 56  # clients: a wider map would break at 80 columns


def shades(encoding: str | None) -> str:
    """The characters that a stream of this encoding can show."""
    return BLOCKS if (encoding or "").lower().replace("-", "").startswith("utf") else ASCII


def heat_map(names: Sequence[str], cosines: Sequence[Sequence[float | None]], shade: str) -> Iterator[str]:
    """The map's lines, the first of which says what the characters mean; two characters a cell where they fit."""
    if len(names) > MOST:
        yield f"The map of {len(names)} clients is too wide; --json has the cosines."
        return
    steps = ", ".join(f"'{char}' {0.2 * (step + 1):.1f}" for step, char in enumerate(shade))
    unknown = f", '{UNKNOWN}' not measured" if any(cosine is None for row in cosines for cosine in row) else ""
    yield f"cosines up to: {steps}; '{AWAY}' below 0{unknown}"
    wide = 1 + (len(names) <= MOST // 2)
    label = max(map(len, names), default=0)
    for name, row in zip(names, cosines, strict=True):
        yield f"{name:>{label}} |{''.join(_cell(cosine, shade) * wide for cosine in row)}|"


def _cell(cosine: float | None, shade: str) -> str:
    if cosine is None:
        return UNKNOWN
    return AWAY if cosine < 0 else shade[min(int(cosine * 5), 4)]
