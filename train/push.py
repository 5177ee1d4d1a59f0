"""Uploading a model's folder to the Hub with huggingface_hub, and words for what can go wrong there."""

from __future__ import annotations

import glob
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelInfo, get_session
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import CONFIG_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_tnt.hub_cards import CARD_FILE, is_own_card

from .push_files import ModelFolder

# Of an earlier push, removed unless sent again: transformers would prefer an old model.safetensors to new shards.
REPLACED = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model-?????-of-?????.safetensors"]


class PushError(OSError):
    """The Hub could not be reached, or did not take what was sent. The local folder is as it was."""


@dataclass(frozen=True)
class Target:
    """Where a model goes.

    repo: "user/name", or "name" for a repository of the token's owner.
    private: a new repository is private, and an existing one must be.
    revision: the branch, made from main if it does not exist. None: main.
    overwrite: a repository with another type of model may be replaced.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Pushed:
    """url: of the commit, or of the newest one where nothing had changed."""

    url: str
    changed: bool
    kept_card: bool


def find_wrong_target(target: Target, flag: str = "REPO") -> Iterator[str]:
    """The rule that a repository's name breaks."""
    try:
        validate_repo_id(target.repo)
    except HFValidationError as error:
        yield f"{flag} {target.repo!r} is no name of a repository ({error}); use e.g. your-name/your-model"


def check_access(api: HfApi) -> str:
    """The name of the token's owner. Raises ValueError without a valid token, PushError without an answer."""
    with _explained(api, "the Hub was asked who you are"):
        return api.whoami()["name"]


def push_folder(api: HfApi, folder: ModelFolder, target: Target, *, message: str | None = None) -> Pushed:
    """Send a model's folder as a commit to the Hub.

    Large files that have arrived are not sent again when the same call is repeated. A model card that somebody wrote or
    edited there stays, and one of ours is replaced.

    Raises:
        ValueError: no valid token or no right to write, a repository that is public or holds another type of model.
        PushError: the Hub could not be reached, or the connection broke.
    """
    owner = check_access(api)
    repo = target.repo if "/" in target.repo else f"{owner}/{target.repo}"
    with _explained(api, f"{folder.path} was pushed to {repo}", owner, repo):
        before = _find_repo(api, repo, target.revision)
        if before is None:
            before = _find_repo(api, repo, None)
        if before is not None:
            _check_existing(api, before, folder, target)
        repo = api.create_repo(repo, private=target.private or None, exist_ok=True).repo_id
        if target.revision is not None and not target.revision.startswith("refs/"):
            api.create_branch(repo, branch=target.revision, exist_ok=True)
        keep_card = before is not None and _has_edited_card(api, before)
        files = [file for file in folder.files if not (keep_card and file == CARD_FILE)]
        done: CommitInfo = api.upload_folder(
            repo_id=repo, folder_path=folder.path, revision=target.revision, delete_patterns=REPLACED,
            allow_patterns=list(map(glob.escape, files)),
            commit_message=message or f"Upload {folder.model_type} model",
        )  # fmt: skip
    return Pushed(str(done.commit_url), before is None or done.oid != before.sha, keep_card)


def _find_repo(api: HfApi, repo: str, revision: str | None) -> ModelInfo | None:
    try:
        return api.model_info(repo, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _check_existing(api: HfApi, repo: ModelInfo, folder: ModelFolder, target: Target) -> None:
    """Raise ValueError where a push would harm what is there."""
    if target.private and not repo.private:
        raise ValueError(
            f"{repo.id} exists and is public, so that --private cannot hold; push to another name, or make it private "
            "on the Hub first"
        )
    text = None if target.overwrite else _read_file(api, repo, CONFIG_NAME)
    if text is None:
        return
    try:
        model_type = json.loads(text).get("model_type")
    except (ValueError, AttributeError):
        model_type = "unknown"
    if model_type != folder.model_type:
        raise ValueError(
            f"{repo.id} holds a model of type {model_type}, and {folder.path} one of type {folder.model_type}; push to "
            "another name, or use --overwrite to replace it by a new commit"
        )


def _has_edited_card(api: HfApi, repo: ModelInfo) -> bool:
    """Whether the repository has a card that `write_card` did not write, or that was changed since."""
    text = _read_file(api, repo, CARD_FILE)
    if text is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CARD_FILE
        path.write_bytes(text)
        return not is_own_card(path)


def _read_file(api: HfApi, repo: ModelInfo, name: str) -> bytes | None:
    """A file of a repository, or None if it has none of that name."""
    if not any(file.rfilename == name for file in repo.siblings or []):
        return None
    with tempfile.TemporaryDirectory() as folder:
        return Path(api.hf_hub_download(repo.id, name, revision=repo.sha, local_dir=folder)).read_bytes()


# -------------------------------------------------------------------------------------------------------------- errors


@contextmanager
def _explained(api: HfApi, doing: str, owner: str | None = None, repo: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises into ValueError for what its user has to change, and PushError for the rest.

    Only calls of the Hub stand in such a block: with some versions a connection that breaks raises OSError or
    RuntimeError, so that all of them count as that.
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ValueError("there is no access token of the Hub; run hf auth login, or set HF_TOKEN") from error
    except (HfHubHTTPError, OSError, RuntimeError, _transport_error()) as error:
        answer = _find_answer(error)
        if answer is None:
            raise PushError(f"{api.endpoint} could not be reached when {doing} ({_root_cause(error)})") from error
        raise _explain_answer(api, answer, doing, owner, repo) from error


def _explain_answer(api: HfApi, error: HfHubHTTPError, doing: str, owner: str | None, repo: str | None) -> Exception:
    status, said = error.response.status_code, error.server_message or _first_line(error)
    if status == 401:
        return ValueError(
            f"{api.endpoint} does not accept the access token ({said}); run hf auth login, or correct HF_TOKEN, which "
            "goes before it"
        )
    if status == 403:
        return ValueError(
            f"the token of {owner} may not write to {repo} ({said}); use a token with write access, and a repository "
            "of yours or of an organisation that you belong to"
        )
    return PushError(f"{api.endpoint} answered with the error {status} when {doing} ({said})")


def _find_answer(error: BaseException | None) -> HfHubHTTPError | None:
    """The Hub's answer behind an error, if there was one."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return error
        error = error.__cause__
    return None


def _transport_error() -> type[BaseException]:
    """What the HTTP client of huggingface_hub raises; it is httpx, or a later package of another name."""
    package = type(get_session()).__module__.partition(".")[0]
    return sys.modules[package].HTTPError


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(error) or type(error).__name__


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
