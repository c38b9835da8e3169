"""What stops a conversion."""

from collections.abc import Sequence


class ConversionError(Exception):
    """What the user can mend, in one sentence; `details` are lines to print before it."""

    def __init__(self, message: str, details: Sequence[str] = ()):
        super().__init__(message)
        self.details = details
