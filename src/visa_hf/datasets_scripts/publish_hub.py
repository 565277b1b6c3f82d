"""A folder made by `publish.export_dataset` goes to the Hub, in one commit."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

_OWN_FILES = [
    f"{config}/*.parquet" for config in ("expressions", "masks", "videos", "conversations", "frames", "clips")
]


def check_login(repo_id: str) -> None:
    """Find out, before any work is done, whether pushing can succeed.

    Raises:
        ValueError: `repo_id` is no name of a repository.
        ConnectionError: the Hub cannot be reached.
        PermissionError: nobody is logged in, or the Hub refuses the token.
    """
    if repo_id.count("/") != 1:
        raise ValueError(f"The repository {repo_id!r} must be `user/name`.")
    validate_repo_id(repo_id)
    with _plain_errors(repo_id):
        HfApi().whoami()


def push_folder(folder: str | os.PathLike[str], repo_id: str, *, private: bool = False) -> str:
    """Upload a folder as the content of a data set repository, which is made if it does not exist.

    Tables of an earlier push that are no longer there are removed in the same commit.

    Args:
        folder: of `export_dataset`.
        repo_id (`str`): `user/name`.
        private (`bool`): refuse if the repository exists and is public.

    Returns:
        `str`: its URL.

    Raises:
        ConnectionError, PermissionError, OSError: as the Hub says.
        ValueError: `private`, but the repository is public.
    """
    api = HfApi()
    with _plain_errors(repo_id):
        url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        if private and not api.repo_info(repo_id, repo_type="dataset").private:
            raise ValueError(
                f"The repository {repo_id!r} exists and is public. Make it private, or leave out --private."
            )
        api.upload_folder(
            repo_id=repo_id,
            folder_path=os.fspath(folder),
            repo_type="dataset",
            delete_patterns=_OWN_FILES,
            commit_message="Upload Parquet files made by visa_hf",
        )
    return str(url)


@contextmanager
def _plain_errors(repo_id: str) -> Iterator[None]:
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PermissionError("Nobody is logged in to the Hub. Run `hf auth login`, then push again.") from error
    except HfHubHTTPError as error:
        raise PermissionError(f"The Hub refuses {repo_id!r}: {error}") from error
    except (HTTPError, ConnectionError) as error:
        raise ConnectionError(
            f"The Hub cannot be reached ({error}). Write the files to a folder with --output, and push them later."
        ) from error
