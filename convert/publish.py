"""Uploading a checkpoint to the Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from .errors import ConversionError


# Files of an earlier upload that would be read in place of the new ones.
REPLACED = ["*.safetensors", "*.bin", "*.index.json", "config.json", "config.yaml", "*.py"]
HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled)


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
    except (*HUB_ERRORS, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConversionError(
            f"The checkpoint is in {folder}, but could not be pushed to {repo}: {reason}; try again with `hf upload`."
        ) from error
    return f"{api.endpoint}/{repo}"
