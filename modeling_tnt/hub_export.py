"""What makes a saved model complete: its code beside its weights, a model card, and clear words for a broken file.

`save_pretrained` writes the code of the model as flat files, so that transformers loads it where this package is not
installed: `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`. This file is one of them.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .cache_file import write_whole

AUTO_MAP = {
    "AutoConfig": "configuration_tnt.TNTConfig",
    "AutoModel": "modeling_tnt.TNTModel",
    "AutoModelForCausalLM": "modeling_tnt.TNTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_tnt.TNTForSequenceClassification",
}
"""For each Auto class of transformers the module and class in a checkpoint; see `PreTrainedConfig.auto_map`."""

COPY_MARK = "# Copied from modeling-tnt "
"""How the first line of every copied file begins."""

CARD_FILE = "README.md"

# Every file of a model's weights, as patterns.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors")

# In a checkpoint this file has another name.
_IS_COPY = __name__.rpartition(".")[2] != "hub_export"


def code_files() -> dict[str, str]:
    """File name → source of the code that a checkpoint needs to be loaded without this package."""
    if _IS_COPY:
        files = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))}
        return {name: source for name, source in files.items() if source.startswith(COPY_MARK)}
    from .hub_export_flatten import flatten  # package only

    return flatten()


def write_code(folder: str | os.PathLike) -> None:
    """Write `code_files` into a folder, each file under a temporary name first.

    Copied files of another version that this one does not have are removed. Raises OSError, or ValueError for a file of
    the same name that is not a copy of ours.
    """
    folder, files = Path(folder), code_files()
    for path in folder.glob("*.py"):
        is_copy = path.read_text(encoding="utf-8", errors="replace").startswith(COPY_MARK)
        if path.name in files and not is_copy:
            raise ValueError(
                f"{path} would be overwritten by the model's code, but is not a copy of it; move it away, or save the "
                "model in another folder"
            )
        if path.name not in files and is_copy:
            path.unlink()
    for name, source in files.items():
        write_whole(folder / name, lambda temporary, s=source: Path(temporary).write_text(s, encoding="utf-8"))


class HubExportMixin:
    """`save_pretrained`, `from_pretrained` and `push_to_hub` of a model whose checkpoints carry its code."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        *,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> None:
        """Write the model so that it loads anywhere, with this package or without.

        Beside what `PreTrainedModel.save_pretrained` writes, which says more on the arguments and takes `options`: the
        model's code as flat files, an `auto_map` in config.json that points to them, and a model card unless the folder
        has a README.md.

        Args:
            push_to_hub: upload what was written, too, and nothing else that lies in the folder; the arguments behind it
                are those of the method `push_to_hub`.
            repo_id: None: the folder's name.

        Raises:
            ValueError: `save_directory` is a file, or holds other code under the names of ours.
            OSError: the folder cannot be written.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"save_directory={os.fspath(save_directory)!r} is a file; name a folder")
        folder = Path(save_directory)
        adapter_only = getattr(self, "_hf_peft_config_loaded", False)
        before = _written_at(folder)
        if is_main_process and not adapter_only:
            self.config.auto_map = dict(AUTO_MAP)
            folder.mkdir(parents=True, exist_ok=True)
            write_code(folder)
            self._write_card(folder, repo_id if push_to_hub else None)
        super().save_pretrained(save_directory, is_main_process, state_dict, **options)
        if push_to_hub and is_main_process:
            written = [name for name, at in _written_at(folder).items() if before.get(name) != at]
            upload_model(
                HfApi(token=token), folder, repo_id or folder.resolve().name, files={*written, CARD_FILE},
                private=private, create_pr=create_pr, message=commit_message or f"Upload {type(self).__name__}",
            )  # fmt: skip

    def _write_card(self, folder: Path, repo_id: str | None = None, tags: list[str] | None = None) -> None:
        """A card that says what a config tells; a copy of this code has no template.

        Args:
            repo_id: that the model will have on the Hub, whose owner may be left out.
            tags: added to its metadata.
        """
        if _IS_COPY or (folder / CARD_FILE).exists():
            return
        from .hub_cards import CardFacts, write_card  # package only

        parameters = sum(parameter.numel() for parameter in self.parameters())
        whole = repo_id is not None and "/" in repo_id
        facts = CardFacts(
            config=self.config.to_dict(), parameters=parameters, class_name=type(self).__name__,
            name=None if whole else repo_id, repo_id=repo_id if whole else None, tags=tags or [],
        )  # fmt: skip
        write_card(folder, facts)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any):
        """As `PreTrainedModel.from_pretrained`.

        Raises:
            OSError: also if the folder has no config.json, for which transformers would take the defaults, and if a
                file of weights is damaged or missing, saying which one.
        """
        folder = _local_folder(pretrained_model_name_or_path, kwargs.get("subfolder", ""))
        if folder is not None and kwargs.get("config") is None:
            _check_config_is_there(folder)
        shards = [] if folder is None else sorted(read_weight_index(folder))
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(_describe_damage(pretrained_model_name_or_path, folder, error)) from error
        except FileNotFoundError as error:
            missing = [name for name in shards if not (folder / name).is_file()]
            if not missing:
                raise
            raise OSError(
                f"{', '.join(missing)} missing in {folder}, though its model.safetensors.index.json names them; copy "
                "all files of weights, or save the model again"
            ) from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """Save the model as `save_pretrained` does and upload it, as `PreTrainedModel.push_to_hub` does.

        transformers' own replaces the model card by an empty template. Here a card that the repository has stays, and
        otherwise the one of `save_pretrained` is uploaded.

        Args:
            repo_id: "user/name", or "name" for a repository of your own; made if it does not exist.
            private: whether a new repository is private. None: as the owner's settings say.
            token: an access token. None or True: the one of `hf auth login` or of HF_TOKEN.
            revision: the branch to upload to, made if it does not exist. None: main.
            create_pr: open a pull request instead.
            max_shard_size: of a file of weights.
            tags: added to the metadata of a card that is uploaded.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: what the Hub answers if it refuses; the model itself is unharmed.
        """
        with TemporaryDirectory() as name:
            folder = Path(name)
            if not getattr(self, "_hf_peft_config_loaded", False):
                self._write_card(folder, repo_id, tags)  # which save_pretrained would name after this folder
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return upload_model(
                HfApi(token=token), folder, repo_id, files=_written_at(folder), revision=revision, private=private,
                create_pr=create_pr, message=commit_message or f"Upload {type(self).__name__}",
                description=commit_description,
            )  # fmt: skip


def upload_model(
    api: HfApi,
    folder: Path,
    repo_id: str,
    *,
    files: Iterable[str],
    message: str,
    description: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    keep_card: bool | None = None,
) -> CommitInfo:
    """Send files of a model's folder to the Hub, and make the repository and the branch if they do not exist.

    `HfApi.upload_folder` tries again where a connection fails, and sends nothing that has arrived before. Where new
    weights go, those of an earlier model in other files are removed: transformers would prefer an old
    model.safetensors to new shards.

    Args:
        files: their paths from `folder`.
        private: of a new repository. None: as the owner's settings say.
        create_pr: open a pull request instead of a commit to the branch.
        keep_card: whether a model card that is there stays. None: it stays, and without one that of `folder` is sent.

    Raises:
        OSError, RuntimeError: what huggingface_hub raises; HfHubHTTPError if the Hub refuses.
    """
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if keep_card is None:
        keep_card = api.file_exists(repo_id, CARD_FILE, revision=revision)
    sent = [file for file in files if not (keep_card and file == CARD_FILE)]
    has_weights = any(fnmatchcase(file, pattern) for file in sent for pattern in WEIGHTS)
    return api.upload_folder(
        repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr, commit_message=message,
        commit_description=description, allow_patterns=list(map(glob.escape, sent)),
        delete_patterns=list(WEIGHTS) if has_weights else None,
    )  # fmt: skip


def _written_at(folder: Path) -> dict[str, int]:
    """When each file of a folder was last written, in nanoseconds; empty if there is no folder."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*") if path.is_file()}


