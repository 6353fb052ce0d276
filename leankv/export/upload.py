"""Uploading a repository folder to the hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from leankv.errors import UserError
from leankv.export.repository import MARK, is_whole, local_base


def upload(folder: Path, repository: str, *, private: bool = False, endpoint: str | None = None) -> str:
    """Make a repository on the hub if there is none, and commit a folder to it.

    As the account whose token `hf auth login` keeps, or `HF_TOKEN` holds.

    Args:
        folder: that an export wrote.
        repository: `user/name`.
        private: whether a new repository is seen by its owner only.
        endpoint: of another hub.

    Returns:
        The address of the commit.

    Raises:
        UserError: the folder is no export, or names a base that only this machine has, or the hub refuses or cannot be
            reached.
    """
    if not is_whole(folder):
        raise UserError(f"{folder} is no finished leankv export; write a repository with it first")
    if (base := local_base(folder)) is not None:
        raise UserError(
            f"{folder} names the folder {base} as its base, which other machines do not have; export it with "
            "--with-weights, or from a base on the hub"
        )
    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Model with a compressed KV cache",
            ignore_patterns=MARK,
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"{folder} could not be uploaded to {repository} ({type(error).__name__}: {reason}); check the name, the "
            "network, and that `hf auth login` was done or HF_TOKEN is set"
        ) from error
    return str(commit)
