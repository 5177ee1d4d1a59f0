"""Files of a `TNTState`: what they hold and say, and how damaged ones and those of others are refused."""

import json
import os

import pytest
import torch
from model_cases import CONSTANT_SIZE, assert_same_states, make_model, make_tokens, state_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modeling_tnt import TNTConfig, TNTState, load_cache, save_cache

EQUAL = {"rtol": 0, "atol": 0}
GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.mark.parametrize("reset", [None, "reset_local", "reset_global"])
@pytest.mark.parametrize("variant", CONSTANT_SIZE)
@torch.no_grad()
def test_a_saved_state_is_read_on_from(variant, reset, tmp_path):
    model, prompt = make_model(variant), make_tokens(2, 3, seed=2)
    state = model.memorize([make_tokens(13).tolist(), make_tokens(6).tolist()], progress=False)
    if reset:
        getattr(state, reset)()
        if not state.is_initialized:
            with pytest.raises(ValueError, match="has read nothing that could be saved"):
                state.save_pretrained(tmp_path)
            return
    state.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["memory.json", "memory.safetensors"]
    loaded = model.load_memory(tmp_path / "new" / "folder")
    assert_same_states(loaded, state, **EQUAL)
    assert loaded.origin == state.origin and repr(loaded) == repr(state)
    expected = model.generate(prompt, cache=state, **GREEDY)
    assert torch.equal(model.generate(prompt, cache=loaded, **GREEDY), expected)


def test_the_description_says_what_was_read(read, tmp_path):
    model, state = read
    model.config._name_or_path = str(tmp_path)  # a folder: its path is nobody else's business
    state = model.memorize([1], progress=False)
    state.save_pretrained(tmp_path)
    text = (tmp_path / "memory.json").read_text()
    described = json.loads(text)
    assert described["tokens_read"] == [1] and described["memories"] == ["global", "local0"]
    assert described["model"] == tmp_path.name and str(tmp_path) not in text
    assert described["made_for"]["local_chunk_sizes"] == [4]


@pytest.mark.parametrize(
    ("variant", "window", "segment", "says"),
    [("titans-mag", 4, 0, "local0, a window of 4, "), ("hybrid-windows", 3, 0, "local0, a window of 3, "),
     ("titans-mac", 0, 8, "local0, a segment of 8, ")],
)  # fmt: skip
def test_the_description_says_what_attention_holds(variant, window, segment, says, tmp_path):
    state = make_model(variant).memorize(make_tokens(1, 13), progress=False)
    state.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "memory.json").read_text())
    assert (described["window"], described["segment"]) == (window, segment) and says in repr(state)
    held = [t for layer in state.layers for t in attention_tensors(layer)]
    assert described["bytes"] == state.nbytes == sum(t.nbytes for t in [*state_tensors(state).values(), *held])
    assert {t.device.type for layer in state.to("meta").layers for t in attention_tensors(layer)} == {"meta"}


def attention_tensors(layer) -> list[torch.Tensor]:
    """Keys and values of a window or a segment."""
    if layer.is_initialized and hasattr(layer, "keys") and layer.keys is not None:
        return [layer.keys, layer.values]
    held = [] if layer.window is None else [layer.window.keys, layer.window.values]
    return held + ([] if layer.segment is None else [layer.segment])


@pytest.mark.parametrize(("variant", "name", "value"), [
    ("hybrid-windows", "num_key_value_heads", 2), ("titans-mag", "sliding_window", 7),
    ("titans-mag", "memory_as", "layer"), ("titans-mac", "num_key_value_heads", 1),
])  # fmt: skip
@torch.no_grad()
def test_a_state_of_another_attention_is_refused(variant, name, value):
    """By what it says of itself, before shapes are found to differ."""
    state = make_model(variant).memorize(make_tokens(1, 13), progress=False)
    with pytest.raises(ValueError, match=f"filled by a model with {name}=.* \\(now {value!r}\\)"):
        make_model(variant, **{name: value})(make_tokens(1, 2), cache=state)


