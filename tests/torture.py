"""How hard tests try to break something, in `make test` and in `make torture`, and a count of what they tried."""

import os
from collections import Counter


TORTURE = os.environ.get("XLSTM_TORTURE") == "1"
TRIED: Counter[str] = Counter()  # printed at the end of a run


def tries(few: int, many: int) -> int:
    """How often: `few` times in `make test`, `many` times in `make torture`."""
    return many if TORTURE else few


def tried(what: str, count: int = 1) -> None:
    """Counts what was tried, by a name in the plural: examples, mutations of files, processes killed."""
    TRIED[what] += count
