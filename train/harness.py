"""lm-evaluation-harness on saved TNT models: its own command line, with the model type "tnt" added to it.

    python -m modeling_tnt.train.harness --model tnt --model_args pretrained=FOLDER --tasks lambada_openai,arc_easy

All flags are lm_eval's, the subcommands too (`python -m modeling_tnt.train.harness ls tasks`). Model arguments go on to
`from_pretrained`; lists among them need JSON: --model_args '{"pretrained": "FOLDER", "local_chunk_sizes": [1]}'.
"""

from __future__ import annotations

from typing import Any

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("lm-evaluation-harness is not installed; use pip install 'modeling-tnt[eval]'") from error

from .integrations.lora import read_base_config


@register_model("tnt")
class TNTHarnessModel(HFLM):
    """The harness's own "hf" model, with two defaults that a TNT model needs to be scored as it was trained.

    - Nothing is appended to a text. "hf" lets the tokenizer add its special tokens, and those of T5 and ByT5 end every
      text with </s>, the context of a question too. add_bos_token=True asks for that again.
    - An adapter (`peft=FOLDER`, see `save_lora`) is read at the chunks that it was trained with, unless
      local_chunk_sizes is given.

    Args:
        pretrained: the saved model's folder or Hub name, or a model.
        peft: an adapter's folder or Hub name.
        options: further arguments of `HFLM`, such as dtype, device, batch_size and max_length; what is none of these
            goes on to the model's `from_pretrained`.
    """

    def __init__(self, pretrained: Any, peft: str | None = None, **options: Any) -> None:
        if peft is not None and "local_chunk_sizes" not in options:
            adapted = read_base_config(peft)
            options["local_chunk_sizes"] = adapted.local_chunk_sizes
            options["local_shard_lengths"] = adapted.local_shard_lengths
        super().__init__(pretrained, peft=peft, **options)
        if self.add_bos_token is None and self.tokenizer("a").input_ids[-1] == self.tokenizer.eos_token_id:
            self.add_bos_token = False


if __name__ == "__main__":
    cli_evaluate()
