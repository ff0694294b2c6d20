"""Exported networks on the Hugging Face Hub, or on one that answers as it does (`HF_ENDPOINT`).

All is done by the library huggingface_hub (the extra `hub`), with its token and its settings. Only
the three files of an export are sent or fetched, none of which is code.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dynmoe.errors import DynmoeError, ResourceError, UserError
from dynmoe.lab.export import ABOUT, CARD, WEIGHTS

FILES = [WEIGHTS, ABOUT, CARD]
TOKEN = "log in with a token that may write there (hf auth login), or set HF_TOKEN"


def check_name(name: str) -> None:
    """Refuse what names no network of a hub.

    Raises:
        UserError: it is not OWNER/NAME, or huggingface_hub is not installed.
    """
    library = _library()
    allowed = "OWNER/NAME of letters, digits, '-', '_' and '.', such as alice/my-network"
    try:
        library.utils.validate_repo_id(name)
    except ValueError:
        raise UserError(f"{name!r} names no network of a hub; use {allowed}") from None
    if "/" not in name:
        raise UserError(f"{name!r} names no owner; use {allowed}")


def check_push(name: str) -> None:
    """Refuse what cannot be sent, before any work.

    Raises:
        UserError: as of `check_name`, or there is no token.
    """
    check_name(name)
    if not _library().get_token():
        raise UserError(f"there is no token of the hub; {TOKEN}")


def push(folder: Path | str, name: str, public: bool = False) -> str:
    """Send an exported network to a hub; a later one becomes its newest version.

    Args:
        folder: what `dynmoe.export.export` has written.
        name: OWNER/NAME there.
        public: for all to see, where there is no such name yet; else for the owner alone.

    Returns:
        Its address.

    Raises:
        UserError: the name, the token or the folder will not do.
        ResourceError: the hub cannot be reached, or fails.
    """
    check_push(name)
    folder = Path(folder)
    for file in FILES:
        if not (folder / file).is_file():
            raise UserError(f"{folder} holds no exported network: it has no {file}")
    library = _library()
    api = library.HfApi(endpoint=_endpoint())
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=FILES,
            commit_message="Network exported by dynmoe",
        )  # fmt: skip
    except (library.errors.HTTPError, OSError, ValueError) as error:
        what = f"{name} was not sent, its files are in {folder}"
        raise _told(error, what, f"the hub refuses it; {TOKEN}") from None
    return f"{api.endpoint}/{name}"


def fetch(name: str, revision: str | None = None, folder: Path | None = None) -> Path:
    """The files of a network on a hub.

    Args:
        name: OWNER/NAME.
        revision: a branch, tag or commit; None: the newest.
        folder: where they are put; None: the cache of huggingface_hub.

    Returns:
        Their folder.

    Raises:
        UserError: there is no such network, or it may not be read.
        ResourceError: the hub cannot be reached, or fails.
    """
    check_name(name)
    library = _library()
    try:
        found = library.snapshot_download(
            name, revision=revision, allow_patterns=FILES, local_dir=folder, endpoint=_endpoint()
        )
    except (library.errors.HTTPError, OSError, ValueError) as error:
        refused = "the hub has none of that name, or your token may not read it"
        raise _told(error, f"{name} was not fetched", refused) from None
    return Path(found)


def _library() -> Any:
    """huggingface_hub.

    Raises:
        UserError: it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils  # names of both are not there before
    except ImportError:
        raise UserError("huggingface_hub is not installed: pip install 'dynmoe[hub]'") from None
    return huggingface_hub


def _endpoint() -> str | None:
    """The address of another hub; told to each call, as the library looks only when imported."""
    return os.environ.get("HF_ENDPOINT") or None


def _told(error: Exception, what: str, refused: str) -> DynmoeError:
    """The one line for what the library raised: what has not happened, and why.

    `refused` is the reason where the hub says that it will not.
    """
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__  # it wraps them
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return UserError(f"{what}: {refused} (HTTP {status})")
    reason = f"{type(error).__name__}: {error}".split("\n")[0].strip()
    return ResourceError(f"{what}: the hub cannot be reached, or fails ({reason}); try again later")
