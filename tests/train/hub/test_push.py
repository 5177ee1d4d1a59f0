"""`tnt push` and the trainer's --push-to-hub, against a Hub on loopback with the unmodified client."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, Blob, HubServer
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.utils import close_session
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from modeling_tnt import TNTConfig, TNTForCausalLM, TNTForSequenceClassification, TNTModel
from modeling_tnt.hub_cards import CardFacts, is_own_card, write_card
from modeling_tnt.hub_export import code_files, upload_model
from modeling_tnt.train.cli import main

HERE = Path(__file__).parent
IDS = torch.arange(3, 27)[None]
SMALL = {
    "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16,
    "intermediate_size": 32, "global_chunk_size": 8, "local_chunk_sizes": [4], "local_shard_lengths": 8,
}  # fmt: skip


def make_model(seed: int = 0) -> TNTForCausalLM:
    torch.manual_seed(seed)
    return TNTForCausalLM(TNTConfig(**SMALL)).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model of three shards with its tokenizer and card; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_model().save_pretrained(folder, max_shard_size="60KB")
    ByT5Tokenizer().save_pretrained(folder)
    assert len(shards(folder)) == 3
    return folder


@pytest.fixture
def model(saved, tmp_path) -> Path:
    """The same, in a folder of the test's own."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, which this process takes for the real one, with a token that may write. Files travel by Git LFS."""
    with HubServer() as server:
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server
    close_session()


def environment(hub: HubServer, home: Path, **more: str) -> dict[str, str]:
    """Variables for a process that takes `hub` for the real one."""
    return {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": WRITE_TOKEN, "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_XET": "1", **more,
    }  # fmt: skip


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model*.safetensors"))


def push(folder: Path, *flags: str, repo: str = "user/name") -> int:
    return main(["push", str(folder), repo, *flags])


# --------------------------------------------------------------------------------------------------------- what arrives


def test_everything_that_loads_a_model_arrives(hub, model, capsys):
    for name in ("trainer_state.json", "trainer_state.safetensors", "optimizer.pt", "notes.txt", ".env"):
        (model / name).write_text("secret")
    (model / "checkpoint-2").mkdir()
    (model / "checkpoint-2" / "model.safetensors").write_text("secret")
    assert push(model, "--message", "First", "--include", "notes.*") == 0
    repo = hub.repos["user/name"]
    files = repo.files()
    sent = {path.name for path in model.iterdir() if path.is_file()} - {
        "trainer_state.json", "trainer_state.safetensors", "optimizer.pt", ".env",
    }  # fmt: skip
    assert set(files) == sent | {".gitattributes"}
    assert {"config.json", "tokenizer_config.json", "README.md", "modeling_tnt.py", *shards(model)} < set(files)
    assert all(content == (model / name).read_bytes() for name, content in files.items() if name in sent)
    assert repo.titles() == ["initial commit", "First"] and not repo.private
    assert b'from_pretrained("user/name")' in files["README.md"] and b"./model" not in files["README.md"]
    out = capsys.readouterr().out
    assert f"commit   {hub.url}/user/name/commit/{repo.branches['main']}\n" in out
    left_out = ".env, checkpoint-2/model.safetensors, optimizer.pt, trainer_state.json, trainer_state.safetensors"
    assert f"not sent {left_out}\n" in out
    assert "in the middle of a run" in out


def test_a_second_push_is_a_new_commit_without_what_is_old(hub, model, tmp_path, capsys):
    assert push(model) == 0
    assert push(model) == 0
    assert "(nothing had changed)" in capsys.readouterr().out
    assert len(hub.repos["user/name"].commits) == 2 and len(hub.uploads) == 3
    make_model(1).save_pretrained(tmp_path / "whole")
    assert push(tmp_path / "whole", repo="name") == 0
    files = hub.repos["user/name"].files()
    assert [name for name in files if name.startswith("model") and "safetensors" in name] == ["model.safetensors"]
    assert "tokenizer_config.json" in files
    assert push(model) == 0  # transformers would prefer the single file to the shards
    assert "model.safetensors" not in hub.repos["user/name"].files()