def test_files_of_both_kinds_are_one_format_and_old_ones_load(read, tmp_path):
    model, state = read
    state.save_pretrained(tmp_path)
    path = tmp_path / "memory.safetensors"
    assert_same_states(load_cache(path, model.config), state, **EQUAL)
    save_cache(state, tmp_path / "again.safetensors")
    with safe_open(path, "pt") as file, safe_open(tmp_path / "again.safetensors", "pt") as again:
        assert again.metadata() == file.metadata()
        metadata = {name: file.metadata()[name] for name in ("format", "signature", "cumulative_length")}
    assert metadata["format"] == "tnt-cache-1"
    save_file(load_file(path), path, metadata=metadata)  # all that the first version of the package wrote
    assert_same_states(model.load_memory(tmp_path), state, **EQUAL)


def rewrite(path, change_tensors=lambda tensors: None, **change_metadata) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | change_metadata
    tensors = load_file(path)
    change_tensors(tensors)
    save_file(tensors, path, metadata={name: value for name, value in metadata.items() if value is not None})


def spoil_truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def spoil_empty(path):
    path.write_bytes(b"")


def spoil_text(path):
    path.write_text("not a safetensors file, by far")


def spoil_one_byte(path):
    data = bytearray(path.read_bytes())
    data[-50] ^= 255
    path.write_bytes(data)


def spoil_missing_tensor(path):
    rewrite(path, lambda tensors: tensors.pop("layers.0.local0.weights.w1"))


def spoil_shape(path):
    rewrite(path, lambda tensors: tensors.update({"layers.1.global.position": torch.zeros(2)}), checksum=None)


def spoil_name(path):
    rewrite(path, lambda tensors: tensors.update({"layers.0.local7.position": torch.zeros(1)}), checksum=None)


def spoil_layer(path):
    rewrite(path, lambda tensors: tensors.update({"layers.5.local0.position": torch.zeros(1)}), checksum=None)


def spoil_header(path):
    rewrite(path, signature=None)


def spoil_json(path):
    rewrite(path, signature="{")


def spoil_origin(path):
    rewrite(path, origin="[]")


def spoil_fingerprint(path):
    rewrite(path, origin='{"model": "mine", "fingerprint": ["a"]}')


DAMAGES = [
    spoil_truncate, spoil_empty, spoil_text, spoil_one_byte, spoil_missing_tensor, spoil_shape, spoil_name, spoil_layer,
    spoil_header, spoil_json, spoil_origin, spoil_fingerprint,
]  # fmt: skip


