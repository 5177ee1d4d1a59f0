"""Uploading a model's folder to the Hub with huggingface_hub, and words for what can go wrong there."""

from __future__ import annotations

import glob
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

from modeling_tnt.hub_cards import CARD_FILE, is_own_card, load_facts, name_card
from modeling_tnt.hub_export import WEIGHTS

from ..common.model_facts import bare_facts, read_config
from .push_files import ModelFolder


class PushError(OSError):
    """The Hub could not be reached, or did not take what was sent. The local folder is whole."""


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

    def describe(self) -> str:
        kept = "card     the repository's README.md was written or edited by somebody else, and stays\n"
        return (
            kept if self.kept_card else ""
        ) + f"commit   {self.url}{'' if self.changed else ' (nothing had changed)'}"


def find_wrong_target(target: Target, flag: str = "REPO") -> Iterator[str]:
    """The rule that a repository's name breaks."""
    try:
        validate_repo_id(target.repo)
    except HFValidationError as error:
        yield f"{flag} {target.repo!r} is no name of a repository ({error}); use e.g. your-name/your-model"


def check_target(api: HfApi, target: Target, model_type: str) -> tuple[str, ModelInfo | None]:
    """Whether a model of this type may go there, before anything is sent.

    Returns the whole name of the repository, and what is known of it: at the branch, or else at main; None if it does
    not exist.

    Raises:
        ValueError: no valid token, one that cannot write, a repository of somebody else's that does not exist, one that
            is public where it must be private, or one with another type of model.
        PushError: the Hub could not be reached.
    """
    with _explained(api, "it was asked whose the access token is"):
        me = api.whoami(cache=True)  # of this `api`: the Hub allows few such questions
    owners = [me["name"], *(org["name"] for org in me.get("orgs") or [])]
    repo = target.repo if "/" in target.repo else f"{me['name']}/{target.repo}"
    with _explained(api, f"{me['name']} asked for {repo}"):
        found = _find_repo(api, repo, target.revision)
        if found is None and target.revision is not None:
            found = _find_repo(api, repo, None)  # where a new branch begins
        if found is not None:
            _check_existing(api, found, model_type, target)
    role = ((me.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise ValueError(
            f"the access token of {me['name']} may only read from {api.endpoint}; use one that may write to {repo}"
        )
    if found is None and repo.split("/")[0] not in owners:
        raise ValueError(
            f"{repo} does not exist, or {me['name']} may not see it, and cannot make it; use a name that begins with "
            f"{' or '.join(f'{owner}/' for owner in owners)}"
        )
    return repo, found


def push_folder(api: HfApi, folder: ModelFolder, target: Target, *, message: str | None = None) -> Pushed:
    """Send a model's folder as a commit to the Hub.

    Large files that have arrived are not sent again when the same call is repeated. A model card that somebody wrote or
    edited there stays, and one of ours is replaced. In the folder a card of ours gets the name on the Hub.

    Raises:
        ValueError: as `check_target`, and for a token that may not write there.
        PushError: the Hub could not be reached, or the connection broke.
    """
    repo, before = check_target(api, target, folder.model_type)
    doing = f"{folder.path} was pushed to {repo}"
    with _explained(api, doing):
        repo = api.create_repo(repo, private=target.private or None, exist_ok=True).repo_id
        if target.revision is not None and not target.revision.startswith("refs/"):
            api.create_branch(repo, branch=target.revision, exist_ok=True)
        keep_card = before is not None and _has_edited_card(api, before)
    _name_card(folder.path, repo)
    with _explained(api, doing):
        files = [file for file in folder.files if not (keep_card and file == CARD_FILE)]
        done: CommitInfo = api.upload_folder(
            repo_id=repo, folder_path=folder.path, revision=target.revision, delete_patterns=list(WEIGHTS),
            allow_patterns=list(map(glob.escape, files)),
            commit_message=message or f"Upload {folder.model_type} model",
        )  # fmt: skip
    return Pushed(str(done.commit_url), before is None or done.oid != before.sha, keep_card)


def _find_repo(api: HfApi, repo: str, revision: str | None) -> ModelInfo | None:
    try:
        return api.model_info(repo, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _check_existing(api: HfApi, repo: ModelInfo, model_type: str, target: Target) -> None:
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
        held = json.loads(text).get("model_type")
    except (ValueError, AttributeError):
        held = "unknown"
    if held != model_type:
        raise ValueError(
            f"{repo.id} holds a model of type {held}, and this one is of type {model_type}; push to another name, or "
            "use tnt push --overwrite to replace it by a new commit"
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


def _name_card(folder: Path, repo: str) -> None:
    """Let a card of ours load the model by the name that it gets, before it is sent."""
    config = read_config(folder)
    if config is None:
        return
    facts = load_facts(folder, config)
    if facts is None:  # the card of save_pretrained, which knows of no tokenizer
        facts = replace(bare_facts(folder, config), tokenizer=None)
    if facts.repo_id != repo:
        name_card(folder, facts, repo)


def _read_file(api: HfApi, repo: ModelInfo, name: str) -> bytes | None:
    """A file of a repository, or None if it has none of that name."""
    if not any(file.rfilename == name for file in repo.siblings or []):
        return None
    with tempfile.TemporaryDirectory() as folder:
        return Path(api.hf_hub_download(repo.id, name, revision=repo.sha, local_dir=folder)).read_bytes()


# -------------------------------------------------------------------------------------------------------------- errors


@contextmanager
def _explained(api: HfApi, doing: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into ValueError for what its user has to change, and PushError for the rest.

    Only calls of the Hub stand in such a block: with some versions a connection that breaks raises OSError or
    RuntimeError, so that all of them count as that.

    Args:
        doing: what fails, as a sentence.
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ValueError("there is no access token of the Hub; run hf auth login, or set HF_TOKEN") from error
    except (HfHubHTTPError, OSError, RuntimeError, _transport_error()) as error:
        answer = _find_answer(error)
        status = (
            403 if answer is None and isinstance(error, PermissionError) else answer and answer.response.status_code
        )
        said = _first_line(_root_cause(error) if answer is None else answer)
        if status == 401:
            raise ValueError(
                f"{api.endpoint} does not accept the access token ({said}); run hf auth login, or correct HF_TOKEN, "
                "which goes before it"
            ) from error
        if status == 403:
            raise ValueError(f"{doing}, which {api.endpoint} refused ({said}); use an access token that may") from error
        if status is None:
            raise PushError(f"{api.endpoint} could not be reached when {doing} ({said})") from error
        raise PushError(f"{api.endpoint} answered with the error {status} when {doing} ({said})") from error


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


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    """What it says: of a Hub's answer the server's own words, where it has any."""
    words = getattr(error, "server_message", None) or str(error).strip()
    return words.partition("\n")[0] or type(error).__name__
