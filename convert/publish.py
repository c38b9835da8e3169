"""Uploading a checkpoint to the Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from .errors import HUB_ERRORS, ConversionError, one_line


# Files of an earlier upload that would be read in place of the new ones.
REPLACED = ["*.safetensors", "*.bin", "*.index.json", "config.json", "config.yaml", "*.py"]


def push(folder: Path, repo: str) -> str:
    """Uploads all of `folder` to the repository `repo`, which is created if it is missing; returns its address.

    Weights, configuration and code that the repository had before go in the same commit.

    Raises ConversionError if it does not work; the folder stays as it is.
    """
    api = HfApi()
    try:
        repo = api.create_repo(repo, exist_ok=True).repo_id
        api.upload_folder(
            folder_path=folder, repo_id=repo, commit_message="Upload xLSTM", delete_patterns=list(REPLACED)
        )
    except HUB_ERRORS as error:
        raise ConversionError(
            f"The checkpoint is in {folder}, but could not be pushed to {repo} (`hf upload` can try again): "
            f"{one_line(error)}"
        ) from error
    return f"{api.endpoint}/{repo}"
