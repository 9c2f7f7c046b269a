"""Plain-text tables."""

from collections.abc import Iterable, Sequence


def columns(rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table with aligned columns; None shows as ``-``."""
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
