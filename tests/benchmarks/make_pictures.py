"""Make every picture of the package into one folder, from runs so small that their numbers say nothing, to look at.

    python tests/benchmarks/make_pictures.py --output runs/pictures

It takes about ten minutes on two CPU cores. What a run of the command has left there is not run again. `--table3` only
draws table3.png again, from the numbers that TABLE3.md beside it holds.
"""

import argparse
import re
import shutil
from pathlib import Path

from modeling_tnt.train.cli import main
from modeling_tnt.train.evaluation.estimates import Estimate
from modeling_tnt.train.reproduce.paper import ROWS
from modeling_tnt.train.reproduce.picture import Line, draw_table

HERE = Path(__file__).parent
STAGES = """
model: {preset: tiny}
training: {seq_len: 256, batch_size: 2}
data: {limit_megabytes: 2.0}
optimizer: {learning_rate: 3.0e-3}
stages:
  - {name: stage1, steps: 120}
  - {name: look_at_me, steps: 40, local_chunk_sizes: [8]}
  - {name: third, steps: 20, local_chunk_sizes: [4]}
  - {name: last, steps: 20, local_chunk_sizes: [2]}
output: {eval_tokens: 16384, health_every: 5, sample_tokens: 0}
"""


def make_all(root: Path) -> None:
    """The pictures go to `root`, what they are made from to `root`/runs."""
    runs = root / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    recipe = runs / "stages.yaml"
    recipe.write_text(STAGES, encoding="utf-8")
    trained, llama = runs / "train", runs / "llama"
    data = ["--data.limit-megabytes", "2"]
    of_llama = [*data, "--model.architecture", "llama", "--training.seq-len", "256", "--output.sample-tokens", "0"]
    one_stage = runs / "one-stage.yaml"
    one_stage.write_text("stages: [{name: stage1, steps: 60}]\n", encoding="utf-8")
    sizes = ["--seq-len", "512", "--eval-tokens", "16384", "--retrieval-lengths", "128", "256", "512"]
    models = [str(trained / "last"), "--compare", str(trained / "stage1"), "--retrieval-documents", "40"]
    commands = {
        "loss.png": ["train", "--config", str(recipe), "--output.dir", str(trained)],
        "llama/loss.png": ["train", "--config", str(one_stage), *of_llama, "--output.dir", str(llama)],
        "eval/chunks.png": ["eval", *models, *sizes, *data, "--output-dir", str(runs / "eval")],
        "one/chunks.png": ["eval", str(trained / "last"), *sizes, *data, "--output-dir", str(runs / "one")],
        "context-parallel/context-parallel.png": [
            "bench", "context-parallel", "--predict", "--output-dir", str(runs / "context-parallel"),
        ],
        "decode/decode.png": ["bench", "decode", "--quick", "--output-dir", str(runs / "decode")],
        "kernels/kernels.png": ["bench", "kernels", "--quick", "--output-dir", str(runs / "kernels")],
        "model/model.png": ["bench", "model", "--quick", "--output-dir", str(runs / "model")],
        "table3/table3.png": [
            "reproduce", "table3", "--scale", "smoke", "--seeds", "2", "--output-dir", str(runs / "table3")
        ],
    }  # fmt: skip
    for picture, command in commands.items():
        made = runs / (picture if "/" in picture else f"train/{picture}")
        if not made.is_file() and (status := main(command)) != 0:
            raise SystemExit(f"tnt {' '.join(command)}: exit status {status}")
    for path in sorted(runs.glob("*/*.png")):
        shutil.copyfile(path, root / f"{path.parent.name}-{path.name}")
        print(root / f"{path.parent.name}-{path.name}")


def read_table(path: Path) -> list[Line]:
    """The rows of a table3.md, without the losses of single seeds, which it does not hold."""
    keys = {row.title: key for key, row in ROWS.items()}
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        if len(cells) == 9 and cells[0] in keys:
            mean, difference = (_read_estimate(cells[i]) for i in (4, 5))
            lines.append(Line(keys[cells[0]], mean, difference))
    return lines


def _read_estimate(cell: str) -> Estimate | None:
    found = re.fullmatch(r"([+-]?[\d.]+) ± ([\d.]+)", cell)
    return Estimate(*map(float, found.groups())) if found else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--table3", action="store_true")
    arguments = parser.parse_args()
    if arguments.table3:
        draw_table(HERE / "table3.png", read_table(HERE / "TABLE3.md"), scale="small")
    else:
        make_all(arguments.output)
