"""The scores of a run: the bigram baseline, bits per byte on validation rows over all processes, and a sample."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM

from ..common.progress import progress_bar
from ..data import token_bigram_bits_per_byte
from ..data.bigram import LARGEST_VOCABULARY
from ..evaluation.estimates import Estimate
from ..evaluation.sample import generate_sample
from ..evaluation.scores import score_rows
from ..plan import Run
from .distributed import sum_over_groups
from .state import Score


def score_bigrams(run: Run) -> list[Score]:
    """The baseline on the rows that the model is scored on; none for a vocabulary too large for it."""
    if len(run.tokenizer) > LARGEST_VOCABULARY:
        return []
    return [Score("bigram", "bigram model", token_bigram_bits_per_byte(run.data.train, run.validation))]


def score_validation(run: Run, wrapped: nn.Module, accelerator: Accelerator, autocast: torch.dtype | None) -> Estimate:
    """Bits per byte of the validation rows, each group of processes having read an equal number of them, and the error
    of this ratio of sums (`estimates.ratio`)."""
    rows, layout = run.validation, run.layout
    share = math.ceil(len(rows) / layout.data_size)
    wanted = range(layout.data_index * share, (layout.data_index + 1) * share)
    # Under FSDP every process must run as many passes: where rows run out, the last is read again and not counted.
    own = OwnRows(rows, [min(i, len(rows) - 1) for i in wanted])
    counted = torch.tensor([i < len(rows) for i in wanted])
    with progress_bar(share, "validation", "row", leave=False, active=accelerator.is_main_process) as bar:
        scores = score_rows(
            wrapped, own, batch_size=run.micro_batch_size, device=accelerator.device, autocast=autocast,
            on_batch=bar.update,
        )  # fmt: skip
    nats, text_bytes = (x[counted].double() for x in (scores.nats, scores.bytes))
    total, total_bytes = sum_over_groups([float(nats.sum()), float(text_bytes.sum())], layout, accelerator.device)
    squares = float((nats - total / total_bytes * text_bytes).square().sum())
    (squares,) = sum_over_groups([squares], layout, accelerator.device)
    error = math.sqrt(squares * len(rows) / (len(rows) - 1)) / total_bytes if len(rows) > 1 else math.nan
    return Estimate(total / math.log(2) / total_bytes, error / math.log(2))


class OwnRows(Subset):
    """Some of the rows, with the bytes of their tokens."""

    def token_bytes(self, index: int) -> torch.Tensor:
        return self.dataset.token_bytes(self.indices[index])


def generate_final_sample(run: Run, device: torch.device) -> tuple[str, str]:
    """A prompt of held-out text and how the saved model of the last stage goes on, or two empty texts."""
    output = run.recipe.output
    if output.sample_tokens == 0:
        return "", ""
    model = AutoModelForCausalLM.from_pretrained(run.folder.stage(run.stages[-1].name)).to(device)
    # From the middle: the first held-out file of the default data is a list of constants.
    prompt = run.validation[len(run.validation) // 2]["input_ids"][: output.prompt_tokens]
    return generate_sample(model, run.tokenizer, prompt, new_tokens=output.sample_tokens, seed=run.recipe.training.seed)
