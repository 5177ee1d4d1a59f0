"""`TNTForSequenceClassification`: what it pools, its losses, its checkpoints, Trainer and pipeline."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from model_cases import SMALL, VARIANTS, make_model, make_tokens
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    ByT5Tokenizer,
    DataCollatorWithPadding,
    DynamicCache,
    Trainer,
    TrainingArguments,
    pipeline,
)

from modeling_tnt import TNTConfig, TNTForCausalLM, TNTForSequenceClassification

LENGTHS = (9, 4, 1)


def make_classifier(variant: str = "mlp", dtype: torch.dtype = torch.float64, **overrides):
    torch.manual_seed(0)
    config = TNTConfig(**SMALL | VARIANTS[variant] | {"num_labels": 3} | overrides)
    return TNTForSequenceClassification(config).to(dtype).eval()


def make_batch(side: str, pad: int = 0) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Rows [1, length], the padded batch of them, and its mask."""
    rows = [make_tokens(1, n, seed=n) for n in LENGTHS]
    padded, masks = [], []
    for row in rows:
        fill = torch.full((1, max(LENGTHS) - row.shape[1]), pad)
        parts = [(fill, torch.zeros_like(fill)), (row, torch.ones_like(row))]
        ids, mask = zip(*(parts if side == "left" else parts[::-1]), strict=True)
        padded.append(torch.cat(ids, dim=1))
        masks.append(torch.cat(mask, dim=1))
    return rows, torch.cat(padded), torch.cat(masks)


@torch.no_grad()
def score_alone(model, rows) -> torch.Tensor:
    """The head on the last hidden state of each row, read without padding."""
    return torch.cat([model.score(model.model(row).last_hidden_state[:, -1]) for row in rows])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", ["mlp", "linear-plain-two-locals"])
@torch.no_grad()
def test_the_last_real_token_of_each_row_is_scored(variant, side):
    model = make_classifier(variant, pad_token_id=0)
    rows, ids, mask = make_batch(side)
    expected = score_alone(model, rows)
    assert torch.unique(expected, dim=0).shape == (3, 3)
    # Equal but for the order of sums in float64.
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)
    torch.testing.assert_close(model(ids).logits, expected)  # by config.pad_token_id
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, expected)
    torch.testing.assert_close(model(ids[1:2]).logits, expected[1:2])  # a batch of one, padded


@torch.no_grad()
def test_a_pad_token_inside_of_a_text_is_text():
    model = make_classifier(pad_token_id=7)
    text = torch.tensor([[3, 7, 7, 5, 7]])
    torch.testing.assert_close(model(text).logits, score_alone(model, [text[:, :4]]))
    everything = model(text, attention_mask=torch.ones_like(text)).logits  # the mask knows better
    torch.testing.assert_close(everything, score_alone(model, [text]))


@torch.no_grad()
def test_without_a_pad_token_a_batch_needs_a_mask():
    model = make_classifier()
    rows, ids, mask = make_batch("left")
    with pytest.raises(ValueError, match=r"3 rows needs an attention_mask .* config.pad_token_id is None"):
        model(ids)
    with pytest.raises(ValueError, match="inputs_embeds do not show it"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, score_alone(model, rows))
    torch.testing.assert_close(model(rows[0]).logits, score_alone(model, rows[:1]))


@torch.no_grad()
def test_a_row_without_tokens_and_a_call_without_any():
    model = make_classifier()
    ids = make_tokens(2, 5)
    logits = model(ids, attention_mask=torch.tensor([[1] * 5, [0] * 5])).logits
    assert torch.equal(logits[1], torch.zeros(3)) and logits[0].abs().min() > 0
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@torch.no_grad()
def test_a_text_may_be_read_in_pieces():
    model = make_classifier()
    rows, ids, mask = make_batch("left")
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], attention_mask=mask[:, :6], cache=cache)
    for piece in (mask, mask[:, 6:]):  # of all columns so far, or of this call's
        logits = model(ids[:, 6:], attention_mask=piece, cache=copy.deepcopy(cache)).logits
        torch.testing.assert_close(logits, score_alone(model, rows))