def _local_folder(name: Any, subfolder: str) -> Path | None:
    """Where a model's files lie, or None for a name on the Hub."""
    return Path(name, subfolder) if name is not None and os.path.isdir(name) else None


def _check_config_is_there(folder: Path) -> None:
    if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise OSError(
            f"{folder} has no config.json and so holds no model; name a folder that save_pretrained wrote, or "
            "pass the config"
        )


def read_weight_index(folder: Path) -> dict[str, set[str]]:
    """File of weights → names of its tensors, as the index of a sharded model says; empty where none is read.

    Raises OSError for a broken index.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return {}
    files: dict[str, set[str]] = {}
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        if not isinstance(content["metadata"], dict):
            raise TypeError("its metadata are no object")
        for tensor, file in content["weight_map"].items():
            files.setdefault(os.fspath(file), set()).add(tensor)
        if not files:
            raise ValueError("it names no tensor")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OSError(
            f"{index} is no index of a model's weights ({error!r}); copy it again, or save the model again"
        ) from error
    return files


def _describe_damage(name: Any, folder: Path | None, error: SafetensorError) -> str:
    """Which file of weights cannot be read, where the model is a local folder."""
    if folder is None:
        return (
            f"the weights of {name} cannot be read ({error}): the download is damaged; load them once with "
            "force_download=True"
        )
    broken = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            broken.append(path.name)
    files = ", ".join(broken) or "a file of weights"
    return (
        f"{files} in {folder} cannot be read ({error}): it was cut off or damaged; save the model again, or "
        "copy the file again from where it came"
    )
