"""What a checkpoint holds besides the model: the trainer's state, the optimizer's, random numbers, and checksums.

Its tensors are whole, whatever the number of processes, so that any number of them can go on from it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from ..common.files import files_below

STATE_FILE = "trainer_state.json"
TENSORS_FILE = "trainer_state.safetensors"
CHECKSUMS_FILE = "SHA256SUMS"  # in the format of sha256sum
OPTIMIZER = "optimizer/"  # before the names of the optimizer's tensors
WHOLE_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)


def write_state(folder: Path, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The trainer's part of a checkpoint: its state as JSON, the optimizer's tensors as safetensors."""
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / TENSORS_FILE)


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / TENSORS_FILE)


def random_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state of Python's, NumPy's and torch's random number generators, as JSON and as tensors."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    tensors = {"rng/torch": torch.get_rng_state(), "rng/numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return {"python": [version, list(numbers), gauss], "numpy": [name, *rest]}, tensors


def restore_random_state(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put back what `random_state` returned. In a run of several processes every one gets the state of the first."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, *rest = state["numpy"]
    np.random.set_state((name, tensors["rng/numpy"].numpy().astype(np.uint32), *rest))
    torch.set_rng_state(tensors["rng/torch"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict as whole tensors on the CPU in the main process, tied ones being one tensor, and an empty
    dict in the others. Every process must call it."""
    weights = get_model_state_dict(model, options=WHOLE_ON_CPU)
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name and name in weights:
            weights[name] = weights[first[parameter]]
    return weights


def gather_optimizer(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `optimizer/<parameter>/<entry>`; in which processes, as above."""
    states = get_optimizer_state_dict(model, optimizer, options=WHOLE_ON_CPU).get("state", {})
    return {f"{OPTIMIZER}{name}/{entry}": x for name, state in states.items() for entry, x in state.items()}


def load_optimizer(model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `gather_optimizer` returned, with the rates and decays that the optimizer has now.

    Raises ValueError when it belongs to other parameters.
    """
    states: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key in (key for key in tensors if key.startswith(OPTIMIZER)):
        name, _, entry = key.removeprefix(OPTIMIZER).rpartition("/")
        states[name][entry] = tensors[key]
    trained = {name: None for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in states:
        if name not in trained:
            raise ValueError(f"the optimizer's state has an entry for {name}, which is no parameter that is trained")
    without = [name for name in trained if name not in states]
    if without:
        raise ValueError(f"the optimizer's state lacks {len(without)} parameters that are trained, e.g. {without[0]}")
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    saved = {"state": states, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, saved, options=StateDictOptions(full_state_dict=True))


def write_checksums(folder: Path) -> None:
    """Write down what is in the folder, so that `find_damage` can tell later whether it still is."""
    sums = folder / CHECKSUMS_FILE
    files = [path for path in sorted(files_below(folder)) if path != sums]
    lines = [f"{_checksum(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    sums.write_text("".join(lines), encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None. One of an earlier version has no checksums: it is whole if
    its files are there and can be opened."""
    try:
        names = {path.name for path in folder.iterdir()}
        for alternatives in ((STATE_FILE,), (TENSORS_FILE,), ("config.json", "adapter_config.json")):
            if names.isdisjoint(alternatives):
                return f"{alternatives[0]} is missing"
        tensors = {name for name in names if name.endswith(".safetensors")}
        if tensors == {TENSORS_FILE}:
            return "the model's weights are missing"
        if CHECKSUMS_FILE in names:
            lines = (folder / CHECKSUMS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
            checksums = {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}
            if not tensors | {STATE_FILE} <= checksums.keys():
                return f"{CHECKSUMS_FILE} was cut off or changed"
            for name, checksum in checksums.items():
                if _checksum(folder / name) != checksum:
                    return f"{name} is not as it was saved: it was cut off or changed"
        else:
            for name in tensors:
                try:
                    with safe_open(folder / name, framework="pt"):  # a file that was cut off does not open
                        pass
                except (SafetensorError, OSError) as error:
                    return f"{name} cannot be read ({error})"
        if not {"state", "seconds", "random"} <= read_state(folder).keys():
            return f"{STATE_FILE} holds no state of a run"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"a file cannot be read ({error})"
    except (ValueError, AttributeError) as error:
        return f"{STATE_FILE} cannot be read ({error})"
    return None


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
