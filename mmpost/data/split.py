"""Which split a key belongs to: a pure function of the key, the same on every machine."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

from mmpost.core.errors import MmpostError


def by_key(key: str, shares: Mapping[str, float]) -> str:
    """Split of a key.

    All rows with one key (an image, a speaker, a document) land together, which is what keeps splits
    disjoint.

    Args:
        key: What must not be divided, for example an image id.
        shares: Split name to its share; only ratios count, and the order of the names does not.

    Returns:
        One of the names; a name with share 0 never comes back.

    Raises:
        MmpostError: MMP-D038 when shares are negative, not finite or all 0.
    """
    total = math.fsum(shares.values()) if all(math.isfinite(share) for share in shares.values()) else 0.0
    if total <= 0 or min(shares.values()) < 0:
        raise MmpostError("MMP-D038", f"split shares must be ≥ 0 and not all 0; got {dict(shares)}")
    point = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    names = sorted(name for name in shares if shares[name] > 0)
    edges = (math.fsum(shares[name] for name in names[: i + 1]) / total for i in range(len(names) - 1))
    return next((name for name, edge in zip(names, edges, strict=False) if point < edge), names[-1])
