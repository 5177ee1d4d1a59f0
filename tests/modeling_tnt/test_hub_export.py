"""A saved model carries its code, and loads with this package, without it, and beside it."""

import ast
import importlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import zlib
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from model_cases import VARIANTS, make_model, make_tokens
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedModel,
    cache_utils,
    dynamic_module_utils,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_imports, get_relative_imports

from modeling_tnt import TNTConfig, TNTForCausalLM, TNTModel, hub_export_flatten
from modeling_tnt.cache import TNTCacheLayer
from modeling_tnt.hub_export import AUTO_MAP, COPY_MARK, code_files
from modeling_tnt.kernels import native_backend, triton_backend
from modeling_tnt.kernels.backends import INTERFACE
from modeling_tnt.kernels.border import CONTAINERS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STORED = sorted(path.parent for path in HERE.glob("checkpoints/*/config.json"))
# What an environment with torch and transformers does not have, or need not have.
HIDDEN = ("modeling_tnt", "modeling-tnt", "__editable__", "triton", "accelerate", "datasets", "peft", "trl", "lm_eval")


LOADED = ("mlp", "linear-momentum-chunk", "hybrid-sliding", "titans-mag", "titans-mac")


@pytest.fixture
def models_of_bytes(tmp_path: Path) -> list[Path]:
    """Folders with a model of bytes, its tokenizer, and what it computes."""
    return [store_expected(tmp_path / f"bytes-{variant}", variant) for variant in LOADED]


def store_expected(folder: Path, variant: str, **overrides) -> Path:
    model = make_model(variant, torch.float32, vocab_size=384, **overrides)
    tokenizer = ByT5Tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompt = "def main(argv):"
    given = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits = model(**given).logits
    greedy = {"max_new_tokens": 12, "do_sample": False}
    expected = {
        "prompt": prompt, "ids": given.input_ids.tolist(), "logits": logits.tolist(),
        "tokens": model.generate(**given, **greedy).tolist(),
        "text": pipeline("text-generation", model=model, tokenizer=tokenizer)(prompt, **greedy)[0]["generated_text"],
    }  # fmt: skip
    (folder / "expected.json").write_text(json.dumps(expected))
    return folder


