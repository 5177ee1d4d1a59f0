"""Makes the helper module of this folder importable and uninitialised memory visible."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory():
    """`torch.empty` returns NaN (PyTorch does so in deterministic mode), so that an output never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors of these tests are tiny: on a busy machine threads that wait for each other make them 50 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def read():
    """A model and its state after 13 tokens of one row: mid-chunk everywhere."""
    from model_cases import make_model, make_tokens

    model = make_model("mlp-momentum-forget")
    return model, model.memorize(make_tokens(1, 13), progress=False)
