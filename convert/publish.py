"""Uploading a checkpoint to the Hub."""

from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .errors import HUB_ERRORS, ConversionError, one_line
from .remote_code import code_files
from .source import TOKENIZER_FILES


# Files of an earlier checkpoint, beside its configuration, that would be read with or in place of the new ones.
REPLACED = ("*.safetensors", "*.bin", "*.index.json", "config.json", "generation_config.json", "config.yaml")


def check_repo(repo: str) -> str:
    """The name of a repository as it is. Raises ValueError, in words that follow "must be", unless it can be one."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"a repository such as me/my-xlstm: {one_line(error)}") from error
    if repo.count("/") != 1:
        raise ValueError(f"a repository with its owner, such as me/my-xlstm, got {repo!r}")
    return repo


def check_login() -> None:
    """Raises ConversionError unless the Hub can be reached and knows the user."""
    try:
        HfApi().whoami()
    except HUB_ERRORS as error:
        raise ConversionError(f"--push-to-hub must have a login to the Hub: {one_line(error)}") from error


def push(folder: Path, repo: str, private: bool) -> str:
    """Uploads all of `folder` to the repository `repo`, which is created if it is missing; returns its address.

    Weights, configuration, tokenizer and code that the repository had at its top before go in the same commit.

    Raises ConversionError if it does not work; the folder stays as it is.
    """
    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True, private=private or None)
        code = [path.name for path in code_files()]
        top = [name for name in api.list_repo_files(repo) if "/" not in name]
        old = [name for name in top if any(fnmatch(name, pattern) for pattern in (*REPLACED, *TOKENIZER_FILES, *code))]
        api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Upload xLSTM", delete_patterns=old)
    except HUB_ERRORS as error:
        raise ConversionError(
            f"The checkpoint is in {folder}, but could not be pushed to {repo} (`hf upload` can try again): "
            f"{one_line(error)}"
        ) from error
    return f"{api.endpoint}/{repo}"