def without_package(tmp_path: Path, hidden: tuple[str, ...] = HIDDEN) -> dict[str, str]:
    """Variables for `python -S` in which only some of what is installed can be imported, and the Hub cannot be used."""
    site = tmp_path / "site"
    site.mkdir()
    for installed in Path(transformers.__file__).parents[1].iterdir():
        if not installed.name.startswith(hidden):
            (site / installed.name).symlink_to(installed)
    for other in {Path(torch.__file__).parents[1]} - {Path(transformers.__file__).parents[1]}:
        (site / "torch").exists() or (site / "torch").symlink_to(other / "torch")
    return {
        **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def run(env: dict[str, str], *arguments: object) -> str:
    command = [sys.executable, "-S", *map(str, arguments)]
    elsewhere = Path(env["PYTHONPATH"]).parent  # python -c finds packages where it is started, too
    done = subprocess.run(
        command, env=env, cwd=elsewhere, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_code_is_flat_and_whole():
    files = code_files()
    from_package = []
    assert {"configuration_tnt.py", "modeling_tnt.py"} < set(files)
    assert all(name.startswith(("configuration_tnt", "modeling_tnt", "tnt_")) for name in files)
    for name, source in files.items():
        assert source.startswith(COPY_MARK), name
        made = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert len(made) == len(set(made)), f"{name}: modules are joined whose names meet"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and "." not in (node.module or ""), f"{name}: {ast.unparse(node)}"
                modules = [node.module] if node.module else [alias.name for alias in node.names]
                assert all(f"{module}.py" in files for module in modules), f"{name}: {ast.unparse(node)}"
            elif isinstance(node, ast.Import | ast.ImportFrom) and "modeling_tnt" in ast.unparse(node):
                from_package.append(ast.unparse(node))
    assert from_package == [
        "from modeling_tnt.configuration.presets import load_preset",
        "from modeling_tnt.kernels import triton_backend", "from modeling_tnt.kernels import native_backend",
    ]  # fmt: skip


SOURCES = {
    "configuration.configuration_tnt": "from .validation import SIZE\n\nsize = SIZE\n",
    "configuration.validation": "SIZE = 3\n",
    "kernels.inner.a": "from __future__ import annotations\n\nimport math\n\ndef one() -> Never: return math.pi\n",
    "kernels.inner.b": "from . import a\nfrom .a import one as uno\n\ndef two():\n    from .a import one\n"
    "    return a.one, uno, one\n",
    "kernels.inner.c": "from .b import two\nfrom .a import one\n\nmath = [one, *two()]\n",
    "modeling": "from .kernels.inner.c import math\nfrom .configuration.configuration_tnt import size\n",
}  # fmt: skip


def test_modules_of_a_folder_are_joined_unless_their_names_meet(tmp_path, monkeypatch):
    sources = {f"modeling_tnt.{name}": source for name, source in SOURCES.items()}
    monkeypatch.setattr(hub_export_flatten, "_source", lambda module: sources.get(module, ""))
    monkeypatch.setattr(hub_export_flatten, "_is_package", lambda module: module == "modeling_tnt.kernels.inner")
    monkeypatch.setattr(hub_export_flatten, "_find", lambda module: sources.get(module))
    monkeypatch.setattr(hub_export_flatten, "_MODELS_BESIDE", {})
    files = hub_export_flatten.flatten.__wrapped__()
    assert list(files) == [
        "configuration_tnt.py", "modeling_tnt.py", "tnt_kernels_inner.py", "tnt_kernels_inner_c.py"
    ]  # fmt: skip
    for name, source in files.items():
        (tmp_path / name).write_text(source)
    monkeypatch.syspath_prepend(tmp_path.parent)
    modeling = importlib.import_module(f"{tmp_path.name}.modeling_tnt")
    assert modeling.size == 3 and [f() for f in modeling.math] == [math.pi] * 4


def test_the_code_has_no_triton_in_it():
    for name, source in code_files().items():
        assert not re.search(r"^\s*(import triton|from triton)\b", source, re.MULTILINE), name


def test_transformers_finds_all_of_it_and_demands_no_triton(tmp_path):
    files = code_files()
    for name, source in files.items():
        (tmp_path / name).write_text(source)
    found, waiting = set(), ["configuration_tnt", "modeling_tnt"]
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting += [m for m in get_relative_imports(tmp_path / f"{name}.py") if m not in found]
        needed = set(get_imports(tmp_path / f"{name}.py")) - sys.stdlib_module_names
        assert needed <= {"torch", "transformers", "safetensors", "huggingface_hub", "packaging", "tqdm", "numpy"}, name
    assert found == {name.removesuffix(".py") for name in files}


@pytest.mark.slow
def test_it_loads_without_the_package_and_without_triton(tmp_path, models_of_bytes):
    said = run(without_package(tmp_path), HERE / "load_without_package.py", *models_of_bytes)
    assert said.endswith("loaded without the package and without triton\n")


COPY_ON_KERNELS = """
import sys, torch
from transformers import AutoModelForCausalLM
sys.stderr = sys.stdout
ids = torch.tensor([[5, 7, 9, 11, 13]])
folder, backend = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, kernel_backend=backend).eval()
assert "modeling_tnt" not in sys.modules and type(model).__module__.startswith("transformers_modules.")
try:
    model(ids)
    with torch.no_grad():
        print(model(ids).logits.flatten().tolist())
except ValueError as error:
    print(error)
assert type(model.config).from_preset("tiny").vocab_size == 384
print([name for name in sys.modules if name.endswith(("fused.local_scan", "native.reader")) and "tnt" in name])
"""


def run_on_kernels(tmp_path: Path, folder: Path, backend: str) -> list[str]:
    """What a copy says and computes with this backend where the package is installed, but not imported."""
    env = without_package(tmp_path, tuple(name for name in HIDDEN if name != "triton")) | {"TRITON_INTERPRET": "1"}
    installed = tmp_path / "site/modeling_tnt"
    installed.mkdir()
    for path in (*ROOT.glob("modeling_tnt/*.py"), ROOT / "kernels", ROOT / "configuration"):
        (installed / path.name).symlink_to(path)
    return run(env, "-c", COPY_ON_KERNELS, folder, backend).splitlines()


KERNELS = {  # name, title, the module that runs it
    "triton": ("Triton's kernels", "modeling_tnt.kernels.fused.local_scan"),
    "native": ("the native kernels", "modeling_tnt.kernels.native.reader"),
}
on_kernels = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            "triton",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter"),
        ),
        pytest.param("native", marks=pytest.mark.native),
    ],
)


