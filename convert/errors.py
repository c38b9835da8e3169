"""What stops a conversion."""

import pickle
import struct
import zipfile
from collections.abc import Sequence

import yaml
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)


# What talking to the Hub can raise; the base is that of the HTTP library, which differs from version to version.
HUB_ERRORS: tuple[type[Exception], ...] = (
    HfHubHTTPError.__bases__[0], HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError, ValueError,
)  # fmt: skip
# What other libraries raise where a file is damaged or says what they did not expect.
PARSER_ERRORS: tuple[type[Exception], ...] = (
    OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
    EOFError, struct.error, zipfile.BadZipFile, pickle.UnpicklingError, yaml.YAMLError, StrictDataclassError,
)  # fmt: skip


class ConversionError(Exception):
    """What the user can mend, in one sentence; `details` are lines to print before it."""

    def __init__(self, message: str, details: Sequence[str] = ()):
        super().__init__(message)
        self.details = details


def one_line(error: BaseException) -> str:
    """The message of another's error, whose lines are put in one; of one about a configuration, of its cause. What is
    in a file may be of any length: the first thousand characters.
    """
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{' '.join(str(error).split()):.1000}" or type(error).__name__
