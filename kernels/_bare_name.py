"""Step aside when this folder is imported as `kernels`.

The package is `modeling_tnt.kernels`. With the repository root on `sys.path` (the interactive interpreter, `python -m`)
its folder would also answer to `import kernels`, the name of Hugging Face's package, which transformers imports when it
is installed. So our `__init__` calls `step_aside` when it finds itself under the bare name.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from types import ModuleType

NAME = "kernels"
HERE = os.path.dirname(os.path.realpath(__file__))


def step_aside() -> None:
    """Put the installed `kernels` package into `sys.modules` in our place, or an empty placeholder module.

    The import system returns what it finds in `sys.modules` after a module's code has run.
    """
    sys.modules.pop(__name__, None)
    spec = _find_installed()
    if spec is None:
        sys.modules[NAME] = _not_installed()
        return
    module = module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)


def _find_installed() -> ModuleSpec | None:
    """The package `kernels` that would have been imported if this folder were not there."""
    path = [p for p in sys.path if os.path.realpath(os.path.join(p or os.curdir, NAME)) != HERE]
    for finder in sys.meta_path:
        spec = PathFinder.find_spec(NAME, path) if finder is PathFinder else finder.find_spec(NAME, None)
        if spec is not None and spec.origin is not None:  # a namespace package has no origin: not an installed one
            return spec
    return None


def _not_installed() -> ModuleType:
    """An empty module without file and version, which transformers takes for a package that is not installed.

    Raising at once is what `import kernels` deserves, but transformers imports a package that it can find and that has
    no metadata, and does not expect this to fail. So the error comes with the first name that is asked for.
    """

    def __getattr__(name: str):
        if name.startswith("__"):
            raise AttributeError(f"module {NAME!r} has no attribute {name!r}")
        raise ModuleNotFoundError(f"No module named {NAME!r}; the folder {HERE} is modeling_tnt.kernels", name=NAME)

    module = ModuleType(NAME, "Stands for the package `kernels`, which is not installed.")
    module.__spec__ = ModuleSpec(NAME, loader=None)  # importlib.util.find_spec raises for a module without one
    module.__path__ = []
    module.__getattr__ = __getattr__
    return module
