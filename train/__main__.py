"""`accelerate launch -m modeling_tnt.train --config recipe.yaml …`: what `tnt train` does, in each process."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