@pytest.mark.parametrize("spoil", DAMAGES, ids=lambda f: f.__name__.removeprefix("spoil_"))
def test_a_damaged_file_is_named(spoil, read, tmp_path):
    model, state = read
    state.save_pretrained(tmp_path)
    spoil(tmp_path / "memory.safetensors")
    with pytest.raises(ValueError, match=r"memory\.safetensors is damaged.*read the document again"):
        model.load_memory(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        load_cache(tmp_path / "memory.safetensors", model.config)


def spoil_window_shape(tensors):
    tensors["layers.0.window.keys"] = tensors["layers.0.window.keys"][..., :8].contiguous()


def spoil_window_length(tensors):
    for name in ("keys", "values"):
        tensors[f"layers.1.window.{name}"] = tensors[f"layers.1.window.{name}"][:, :, 1:].contiguous()


def spoil_window_too_long(tensors):
    for name in [name for name in tensors if "window" in name]:
        tensors[name] = torch.cat([tensors[name]] * 2, dim=2)


def spoil_window_values(tensors):
    del tensors["layers.1.window.values"]


def spoil_window_of_one_layer(tensors):
    del tensors["layers.1.window.values"], tensors["layers.1.window.keys"]


def spoil_all_windows(tensors):
    for name in [name for name in tensors if "window" in name]:
        del tensors[name]


def spoil_window_rows(tensors):
    for name in ("keys", "values"):
        tensors[f"layers.0.window.{name}"] = tensors[f"layers.0.window.{name}"].repeat(2, 1, 1, 1)


def spoil_with_segment(tensors):
    tensors["layers.0.segment"] = torch.zeros(1, 4, 2, 8, 16)


@pytest.mark.parametrize("spoil", [
    spoil_window_shape, spoil_window_length, spoil_window_too_long, spoil_window_values, spoil_window_of_one_layer,
    spoil_all_windows, spoil_window_rows, spoil_with_segment, "attended", "forgotten", "tokens_before",
], ids=lambda spoil: getattr(spoil, "__name__", spoil))  # fmt: skip
def test_damaged_windows_are_named(spoil, tmp_path):
    model = make_model("titans-mag")
    model.memorize(make_tokens(1, 13), progress=False).save_pretrained(tmp_path)
    wrong = (
        [({}, spoil)] if callable(spoil) else [({spoil: text}, lambda _: None) for text in ("-1", "[1, 2]", '["a"]')]
    )
    whole = (tmp_path / "memory.safetensors").read_bytes()
    for metadata, change in wrong:
        (tmp_path / "memory.safetensors").write_bytes(whole)
        rewrite(tmp_path / "memory.safetensors", change, checksum=None, **metadata)
        with pytest.raises(ValueError, match=r"memory\.safetensors is damaged.*read the document again"):
            model.load_memory(tmp_path)


def test_files_of_others_are_refused(read, tmp_path):
    model, state = read
    state.save_pretrained(tmp_path)
    path = tmp_path / "memory.safetensors"
    with pytest.raises(
        ValueError, match=r"memory\.safetensors was filled by a model with local_chunk_sizes=\[4\] \(now"
    ):
        TNTState.from_pretrained(tmp_path, TNTConfig(**{**model.config.to_dict(), "local_chunk_sizes": [2]}))
    with pytest.raises(ValueError, match=r"num_hidden_layers=2 \(now 3\)"):
        make_model("mlp-momentum-forget", num_hidden_layers=3).load_memory(tmp_path)
    rewrite(path, format="tnt-cache-9")
    with pytest.raises(ValueError, match="'tnt-cache-9', which this version does not know; upgrade"):
        model.load_memory(tmp_path)
    model.save_pretrained(tmp_path / "model")
    os.rename(tmp_path / "model" / "model.safetensors", path)
    with pytest.raises(ValueError, match="is no TNT cache: its format is 'pt'"):
        model.load_memory(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing holds no memory.safetensors"):
        model.load_memory(tmp_path / "missing")
    with pytest.raises(OSError):
        state.save_pretrained(path)


def test_a_state_says_by_which_update_it_was_learned(tmp_path):
    gradient, muon = make_model(), make_model(global_update="muon")
    for model, other in ((gradient, muon), (muon, gradient)):
        folder = tmp_path / model.config.global_update
        model.memorize(make_tokens(1, 11), progress=False).save_pretrained(folder)
        model.load_memory(folder)
        with pytest.raises(ValueError, match=f"filled by a model with global_update='{model.config.global_update}'"):
            other.load_memory(folder)


@pytest.mark.parametrize("variant", ["mlp", "linear"])
def test_a_state_of_a_version_without_a_choice_loads(variant, tmp_path):
    """Before there were memory_depth and global_update, of which it says nothing."""
    model = make_model(variant)
    model.memorize(make_tokens(1, 11), progress=False).save_pretrained(tmp_path)
    path = tmp_path / "memory.safetensors"
    with safe_open(path, "pt") as file:
        signature = json.loads(file.metadata()["signature"])
    del signature["global_update"], signature["memory_depth"]
    rewrite(path, signature=json.dumps(signature))
    model.load_memory(tmp_path)
    with pytest.raises(ValueError, match=r"global_update='gradient' \(now 'muon'\); use"):
        make_model(variant, global_update="muon").load_memory(tmp_path)


def test_other_weights_give_a_warning_and_a_config_asks_none(read, tmp_path, recwarn):
    model, state = read
    state.save_pretrained(tmp_path)
    model.load_memory(tmp_path)
    other = make_model("mlp-momentum-forget")
    torch.manual_seed(1)
    torch.nn.init.normal_(other.model.layers[0].memory.local_memories[0].w1)
    TNTState.from_pretrained(tmp_path, other.config)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"memory\.safetensors was filled by weights of an unnamed model"):
        other.load_memory(tmp_path)


@pytest.mark.parametrize("failing", ["memory.safetensors", "memory.json"])
def test_an_interrupted_save_leaves_files_that_load(failing, read, tmp_path, monkeypatch):
    model, state = read
    state.save_pretrained(tmp_path)
    before = (tmp_path / failing).read_bytes()
    longer = model.memorize(make_tokens(1, 3), state=state.clone(), progress=False)
    replace = os.replace

    def fail(source, target):
        if str(target).endswith(failing):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        longer.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["memory.json", "memory.safetensors"]
    assert (tmp_path / failing).read_bytes() == before
    expected = state if failing == "memory.safetensors" else longer
    assert_same_states(model.load_memory(tmp_path), expected, **EQUAL)
