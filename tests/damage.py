"""What can happen to a file of a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path


def damaged(file: Path, other: Path | None, draw: random.Random, flips: int) -> Iterator[str]:
    """Damages a file in one way after the other, and mends it at the end.

    Args:
        file: To be damaged.
        other: The same file of another step; None leaves the exchange out.
        draw: Decides on the places.
        flips: Bits that are flipped anywhere, one at a time; two more are near the start and the end.
    """
    whole = file.read_bytes()
    for size in (0, draw.randrange(len(whole)), len(whole) - 1):
        file.write_bytes(whole[:size])
        yield f"cut to {size} bytes"
    # The first and last bytes are the zip file's own; a change there must not be worse than elsewhere.
    places = [draw.randrange(len(whole)) for _ in range(flips)]
    edges = (draw.randrange(min(100, len(whole))), len(whole) - 1 - draw.randrange(min(1000, len(whole))))
    for place in (*places, *edges):
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        yield f"bit flipped in byte {place}"
    file.unlink()
    yield "removed"
    if other is not None:
        file.write_bytes(other.read_bytes())
        yield "that of another step"
    file.write_bytes(whole)
