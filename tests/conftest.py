"""Where there is no GPU, Triton's kernels run in its interpreter, on CPU tensors; and one thread a process."""

import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

# Tensors are tiny here, and the suite runs in several processes, whose threads would wait for each other. Torch reads
# it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

HERE = Path(__file__).parent

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, so it must be set before the first of ours is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Files of large grids: of each test the fast set has one case in so many, the first among them. Odd numbers, since what
# varies fastest is often one of two backends. Most of the first five run in Triton's interpreter, up to seconds a case.
ONE_CASE_IN = {
    "kernels/test_decode.py": 9, "kernels/test_float32_backends.py": 9, "kernels/test_global_scan.py": 9,
    "kernels/test_native_backend.py": 9, "kernels/test_triton_backend.py": 9,
    "kernels/test_equivalence.py": 7, "kernels/test_numerics.py": 7, "kernels/test_torch_backend.py": 7,
    "kernels/test_muon.py": 3, "modeling_tnt/test_cache.py": 3, "modeling_tnt/test_decode_step.py": 5,
    "modeling_tnt/test_equivalence.py": 5, "modeling_tnt/test_generation.py": 5, "modeling_tnt/test_hub_export.py": 5,
    "modeling_tnt/test_memorize.py": 5, "modeling_tnt/test_modeling.py": 3, "modeling_tnt/test_native_backend.py": 5,
    "modeling_tnt/test_no_waits.py": 3, "modeling_tnt/test_state.py": 3, "modeling_tnt/test_state_files.py": 3,
    "kernels/test_native_step.py": 5,
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what is slow by its kind. Single tests have the marker in their file."""
    cases: Counter[str] = Counter()
    for item in items:
        file, test = item.path.relative_to(HERE).as_posix(), item.nodeid.partition("[")[0]
        if cases[test] % ONE_CASE_IN.get(file, 1):
            item.add_marker("slow")
        cases[test] += 1
        if "in_other_process" in item.fixturenames:  # which imports torch again, and compiles
            item.add_marker("slow")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where kernels cannot run as compiled code, and those marked `native` without compiler."""
    compiled = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    if item.get_closest_marker("gpu") and not compiled:
        pytest.skip("needs a CUDA device, and compiled kernels")
    if item.get_closest_marker("native") and (lacking := _lacks_native_kernels()):
        pytest.skip(lacking)


def _lacks_native_kernels() -> str | None:
    """Why they cannot run here, or None; where they do not compile, they are there, and their tests fail."""
    from modeling_tnt.kernels import backends

    return backends.missing("native", "cpu")


@pytest.fixture(scope="session")
def in_other_process() -> Callable[[Callable, Path], dict]:
    """Call a function of a test module in a process that can compile kernels, as none with TRITON_INTERPRET can.

    The module is a script, too: with the function's name and a file's, it writes what the function returns there, as
    JSON. The process runs, and Triton's cache lies, in the folder that is given.
    """

    def call(function: Callable, folder: Path) -> dict:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        script = str(Path(inspect.getfile(function)).resolve())
        command = [sys.executable, script, function.__name__, "facts.json"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((folder / "facts.json").read_text())

    return call