@pytest.mark.slow
@on_kernels
def test_a_copy_runs_the_kernels_of_the_installed_package(backend, tmp_path):
    """And says once where they come from."""
    model = make_model("mlp", torch.float32)
    model.save_pretrained(tmp_path / "model")
    *said, logits, modules = run_on_kernels(tmp_path, tmp_path / "model", backend)
    title, module = KERNELS[backend]
    assert sum(f"{title} are those of the installed package modeling-tnt" in line for line in said) == 1
    assert modules == f"['{module}']"
    model.config.kernel_backend = "torch"
    with torch.no_grad():
        expected = model(torch.tensor([[5, 7, 9, 11, 13]])).logits.flatten()
    # Other sums in another order, in float32.
    torch.testing.assert_close(torch.tensor(json.loads(logits)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERNELS)
def test_a_copy_leaves_the_kernels_of_another_version_alone(backend, tmp_path):
    make_model("mlp", torch.float32).save_pretrained(tmp_path / "model")
    backends = tmp_path / "model/tnt_kernels_backends.py"
    source = backends.read_text()
    backends.write_text(source.replace(f"INTERFACE = {INTERFACE}", "INTERFACE = 0"))
    assert backends.read_text() != source
    *_, refusal, modules = run_on_kernels(tmp_path, tmp_path / "model", backend)
    assert f"backend='{backend}' cannot run" in refusal
    assert "of another version" in refusal and "import modeling_tnt before the model is loaded" in refusal
    assert modules == "[]"


@pytest.fixture
def load_copy(tmp_path, monkeypatch) -> Callable[..., PreTrainedModel]:
    """Loads what a model saves by the code that it carries, each time as classes of their own."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which transformers adds the folder below
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    for mapping in (cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING):
        monkeypatch.setitem(mapping, TNTCacheLayer._layer_type, TNTCacheLayer)  # and back to it after the test
    loaded: list[type] = []

    def load(model: TNTForCausalLM, **options) -> PreTrainedModel:
        folder = tmp_path / f"copy{len(loaded)}"
        model.save_pretrained(folder)
        loaded.append(get_class_from_dynamic_module(AUTO_MAP["AutoModelForCausalLM"], folder))
        assert loaded[-1] not in (TNTForCausalLM, *loaded[:-1])
        return loaded[-1].from_pretrained(folder, **options).eval()

    return load


@pytest.mark.slow
@on_kernels
@pytest.mark.parametrize("variant", ["linear", "mlp-momentum-forget"])
def test_a_copy_on_the_kernels_trains_and_decodes(load_copy, backend, variant):
    """Its containers cross the border, in one graph as well as outside of it, and in the step of decoding."""
    torch._dynamo.reset()
    tokens = make_tokens(2, 12)
    ours = make_model(variant, torch.float32, num_hidden_layers=1, kernel_backend="torch")
    copy = load_copy(ours, dtype=torch.float32, kernel_backend=backend)

    def step(model, call) -> list[torch.Tensor]:
        model.zero_grad()
        loss = call(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    want = step(ours, ours)
    for call in (copy, torch.compile(copy, fullgraph=True, backend="aot_eager")):
        for got, expected in zip(step(copy, call), want, strict=True):  # float32: other sums in another order
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        want = ours(tokens).logits[:, 3:]
        cache = copy(tokens[:, :3], use_cache=True).cache
        logits = [copy(tokens[:, 3:4], cache=cache).logits]
        # The native step is called outside of graphs.
        compiled = torch.compile(copy, fullgraph=backend == "triton", backend="aot_eager")
        logits += [compiled(tokens[:, t : t + 1], cache=cache).logits for t in (4, 5)]
        logits.append(copy(tokens[:, 6:8], cache=cache).logits)  # from states of a stack
        cache = ours(tokens[:, 8:9], cache=cache).cache  # from those of the other
        logits += [ours(tokens[:, 9:10], cache=cache).logits, copy(tokens[:, 10:], cache=cache).logits]
    got = torch.cat(logits, 1)
    torch.testing.assert_close(got, torch.cat([want[:, :5], want[:, 6:]], 1), rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def test_containers_of_a_copy_become_the_package_s_own(monkeypatch):
    """With those inside of them, before anything of the kernels sees them."""
    copies = {
        name: namedtuple(name, ours._fields, defaults=[None] * len(ours._fields)) for name, ours in CONTAINERS.items()
    }
    w = torch.zeros(1, 16, 16)
    weights = copies["FastWeights"](w)
    state = copies["MemoryState"](weights, weights)
    params, gates = copies["MemoryParams"](w, norm_weight=w), copies["MemoryGates"](w)
    problem = copies["MemoryProblem"](q=w, gates=gates, params=params, initial_state=state)
    seen, crossed = [], []
    monkeypatch.setattr("modeling_tnt.kernels.native.reader.read", lambda *call: seen.append(call[0]))
    native_backend.read(problem, False)
    monkeypatch.setattr("modeling_tnt.kernels.native.step.launch_step", lambda *call: crossed.extend(call[3:6]))
    native_backend.step(w, w, w, gates, [copies["MemoryOptions"](4)], [params], [None], None, None)
    crossed = [crossed[0], *crossed[1], *crossed[2]]
    if importlib.util.find_spec("triton"):
        monkeypatch.setattr("modeling_tnt.kernels.fused.reader.read", lambda *call: seen.append(call[0]))
        triton_backend.read(problem, False)
        monkeypatch.setattr("modeling_tnt.kernels.fused.decode.launch_step", lambda *call: crossed.extend(call[3]))
        triton_backend.step(w, w, w, [copies["StepMemory"](problem.params, w)], None, None)
        crossed.append(crossed[-1].params)
    for problem in seen:
        crossed += (problem, problem.gates, problem.params, problem.initial_state, problem.initial_state.weights)
        assert problem.params.norm_weight is w and problem.initial_state.weights.w1 is w and problem.k is None
    for got in crossed:
        assert type(got) is CONTAINERS[type(got).__name__]


def test_the_number_of_the_interface_stands_for_what_crosses_it():
    """A copy of an earlier version calls these functions with these fields, if it has the same number."""
    containers = {name: cls._fields for name, cls in CONTAINERS.items()}
    text = repr(sorted(containers.items()))
    for border in (triton_backend, native_backend):
        for name, f in vars(border).items():
            if inspect.isfunction(f) and f.__module__ == border.__name__ and name[0] != "_":
                text += f"{name}{inspect.signature(f)}"
    assert (INTERFACE, zlib.crc32(text.encode())) == (1, 2364996827), (
        "raise INTERFACE after a release, and put the new sum here"
    )


def test_the_package_needs_no_remote_code(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["auto_map"] == AUTO_MAP
    for trust in (None, False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=trust)
        assert type(model) is TNTForCausalLM
        assert type(AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=trust)) is TNTConfig
    assert type(AutoModel.from_pretrained(tmp_path / "model")) is TNTModel
    assert type(AutoModelForCausalLM.from_config(model.config)) is TNTForCausalLM


def test_copies_and_the_package_work_in_one_process(load_copy):
    """Operators of torch have one name in a process, and transformers one class for a cache layer: a copy must not take
    away those of another."""
    ours = make_model()
    tokens = make_tokens(2, 13)

    def gradient(model: PreTrainedModel) -> torch.Tensor:
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return model.model.layers[0].memory.local_memories[0].w1.grad.clone()

    expected = gradient(ours)
    continued = ours.generate(tokens, max_new_tokens=9, do_sample=False)
    copies = [load_copy(ours, dtype=torch.float64) for _ in range(2)]
    for model in (ours, *copies, ours):
        torch.testing.assert_close(gradient(model), expected)
        assert torch.equal(model.generate(tokens, max_new_tokens=9, do_sample=False), continued)
        with torch.no_grad():
            cache = model(tokens[:, :5], use_cache=True).cache
            for other in copies:
                cache = other(tokens[:, 5:6], cache=cache).cache


def test_the_namespaces_of_the_operators_differ():
    from modeling_tnt.kernels.operators import NAMESPACE

    assert NAMESPACE == "modeling_tnt_kernels"
    assert "__name__" in code_files()["tnt_kernels_operators.py"]


def test_other_code_is_not_overwritten(tmp_path):
    own = tmp_path / "modeling_tnt.py"
    own.write_text("# mine\n")
    with pytest.raises(ValueError, match=re.escape(f"{own} would be overwritten by the model's code")):
        make_model().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["modeling_tnt.py"]
    assert own.read_text() == "# mine\n"


def test_files_that_a_later_version_no_longer_has_are_removed(tmp_path):
    (tmp_path / "tnt_gone.py").write_text(f"{COPY_MARK}0.0.1\n")
    (tmp_path / "notes.py").write_text("# mine\n")
    make_model().save_pretrained(tmp_path)
    assert not (tmp_path / "tnt_gone.py").exists()
    assert (tmp_path / "notes.py").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; name a folder"):
        make_model().save_pretrained(tmp_path / "file")


def test_an_adapter_carries_no_code(tmp_path):
    from peft import LoraConfig

    model = make_model(dtype=torch.float32)
    try:
        model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    except ValueError as error:  # transformers 5.24 wants PEFT 0.22, which was not out on 2026-11-25
        pytest.skip(str(error))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not list(tmp_path.glob("*.py"))


def test_a_readme_is_kept(tmp_path):
    model = make_model()
    (tmp_path / "README.md").write_text("mine\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine\n"
    model.save_pretrained(tmp_path / "other")
    assert "trust_remote_code=True" in (tmp_path / "other/README.md").read_text()


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: folder.name)
def test_a_checkpoint_of_an_earlier_version_loads(folder):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        logits = model.eval()(expected["input_ids"]).logits
    # Another order of sums, on another machine, in float32.
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-5)


def test_every_kind_of_memory_is_stored():
    assert {folder.name.partition("-")[2] for folder in STORED} == {
        "tnt-mlp", "titans-mlp", "tnt-linear-two-locals", "ttt-linear",
    }  # fmt: skip


@pytest.mark.parametrize("keep", [0, 100, 4000], ids=["empty", "in the header", "in the weights"])
def test_weights_that_were_cut_off(tmp_path, keep):
    make_model(dtype=torch.float32).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(OSError, match=r"model\.safetensors in .* cannot be read .* save the model again"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_subfolder_is_checked_as_a_folder_is(tmp_path):
    make_model(dtype=torch.float32).save_pretrained(tmp_path / "part")
    TNTForCausalLM.from_pretrained(tmp_path, subfolder="part")
    weights = tmp_path / "part/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(OSError, match=r"model\.safetensors in .*part cannot be read"):
        TNTForCausalLM.from_pretrained(tmp_path, subfolder="part")


def test_a_folder_without_config(tmp_path):
    make_model(dtype=torch.float32).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    for load in (TNTForCausalLM, AutoModelForCausalLM):
        with pytest.raises((OSError, ValueError), match=r"config\.json"):
            load.from_pretrained(tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_model_is_the_same_after_a_round_trip(tmp_path, variant):
    model = make_model(variant, torch.float32)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = make_tokens(1, 9)
    with torch.no_grad():
        # Equal but for the order of sums, which depends on where weights lie in memory.
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_the_tokenizer_of_a_checkpoint(models_of_bytes):
    assert isinstance(AutoTokenizer.from_pretrained(models_of_bytes[0]), ByT5Tokenizer)