@pytest.mark.parametrize("kind", [TNTModel, TNTForSequenceClassification])
def test_the_card_of_another_kind_of_model_gets_its_name_too(hub, tmp_path, kind):
    kind(TNTConfig(**SMALL)).save_pretrained(tmp_path / "model")
    assert push(tmp_path / "model") == 0
    assert b'from_pretrained("user/name")' in hub.repos["user/name"].files()["README.md"]


def test_weights_stay_where_none_are_sent(hub, model):
    assert push(model) == 0
    upload_model(HfApi(), model, "user/name", files=["README.md", "config.json"], message="Config")
    assert set(shards(model)) < set(hub.repos["user/name"].files())


def test_a_branch_is_made_and_main_stays(hub, model):
    assert push(model, "--revision", "v2", "--private") == 0
    repo = hub.repos["user/name"]
    assert repo.private and set(repo.files("main")) == {".gitattributes"} and "config.json" in repo.files("v2")
    assert push(model, "--revision", "v2", "--private") == 0
    assert len(repo.commits) == 2


def test_a_card_that_was_edited_there_stays(hub, model, capsys):
    assert push(model) == 0
    repo = hub.repos["user/name"]
    write_card(model, CardFacts(config=TNTConfig.from_pretrained(model).to_dict(), parameters=1, name="Again"))
    assert is_own_card(model / "README.md") and push(model) == 0
    assert b"Again" in repo.files()["README.md"]
    edited = repo.files()["README.md"] + b"\nMy own words\n"
    repo.add("main", "edit", repo.find("main").files | {"README.md": Blob.regular(edited)})
    make_model(1).save_pretrained(model, max_shard_size="60KB")
    assert push(model) == 0
    assert repo.files()["README.md"] == edited and len(repo.commits) == 5
    assert "README.md was written or edited by somebody else, and stays" in capsys.readouterr().out


