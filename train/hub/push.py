"""Pushing a model's folder to the Hub: what is checked before, and words for what can go wrong there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import CONFIG_NAME

from modeling_tnt.hub_cards import CARD_FILE, is_own_card, load_facts, name_card
from modeling_tnt.hub_export import upload_model

from ..common.model_facts import bare_facts, read_config
from .push_files import check_folder, show_folder


class PushError(OSError):
    """The Hub could not be reached, or did not take what was sent. The local folder is whole."""


@dataclass(frozen=True)
class Target:
    """Where a model goes.

    repo: "user/name", or "name" for a repository of the token's owner.
    private: a new repository is private, and an existing one must be.
    revision: the branch, made from main if it does not exist. None: main.
    overwrite: a repository with another type of model may be replaced.

    Raises ValueError for what is no name of a repository.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise ValueError(
                f"{self.repo!r} is no name of a repository ({error}); use e.g. your-name/your-model"
            ) from error


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
        # A new branch begins at main.
        found = _find_repo(api, repo, target.revision) or _find_repo(api, repo, None)
        config = None if found is None or target.overwrite else _download(api, found, CONFIG_NAME)
    if found is not None and target.private and not found.private:
        raise ValueError(
            f"{repo} exists and is public, so that --private cannot hold; push to another name, or make it private "
            "on the Hub first"
        )
    held = model_type if config is None else _read_type(config)
    if held != model_type:
        raise ValueError(
            f"{repo} holds a model of type {held}, and this one is of type {model_type}; push to another name, or use "
            "tnt push --overwrite to replace it by a new commit"
        )
    if ((me.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise ValueError(
            f"the access token of {me['name']} may only read from {api.endpoint}; use one that may write to {repo}"
        )
    if found is None and repo.split("/")[0] not in owners:
        raise ValueError(
            f"{repo} does not exist, or {me['name']} may not see it, and cannot make it; use a name that begins with "
            f"{' or '.join(f'{owner}/' for owner in owners)}"
        )
    return repo, found


def push_model(
    api: HfApi,
    path: Path,
    target: Target,
    *,
    include: list[str] | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> None:
    """Check a model's folder, print what goes where, and send it unless `dry_run`.

    Large files that have arrived are not sent again when the same call is repeated. A model card that somebody wrote or
    edited there stays, and one of ours is replaced. In the folder a card of ours gets the name on the Hub.

    Args:
        include: patterns of further files to send, as for `check_folder`.
        message: title of the commit.

    Raises:
        ValueError: as `check_folder` and `check_target`, and for a token that may not write there.
        PushError: the Hub could not be reached, or the connection broke.
        OSError: for files that cannot be read.
    """
    folder = check_folder(path, include)
    show_folder(folder, target.repo, target.revision, every_file=dry_run)
    if dry_run:
        print("dry run  nothing was sent", flush=True)
        return
    repo, before = check_target(api, target, folder.model_type)
    doing = f"{path} was pushed to {repo}"
    with _explained(api, doing):
        card = None if before is None else _download(api, before, CARD_FILE)
    keep_card = card is not None and not is_own_card(card)
    _name_card(path, repo)
    with _explained(api, doing):
        done = upload_model(
            api, path, repo, files=folder.files, message=message or f"Upload {folder.model_type} model",
            revision=target.revision, private=target.private or None, keep_card=keep_card,
        )  # fmt: skip
    if keep_card:
        print("card     the repository's README.md was written or edited by somebody else, and stays")
    is_new = before is None or done.oid != before.sha
    print(f"commit   {done.commit_url}{'' if is_new else ' (nothing had changed)'}", flush=True)


def _find_repo(api: HfApi, repo: str, revision: str | None) -> ModelInfo | None:
    try:
        return api.model_info(repo, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _download(api: HfApi, repo: ModelInfo, name: str) -> Path | None:
    """A file of a repository, or None if it has none of that name."""
    if not any(file.rfilename == name for file in repo.siblings or []):
        return None
    return Path(api.hf_hub_download(repo.id, name, revision=repo.sha))


def _read_type(config: Path) -> str:
    try:
        return json.loads(config.read_bytes())["model_type"]
    except (ValueError, KeyError, TypeError):
        return "unknown"


def _name_card(folder: Path, repo: str) -> None:
    """Let a card of ours load the model by the name that it gets, before it is sent."""
    config = read_config(folder)
    if config is None:
        return
    # Without saved facts it is the card of save_pretrained, which knows of no tokenizer.
    facts = load_facts(folder, config) or replace(bare_facts(folder, config), tokenizer=None)
    if facts.repo_id != repo:
        name_card(folder, facts, repo)


@contextmanager
def _explained(api: HfApi, doing: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into ValueError for what its user has to change, and PushError for the rest.

    Only calls of the Hub stand in such a block: a connection that breaks raises OSError or RuntimeError with some
    versions, so that all of them count as that.

    Args:
        doing: what fails, as a sentence.
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ValueError("there is no access token of the Hub; run hf auth login, or set HF_TOKEN") from error
    except (HTTPError, OSError, RuntimeError) as error:
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        answer = next((cause for cause in causes if getattr(cause, "response", None) is not None), None)
        status = answer.response.status_code if answer else 403 if isinstance(error, PermissionError) else None
        words = getattr(answer, "server_message", None) or str(answer or causes[-1]).strip()
        said = words.partition("\n")[0] or type(causes[-1]).__name__
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
