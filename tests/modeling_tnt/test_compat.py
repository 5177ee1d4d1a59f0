"""One cache under two names, whatever the release of transformers, and every name of others that may move."""

import importlib
import logging
import pickle

import pytest
import torch
from model_cases import make_model, make_tokens
from transformers import DynamicCache

from modeling_tnt import TNTForSequenceClassification
from modeling_tnt.compat import LEANS_ON, cache_of, named_cache

GREEDY = {"do_sample": False, "max_new_tokens": 5}
NAMES = ("cache", "past_key_values")


@pytest.mark.parametrize("name", LEANS_ON)
def test_what_the_package_leans_on_is_there(name):
    module, _, attributes = name.partition(":")
    pytest.importorskip(module.partition(".")[0])
    found = importlib.import_module(module)
    for attribute in attributes.split("."):
        assert hasattr(found, attribute), f"{name} has moved"
        found = getattr(found, attribute)


@pytest.fixture(params=["model", "causal", "classifier"])
def reader(request):
    causal = make_model()
    if request.param == "classifier":
        torch.manual_seed(0)
        return TNTForSequenceClassification(causal.config).double().eval()
    return causal if request.param == "causal" else causal.model


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_forwards_take_and_outputs_give_both_names(reader, name):
    whole, mask = make_tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    expected = reader(whole, attention_mask=mask)[0]
    first = reader(whole[:, :7], attention_mask=mask[:, :7], use_cache=True)
    cache = first.cache
    assert cache is first.past_key_values is first["past_key_values"] is first["cache"] is cache_of(first)
    assert any(cache is value for value in first.to_tuple())
    out = reader(whole[:, 7:], attention_mask=mask, **{name: cache})
    assert cache_of(out) is cache and cache.get_seq_length() == 12
    got = out[0] if out[0].dim() == 2 else out[0][:, -1]
    torch.testing.assert_close(got, expected if expected.dim() == 2 else expected[:, -1], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_outputs_are_pickled_and_unpacked(reader):
    out = reader(make_tokens(2, 7), attention_mask=torch.ones(2, 7, dtype=torch.long), use_cache=True)
    copied = pickle.loads(pickle.dumps(out))
    assert type(copied) is type(out) and copied.cache.get_seq_length() == 7
    assert isinstance(reader(make_tokens(1, 3), return_dict=False), tuple)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_generate_takes_and_gives_both_names(options):
    model, prompt = make_model(), make_tokens(2, 6)
    expected = model.generate(prompt, **GREEDY, **options)
    for name in NAMES:
        given = {name: DynamicCache(config=model.config)}
        out = model.generate(prompt, return_dict_in_generate=True, **given, **GREEDY, **options)
        assert torch.equal(out.sequences, expected)
        assert out.cache is out.past_key_values and out.cache.get_seq_length() == 10


def test_two_names_at_once_are_refused(reader):
    tokens, cache = make_tokens(1, 4), DynamicCache(config=reader.config)
    with pytest.raises(ValueError, match="cache and past_key_values are two names of one argument"):
        reader(tokens, cache=cache, past_key_values=cache)
    if hasattr(reader, "generate"):
        with pytest.raises(ValueError, match="cache and past_key_values are two names of one argument"):
            reader.generate(tokens, cache=cache, past_key_values=cache, **GREEDY)


def test_nothing_of_ours_is_deprecated(caplog, recwarn):
    """Neither by a warning nor in transformers' log, which says each once a process: its memory of that is cleared."""
    from transformers.utils import logging as transformers_logging

    getattr(transformers_logging.warning_once, "cache_clear", lambda: None)()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        model = make_model()
        state = model.memorize(make_tokens(1, 9), progress=False)
        model.generate(make_tokens(2, 3), **named_cache(state), **GREEDY)
        model.generate(make_tokens(2, 3), num_beams=2, return_dict_in_generate=True, **GREEDY)
        model.train()(make_tokens(2, 5), labels=make_tokens(2, 5)).loss.backward()
    finally:
        logger.removeHandler(caplog.handler)
    said = [record.getMessage() for record in caplog.records] + [str(w.message) for w in recwarn]
    assert not [text for text in said if "deprecated" in text]