@pytest.mark.parametrize(
    "problem, labels, num_labels, loss",
    [
        ("single_label_classification", torch.tensor([2, 0, -100]), 3, F.cross_entropy),
        ("single_label_classification", torch.tensor([[2], [0], [1]], dtype=torch.uint8), 3,
         lambda x, y: F.cross_entropy(x, y.squeeze(1).long())),
        ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]]), 3,
         F.binary_cross_entropy_with_logits),
        ("multi_label_classification", torch.tensor([[True, False, True]] * 3), 3,
         lambda x, y: F.binary_cross_entropy_with_logits(x, y.double())),
        ("regression", torch.tensor([0.5, -1, 3]), 1, lambda x, y: F.mse_loss(x.squeeze(1), y.double())),
        ("regression", torch.tensor([2, -1, 3]), 1, lambda x, y: F.mse_loss(x.squeeze(1), y.double())),
        ("regression", torch.tensor([[0.5, -1, 3], [1, 2, 3], [0, 0, 0]]), 3, lambda x, y: F.mse_loss(x, y.double())),
    ],
)  # fmt: skip
def test_losses(problem, labels, num_labels, loss):
    _, ids, mask = make_batch("right")
    named = make_classifier(num_labels=num_labels, problem_type=problem)
    out = named(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(out.loss, loss(out.logits, labels).double())
    out.loss.backward()
    assert named.score.weight.grad.abs().max() > 0
    if problem != "regression" or num_labels == 1:
        guessed = make_classifier(num_labels=num_labels)
        assert torch.equal(guessed(ids, attention_mask=mask, labels=labels).loss, out.loss)
        assert guessed.config.problem_type == problem


@pytest.mark.parametrize(
    "labels, options, message",
    [
        (torch.tensor([0, 1]), {}, r"integers of shape \(3,\) or \(3, 1\), got torch.int64 of shape \(2,\)"),
        (torch.tensor([0, 1, 3]), {}, r"from 0 to num_labels - 1 = 2, or -100, got \[0, 1, 3\]"),
        (torch.tensor([0, 1, -1]), {}, "load the model with num_labels"),
        (torch.zeros(3, 2), {}, r"numbers of shape \(3, 3\), got torch.float32 of shape \(3, 2\)"),
        (torch.zeros(3), {"problem_type": "single_label_classification"}, "must be integers"),
        (torch.zeros(3, 3), {"num_labels": 1}, r"'regression' .* shape \(3, 1\) or \(3,\)"),
    ],
)
def test_labels_that_do_not_fit(labels, options, message):
    _, ids, mask = make_batch("right")
    with pytest.raises(ValueError, match=message):
        make_classifier(**options)(ids, attention_mask=mask, labels=labels)


def test_other_mistakes():
    # With huggingface_hub 1, whose errors are no ValueErrors, the config has refused it before.
    with pytest.raises(Exception, match="problem_type.* one of"):
        make_classifier(problem_type="classification")
    with pytest.raises(TypeError, match="atention_mask"):
        make_classifier()(make_tokens(1, 3), atention_mask=None)


def test_the_weights_of_a_language_model(tmp_path):
    language_model = make_model(dtype=torch.float32)
    language_model.save_pretrained(tmp_path / "lm")
    classifier, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "lm", id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}, output_loading_info=True
    )
    assert type(classifier) is TNTForSequenceClassification
    assert set(report["missing_keys"]) == {"score.weight"} and set(report["unexpected_keys"]) == {"lm_head.weight"}
    for name, weight in language_model.model.state_dict().items():
        assert torch.equal(classifier.model.state_dict()[name], weight), name
    assert classifier.score.weight.shape == (2, 32) and 0.1 < classifier.score.weight.std() < 0.3

    classifier(make_tokens(1, 4), labels=torch.tensor([1]))
    classifier.save_pretrained(tmp_path / "classifier")
    config = json.loads((tmp_path / "classifier/config.json").read_text())
    assert config["architectures"] == ["TNTForSequenceClassification"]
    assert config["problem_type"] == "single_label_classification" and config["id2label"]["1"] == "good"
    assert "pipeline_tag: text-classification" in (tmp_path / "classifier/README.md").read_text()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), classifier.parameters(), strict=True))
    back = TNTForCausalLM.from_pretrained(tmp_path / "classifier")
    assert torch.equal(back.model.embed_tokens.weight, language_model.model.embed_tokens.weight)


TEXTS = ["good day", "a good one", "so good", "all good here", "bad day", "a bad one", "so bad", "all bad here"]
LABELS = [1] * 4 + [0] * 4


def accuracy(prediction) -> dict[str, float]:
    """Logits alone: a cache among the outputs would arrive here as a tuple."""
    assert isinstance(prediction.predictions, np.ndarray), type(prediction.predictions)
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_trainer_learns_a_toy_set_and_a_pipeline_uses_it(tmp_path):
    tokenizer = ByT5Tokenizer()
    model = make_classifier(
        dtype=torch.float32, vocab_size=384, num_labels=2, num_hidden_layers=1, pad_token_id=0, initializer_range=0.02,
        id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}, memory_base_lr=0.1, global_memory_base_lr=0.1,
    )  # fmt: skip
    dataset = Dataset.from_dict({"text": TEXTS, "label": LABELS})
    dataset = dataset.map(lambda batch: tokenizer(batch["text"]), batched=True, remove_columns="text")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            tmp_path / "run", num_train_epochs=20, per_device_train_batch_size=4, per_device_eval_batch_size=3,
            learning_rate=1e-2, report_to="none", save_strategy="no", logging_strategy="no", use_cpu=True,
        ),
        train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer, compute_metrics=accuracy,
        data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] == 1 and after["eval_loss"] < 0.2 < before["eval_loss"]
    trainer.save_model(tmp_path / "model")

    classify = pipeline("text-classification", model=str(tmp_path / "model"), device="cpu")
    one_by_one = classify(TEXTS)
    assert [answer["label"] for answer in one_by_one] == ["good"] * 4 + ["bad"] * 4
    batched = classify(TEXTS, batch_size=3)
    # Equal but for the order of sums in float32.
    assert [a["score"] for a in batched] == pytest.approx([a["score"] for a in one_by_one], abs=1e-5)


def test_lora_adapts_the_projections_and_trains_the_head(tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = make_classifier(dtype=torch.float32), make_tokens(4, 6)
    mask, labels = torch.ones_like(ids), torch.tensor([0, 1, 2, 0])
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], r=2)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).train()
    optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = adapted(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path)
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(loaded(input_ids=ids, attention_mask=mask).logits, expected)
