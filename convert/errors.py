"""What stops a conversion."""

from collections.abc import Sequence

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled


# What talking to the Hub can raise; the base is that of the HTTP library, which differs from version to version.
HUB_ERRORS: tuple[type[Exception], ...] = (
    HfHubHTTPError.__bases__[0], HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError, ValueError,
)  # fmt: skip


class ConversionError(Exception):
    """What the user can mend, in one sentence; `details` are lines to print before it."""

    def __init__(self, message: str, details: Sequence[str] = ()):
        super().__init__(message)
        self.details = details


def one_line(error: BaseException) -> str:
    """The message of another's error, whose lines are put in one."""
    return " ".join(str(error).split()) or type(error).__name__