def test_dry_run_lists_all_and_sends_nothing(hub, model, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    (model / "tokenizer_config.json").unlink()
    assert push(model, "--dry-run", "--revision", "v2") == 0
    out = capsys.readouterr().out
    assert f"push     {model} to user/name, branch v2: " in out and "nothing was sent" in out
    assert all(f" {name}\n" in out for name in ("config.json", "modeling_tnt.py", *shards(model)))
    assert "warning  there is no tokenizer" in out
    assert not hub.requests


def test_what_only_happens_to_lie_there_is_not_sent(hub, model, tmp_path, capsys):
    """Scripts, notes and pictures of the user's, and what a linked folder holds; the code is known by its imports."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for path in ("train_secret.py", "tnt_of_mine.py", "tokenizer_of_mine.json", "face.png", "modelling.safetensors"):
        (model / path).write_text("import os")
    (model / ".git").mkdir()
    (model / "adapter").symlink_to(outside)
    (outside / "adapter_config.json").write_text("{}")
    assert push(model, "--dry-run") == 0
    out = capsys.readouterr().out
    left_out = "not sent .git/, adapter/, face.png, modelling.safetensors, tnt_of_mine.py, tokenizer_of_mine.json, "
    assert f"{left_out}train_secret.py\n" in out and "--include PATTERN" in out
    assert push(model, "--include", "train_*.py") == 0
    files = hub.repos["user/name"].files()
    assert "train_secret.py" in files and "tnt_of_mine.py" not in files
    assert set(code_files()) < set(files) and not any(name.startswith("adapter") for name in files)


# ----------------------------------------------------------------------------------------------------- broken transfers


def test_the_same_command_goes_on_after_an_upload_failed(hub, model, capsys):
    hub.break_upload(2, "refuse")
    assert push(model) == 1
    error = capsys.readouterr().err
    assert f"tnt push: error: {hub.url} answered with the error 400" in error
    assert f"{model} is kept; the same command goes on, without what has arrived" in error
    assert len(hub.repos["user/name"].commits) == 1
    arrived = len(hub.uploads)
    assert arrived == 2
    assert push(model) == 0
    assert len(hub.uploads) == len(set(hub.uploads)) == 3
    assert "config.json" in hub.repos["user/name"].files()


def test_the_same_command_goes_on_after_the_connection_broke(hub, model, capsys):
    hub.break_upload(1, "cut")  # which the client tries again by itself
    hub.break_commit()
    assert push(model) == 1
    assert f"{hub.url} could not be reached when {model} was pushed to user/name" in capsys.readouterr().err
    assert len(hub.uploads) == 3 and len(hub.repos["user/name"].commits) == 1
    assert push(model) == 0
    assert len(hub.uploads) == 3 and len(hub.repos["user/name"].commits) == 2


@pytest.mark.slow
def test_the_same_command_goes_on_after_it_was_killed(hub, saved, tmp_path):
    hub.break_upload(3, "stall")
    command = [sys.executable, "-m", "modeling_tnt.train.cli", "push", str(saved), "user/name"]
    process = subprocess.Popen(
        command, env=environment(hub, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert hub.upload_began.wait(60)
    while len(hub.uploads) < 2:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert push(saved) == 0
    assert len(hub.uploads) == len(set(hub.uploads)) == 3


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (None, "user/name", "no access token of the Hub; run hf auth login, or set HF_TOKEN"),
        ("hf_wrong", "user/name", "does not accept the access token"),
        (READ_TOKEN, "user/name", "the access token of user may only read from"),
        (OTHER_TOKEN, "user/name", "user/name does not exist, or other may not see it, and cannot make it; use a name"),
        (WRITE_TOKEN, "user/na me", "'user/na me' is no name of a repository"),
        (WRITE_TOKEN, "a/b/c", "'a/b/c' is no name of a repository"),
    ],
)
def test_what_the_hub_would_refuse(hub, saved, monkeypatch, capsys, token, repo, message):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    assert push(saved, repo=repo) == 2
    assert message in capsys.readouterr().err
    assert not hub.repos


def test_a_repository_of_somebody_else(hub, saved, monkeypatch, capsys):
    assert push(saved) == 0
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    assert push(saved) == 2
    error = capsys.readouterr().err
    assert "which " + hub.url + " refused (You don't have the rights to write to user/name); use an access" in error
    assert push(saved, repo="mine") == 0 and "other/mine" in hub.repos


def test_no_network(hub, saved, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(saved) == 1
    error = capsys.readouterr().err
    assert "http://127.0.0.1:9 could not be reached" in error and f"{saved} is kept; the same command" in error


def test_what_a_repository_holds_is_not_replaced_by_accident(hub, model, tmp_path, capsys):
    assert push(model) == 0
    assert push(model, "--private") == 2
    assert "user/name exists and is public, so that --private cannot hold" in capsys.readouterr().err
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    assert push(tmp_path / "llama") == 2
    assert "user/name holds a model of type tnt, and" in (error := capsys.readouterr().err) and "--overwrite" in error
    assert push(tmp_path / "llama", "--revision", "new-branch") == 2  # which would begin at main
    repo = hub.repos["user/name"]
    assert len(repo.commits) == 2 and set(repo.branches) == {"main"}
    assert push(tmp_path / "llama", "--overwrite") == 0
    assert json.loads(repo.files()["config.json"])["model_type"] == "llama"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def _lose_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["more.weight"] = "model-00002-of-00003.safetensors"
    path.write_text(json.dumps(index))


def _spoil(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    tensors[first].view(-1)[-1] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def _link(folder: Path, target: str) -> None:
    (folder.parent / "id_rsa").write_text("secret")
    (folder / ".hidden").write_text("secret")
    (folder / "vocab.txt").symlink_to(target)


def _write_index(folder: Path, places: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _nest(folder: Path) -> None:
    names = [path.name for path in folder.iterdir()]
    (folder / "best").mkdir()
    for name in names:
        (folder / name).rename(folder / "best" / name)


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json must hold an object, got list"),
    "no type": (lambda f: _edit_config(f, model_type=None), "config.json names no model_type"),
    "wrong config": (lambda f: _edit_config(f, num_heads=0), "num_heads must be an int of at least 1, got 0"),
    "no auto_map": (lambda f: _edit_config(f, auto_map=None), "config.json has no auto_map"),
    "no code": (lambda f: (f / "tnt_kernels_types.py").unlink(), "tnt_kernels_types.py is missing"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*.s*")], "neither model.safetensors nor model.safet"),
    "cut shard": (lambda f: _cut(f / "model-00002-of-00003.safetensors"), "model-00002-of-00003.safetensors cannot"),
    "lost shard": (lambda f: (f / "model-00001-of-00003.safetensors").unlink(), "model-00001-of-00003.safetensors is"),
    "lost tensor": (_lose_a_tensor, "lacks 1 tensors that the index names, e.g. more.weight"),
    "other places": (lambda f: _write_index(f, {"a": ["b"]}), "model.safetensors.index.json is no index"),
    "empty index": (lambda f: _write_index(f, {}), "it names no tensor"),
    "no places": (lambda f: _write_index(f, []), "model.safetensors.index.json is no index"),
    "outside": (lambda f: _write_index(f, {"a": "../../x.safetensors"}), "names the file '../../x.safetensors'"),
    "NaN": (_spoil, "model-00002-of-00003.safetensors holds numbers that are not finite in 1 tensors, e.g. "),
    "link": (lambda f: _link(f, "../id_rsa"), "vocab.txt is a link out of the folder"),
    "hidden link": (lambda f: _link(f, ".hidden"), "vocab.txt is a link out of the folder, or to something hidden"),
    "wrong card": (lambda f: (f / "README.md").write_text("---\nlicense: mine\n---\n"), "README.md: license"),
    "no card data": (lambda f: (f / "README.md").write_text("# Mine\n"), "README.md: the card must begin"),
    "a run": (_nest, "holds several models and is none itself; push one of"),
    "no folder": (shutil.rmtree, "is no folder"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_before_anything_is_sent(hub, model, capsys, case):
    break_it, message = BROKEN[case]
    break_it(model)
    assert push(model) == 2
    assert message in (error := capsys.readouterr().err), error
    assert not hub.requests


def test_all_that_is_wrong_is_said_at_once(hub, model, capsys):
    _cut(model / "model-00001-of-00003.safetensors")
    _cut(model / "model-00003-of-00003.safetensors")
    (model / "README.md").write_text("# Mine\n")
    assert push(model, "--include", "*.none") == 2
    error = capsys.readouterr().err
    assert "cannot be pushed, and nothing was sent" in error
    assert all(word in error for word in ("model-00001", "model-00003", "README.md", "--include *.none"))


# ---------------------------------------------------------------------------------------------------------- the trainer


@pytest.fixture
def run_flags(flags, fresh_accelerator) -> list[str]:
    """Stage 1 of 6 steps with a checkpoint every 3, stage 2 of 1 step."""
    return [*flags, "--output.checkpoint-every", "3", "--push-to-hub", "user/run"]


def folder_of(flags: list[str]) -> Path:
    return Path(flags[flags.index("--output.dir") + 1])


@pytest.mark.slow
def test_a_run_pushes_its_last_model_at_the_end(hub, run_flags, capsys):
    assert main([*run_flags, "--output.push-private", "--output.push-revision", "v1"]) == 0
    repo, folder = hub.repos["user/run"], folder_of(run_flags)
    assert repo.private and repo.titles() == ["initial commit", "stage2, 7 steps in all"]
    files = repo.files("v1")
    sent = {p.name: p.read_bytes() for p in (folder / "stage2").iterdir() if not p.name.startswith(".")}
    assert files == sent | {".gitattributes": files[".gitattributes"]}
    assert {"loss.png", "tokenizer_config.json", "model.safetensors"} < set(files)
    assert b"user/run" in files["README.md"] and b"user/run" not in (folder / "best" / "README.md").read_bytes()
    assert f"commit   {hub.url}/user/run/commit/" in capsys.readouterr().out


@pytest.mark.slow
def test_a_push_on_the_way_that_fails_stops_nothing(hub, run_flags, capsys):
    hub.break_commit()
    assert main([*run_flags, "--output.push-every", "save", "--overwrite"]) == 0
    repo = hub.repos["user/run"]
    # The first of the checkpoints at steps 3 and 6 of stage 1 and 1 of stage 2 failed.
    assert repo.titles()[1:] == ["stage1, step 6", "stage2, step 1", "stage2, 7 steps in all"]
    assert all("trainer_state.json" not in commit.files for commit in repo.commits)
    assert "model.safetensors" in repo.commits[1].files
    assert hub.requests.count("GET /api/whoami-v2") == 2  # of which the Hub allows few: before the run, and once in it
    out = capsys.readouterr().out
    assert "stage1-00000003 was not pushed: " in out and "training goes on, and pushes again later" in out


@pytest.mark.slow
def test_a_push_at_the_end_that_fails_can_be_finished(hub, run_flags, capsys):
    hub.break_commit()
    assert main(run_flags) == 1
    folder = folder_of(run_flags)
    error = capsys.readouterr().err
    command = f"tnt push {folder / 'stage2'} user/run"
    assert f"is kept in {folder / 'stage2'}, but was not pushed: {hub.url} could not be reached" in error
    assert error.rstrip().endswith(command) and (folder / "metrics.json").is_file()
    assert main(["push", *command.split()[2:]]) == 0
    assert hub.repos["user/run"].files()["loss.png"] == (folder / "stage2" / "loss.png").read_bytes()
    hub.repos.clear()
    assert main([*run_flags, "--resume"]) == 0  # so does the same run again
    assert "model.safetensors" in hub.repos["user/run"].files()


@pytest.mark.parametrize(
    ("token", "more", "message"),
    [
        (None, [], "--push-to-hub user/run: there is no access token of the Hub; run hf auth login, or set HF_TOKEN"),
        ("hf_wrong", [], "--push-to-hub user/run: http://127.0.0.1"),
        (READ_TOKEN, [], "the access token of user may only read"),
        (WRITE_TOKEN, ["--push-to-hub", "a/b/c"], "--push-to-hub a/b/c: 'a/b/c' is no name of a repository"),
        (WRITE_TOKEN, ["--push-to-hub", "theirs/run"], "theirs/run does not exist, or user may not see it"),
        (WRITE_TOKEN, ["--output.push-every", "step"], "--output.push-every must be one of end, save, got 'step'"),
        (WRITE_TOKEN, ["--push-to-hub", "none", "--output.push-private"], "--output.push-private needs a repository"),
    ],
)
def test_a_run_that_could_not_push_does_not_begin(hub, run_flags, monkeypatch, capsys, token, more, message):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    assert main([*run_flags, *more]) == 2
    assert message in capsys.readouterr().err
    assert not folder_of(run_flags).exists() and not hub.repos


@pytest.mark.slow
def test_a_dry_run_of_a_run_needs_no_token(hub, run_flags, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert main([*run_flags, "--output.push-dry-run"]) == 0
    out = capsys.readouterr().out
    assert "stage2 to user/run: " in out and "  model.safetensors\n" in out and "nothing was sent" in out
    assert not hub.requests


# ------------------------------------------------------------------------------------------------------ and back again


@pytest.fixture(scope="module")
def used_hub(saved, tmp_path_factory):
    """The Hub after all that hub_user.py does there, by the way that the client takes by default."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "store").mkdir()
    with HubServer(xet=folder / "store") as hub:
        command = [sys.executable, str(HERE / "hub_user.py"), str(saved), str(folder)]
        env = environment(hub, folder / "home", HF_HUB_DISABLE_XET="0")
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("all loaded\n") and not hub.uploads
        hub.printed = done.stdout
        yield hub


@pytest.mark.slow
def test_models_that_were_pushed_in_every_way_load_with_equal_logits(used_hub):
    """Which hub_user.py asserts; here is what it left."""
    repos = used_hub.repos
    assert sum(name.startswith("model-") for name in repos["user/command"].files("v2")) == 3
    assert set(repos["user/command"].files("main")) == {".gitattributes"}
    assert [name for name in repos["user/method"].files() if name.endswith(".safetensors")] == ["model.safetensors"]
    assert "tokenizer_config.json" in repos["user/method"].files()
    assert repos["user/trainer"].titles()[1:] == ["Training in progress, step 1", "End of training"]


@pytest.mark.parametrize(("name", "commit"), [("method", 2), ("saved", 1)])
def test_push_to_hub_brings_a_card_of_the_model_with_its_name(used_hub, name, commit):
    card = used_hub.repos[f"user/{name}"].commits[commit].files["README.md"].content.decode()
    assert f"# {name}\n" in card and f'from_pretrained("user/{name}"' in card and "TNT language model" in card


def test_the_card_with_tags_is_still_ours(used_hub, tmp_path):
    """So that tnt push writes it again, and does not take it for an edited one."""
    (tmp_path / "README.md").write_bytes(used_hub.repos["user/method"].files()["README.md"])
    assert is_own_card(tmp_path / "README.md")
    assert ModelCard.load(tmp_path / "README.md").data.tags == ["tnt", "test-time-training", "custom_code", "mine"]


def test_push_to_hub_keeps_the_card_that_is_there(used_hub):
    repo = used_hub.repos["user/saved"]
    assert repo.files()["README.md"].endswith(b"My own words\n") and "notes.txt" not in repo.files()
    assert repo.titles()[-1] == "Upload TNTForCausalLM" and "model.safetensors" not in repo.files()


def test_the_example_shares_a_model_and_loads_it_back(used_hub):
    assert len((HERE.parents[2] / "train" / "examples" / "share_model.py").read_text().splitlines()) < 65
    repo = used_hub.repos["user/shared"]
    assert repo.titles() == ["initial commit", "Upload tnt model"]
    card = repo.files()["README.md"].decode()
    assert "license: apache-2.0" in card and 'from_pretrained("user/shared"' in card
    dry, real = used_hub.printed.split(" to user/shared: ")[1:]
    assert "  config.json\n" in dry and "  config.json\n" not in real
    assert f"commit   {used_hub.url}/user/shared/commit/" in real and "and computes the same" in real


@pytest.mark.slow
def test_what_was_pushed_loads_by_its_own_code(hub, saved, tmp_path):
    """In a process that cannot import the package, from a branch of a private repository; and is pushed from there."""
    assert push(saved, "--private", "--revision", "v2") == 0
    with torch.no_grad():
        expected = TNTForCausalLM.from_pretrained(saved).eval()(IDS).logits
    torch.save(expected, tmp_path / "expected.pt")
    code = LOAD_BY_ITS_OWN_CODE.format(expected=str(tmp_path / "expected.pt"))
    env = environment(hub, tmp_path / "home")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("transformers_modules.user.name.")
    again = hub.repos["user/again"]
    assert set(again.files()) == {".gitattributes", "config.json", "generation_config.json", "model.safetensors"} | set(
        code_files()
    )
    assert again.titles() == ["initial commit", "Upload TNTForCausalLM"]


LOAD_BY_ITS_OWN_CODE = """
import sys
sys.modules["modeling_tnt"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
options = {{"trust_remote_code": True, "revision": "v2"}}
model = AutoModelForCausalLM.from_pretrained("user/name", **options).eval()
ids = AutoTokenizer.from_pretrained("user/name", **options)(["memory"], return_tensors="pt").input_ids
with torch.no_grad():
    logits = model(torch.arange(3, 27)[None]).logits
    model(ids)
torch.testing.assert_close(logits, torch.load({expected!r}), rtol=1e-4, atol=1e-5)
model.push_to_hub("user/again")
print(type(model).__module__)
"""
