"""What a repository on the Hub holds before an upload."""

from __future__ import annotations

from huggingface_hub import HfApi

from ..errors import InputError


def existing_files(api: HfApi, repo_id: str, repo_type: str, private: bool = False) -> list[str]:
    """Return the sorted names of a repository's files without .gitattributes; none if it does not exist.

    Args:
        private: whether it has to be private, if it exists.

    Raises:
        InputError: if it is public and has to be private: the Hub ignores the wish for an existing repository.
    """
    if not api.repo_exists(repo_id, repo_type=repo_type):
        return []
    info = api.repo_info(repo_id, repo_type=repo_type)
    if private and not info.private:
        raise InputError(f"{repo_id}: it exists and is public: make it private in its settings on the Hub first")
    return sorted({file.rfilename for file in info.siblings or []} - {".gitattributes"})
