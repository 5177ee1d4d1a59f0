"""Builds the CPU kernels: every `*.cpp` of this folder into one shared library, at first use, and loads it.

The sources are plain `extern "C"` functions without torch's headers, called through ctypes, so a build takes seconds
and fits any torch. What is called needs `__attribute__((visibility("default")))`: the rest is hidden. Where a compiler
has no OpenMP they are built for one thread, so `omp.h` is included under `#ifdef _OPENMP`.

The library is kept as `cpu_kernels-KEY-DIGEST.so` in the folder TNT_CACHE, or `modeling_tnt` in XDG_CACHE_HOME or
~/.cache. Not in the cache of Hugging Face, where tokenised data lies: several users may share that, and code is not
loaded from where others can write. KEY is a hash of all that the machine code depends on, DIGEST of the library itself,
so that a file cut short by a full disk is never loaded: that can end the process. `TNT_NATIVE=0` in the environment
forbids the CPU kernels.

The compiler is that of `torch.utils.cpp_extension.get_cxx_compiler`: CXX, or c++; where there is no c++, g++ or
clang++. The rest of that module is not used: it needs setuptools to be imported (in torch 2.8, not in 2.13) and ninja
to build, and the lock of its `load` is a file that a killed process leaves behind, for which all later ones wait.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout

TIMEOUT = 600.0  # seconds, of all files together, and of linking them
LOCK_WAIT = TIMEOUT + 60  # seconds; then the process that builds is taken to be stopped
AT_ONCE = 2  # compilers side by side
KEPT, KEPT_DAYS = 4, 30  # other builds in the cache folder: so many stay, and all younger ones
PREFIX = "cpu_kernels"

COMMON_FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden",
    "-fopenmp-simd",  # of OpenMP what needs no library: the same vector code with and without threads
)  # fmt: skip
VECTOR_FLAGS = {  # by torch's name of what the CPU can do; on others, ARM among them, the compiler's baseline
    "AVX512": (
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd", "-mfma", "-mbmi2", "-mf16c",
    ),
    "AVX2": ("-mavx2", "-mfma", "-mbmi2", "-mf16c"),
}  # fmt: skip
WIDE_FLAGS = {"AVX512": ("-mprefer-vector-width=512",)}  # left out where the compiler does not know them

OTHERWISE = "name another C++ compiler in CXX, or set TNT_NATIVE=0 to do without the CPU kernels"


def missing() -> str | None:
    """Why the CPU kernels cannot be had here, with the remedy; None if they can, as far as is known before a build.

    Builds nothing. A build that has failed in this process is remembered.
    """
    return _PACKAGE.missing()


@functools.cache
def library() -> ctypes.CDLL:
    """The library of the CPU kernels; builds it, with a line on stderr, if it is not in the cache.

    Processes that need it at once wait for the one that came first. A killed build begins anew.

    Raises:
        RuntimeError: with the reason, if there is none: that of `missing`, or what the compiler said.
    """
    return _PACKAGE.library()


def is_built() -> bool:
    """Whether `library` has nothing to build."""
    return _PACKAGE.is_built()


class Builder:
    """One library made of all `*.cpp` of a folder; its methods are the functions above."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._library: ctypes.CDLL | None = None
        self._failure: str | None = None

    def missing(self) -> str | None:
        forbidden = _forbidden()
        if forbidden is not None or self._library is not None:
            return forbidden
        if self._failure is not None:
            return self._failure
        if not self._sources("*.cpp"):
            return f"{self.folder} holds no C++ sources of the CPU kernels; install modeling-tnt anew"
        return _no_compiler()

    def library(self) -> ctypes.CDLL:
        reason = self.missing()
        if reason is not None:
            raise RuntimeError(reason)
        if self._library is None:
            try:
                self._library = self._load_or_build()
            except RuntimeError as error:
                self._failure = str(error)
                raise
            except OSError as error:
                self._failure = f"what the C++ compiler made cannot be loaded ({error}); {OTHERWISE}"
                raise RuntimeError(self._failure) from error
        return self._library

    def is_built(self) -> bool:
        if self._library is not None:
            return True
        if self.missing() is not None:
            return False
        with suppress(OSError, RuntimeError):
            return any(_is_intact(path) for path in cache_folder().glob(f"{self.name(_compiler())}-*.so"))
        return False

    def name(self, compiler: list[str]) -> str:
        """Beginning of the file's name: a hash of what its machine code depends on."""
        flags, version = Flags.of_machine(), _run_all([[*compiler, "--version"]], "does not run")
        machine = (platform.system(), platform.machine(), platform.libc_ver())
        key = hashlib.sha256(repr([compiler, version, flags, machine]).encode())
        for path in self._sources("*.cpp") + self._sources("*.h"):
            content = path.read_bytes()
            key.update(f"\n{path.name} {len(content)}\n".encode() + content)
        return f"{PREFIX}-{key.hexdigest()[:16]}"

    def _sources(self, pattern: str) -> list[Path]:
        return sorted(self.folder.glob(pattern))

    def _load_or_build(self) -> ctypes.CDLL:
        compiler = _compiler()
        name = self.name(compiler)
        with ExitStack() as held:
            cache, unusable = None, None
            try:
                found = _load_cached(cache_folder(), name)
                if found is not None:
                    return found
                cache = held.enter_context(_locked(cache_folder()))
                found = _load_cached(cache, name)  # made by another process meanwhile
                if found is not None:
                    return found
            except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
                unusable = error
            return self._build(compiler, name, cache, unusable)

    def _build(self, compiler: list[str], name: str, cache: Path | None, unusable: Exception | None) -> ctypes.CDLL:
        """Build, keep in `cache` and load; where that is not possible, load a library of this process alone."""
        sources, started = self._sources("*.cpp"), time.monotonic()
        # A loaded library needs its file no more, so nothing is left for the exit of the process to remove.
        with (
            _line(f"building the CPU kernels of modeling_tnt, once, with {shlex.join(compiler)} ") as say,
            tempfile.TemporaryDirectory(prefix="modeling_tnt-", ignore_cleanup_errors=True) as work,
        ):
            flags = Flags.of_machine().accepted(compiler, Path(work))
            built = _compile(compiler, flags, sources, Path(work), lambda: say("."))
            loaded = None
            if cache is not None:
                try:
                    loaded = ctypes.CDLL(str(_keep(built, cache, name)))
                except OSError as error:  # no room, read-only, or nothing there may be executed
                    unusable = error
            loaded = loaded or ctypes.CDLL(str(built))
            say(f" {time.monotonic() - started:.0f} s")
            if not flags.openmp:
                say("; with one thread, as OpenMP is missing: install it (libomp-dev for clang), and empty the cache")
            if unusable is not None:
                say(f"; for this process alone ({unusable}): set TNT_CACHE to a folder that can be written")
        return loaded


_PACKAGE = Builder(Path(__file__).parent)

# --------------------------------------------------------------------------------------------------------------- cache


def cache_folder() -> Path:
    """Where builds are kept. Raises OSError where there is no home folder."""
    named = os.environ.get("TNT_CACHE")
    try:
        if named:
            return Path(named).expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "modeling_tnt"
    except RuntimeError as error:
        raise OSError(f"no cache folder: {error}") from error


def _load_cached(cache: Path, name: str) -> ctypes.CDLL | None:
    for path in cache.glob(f"{name}-*.so"):
        with suppress(OSError):  # made on a machine with a newer C library, say: it is built here
            if _is_intact(path):
                return ctypes.CDLL(str(path))
    return None


def _is_intact(path: Path) -> bool:
    return path.stem.endswith("-" + _digest(path))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@contextmanager
def _locked(cache: Path) -> Iterator[Path]:
    """Hold the lock of the cache, which ends with the process. Prints a line when another process holds it."""
    cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache / f"{PREFIX}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("another process is building the CPU kernels; waiting for it ...", file=sys.stderr, flush=True)
        lock.acquire(timeout=LOCK_WAIT)
    try:
        yield cache
    finally:
        lock.release()


def _keep(built: Path, cache: Path, name: str) -> Path:
    """Put a library into the cache, whole or not at all; the lock is held."""
    path = cache / f"{name}-{_digest(built)}.so"
    partial = path.with_suffix(".partial")
    try:
        shutil.copyfile(built, partial)
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise
    _tidy(cache, path)
    return path


def _tidy(cache: Path, kept: Path) -> None:
    """Remove what a killed process left half-written, and old builds of other sources, compilers or machines."""
    with suppress(OSError):
        for partial in cache.glob(f"{PREFIX}-*.partial"):
            partial.unlink()
        others = [(path.stat().st_mtime, path) for path in cache.glob(f"{PREFIX}-*.so") if path != kept]
        for modified, path in sorted(others, reverse=True)[KEPT:]:
            if modified < time.time() - KEPT_DAYS * 24 * 3600:
                path.unlink()


# ------------------------------------------------------------------------------------------------------------ compiler


class Flags(NamedTuple):
    """What the compiler is given for every file, and besides for linking. `wide` and `openmp` are done without where
    it does not take them."""

    common: tuple[str, ...]
    wide: tuple[str, ...]
    openmp: tuple[str, ...]
    openmp_link: tuple[str, ...]
    link: tuple[str, ...]

    @classmethod
    def of_machine(cls) -> Flags:
        """For what torch says this CPU can do, and not `-march=native`: a home folder, and with it the cache, may be
        shared by machines of several kinds."""
        capability = torch.backends.cpu.get_cpu_capability()
        common, wide = COMMON_FLAGS + VECTOR_FLAGS.get(capability, ()), WIDE_FLAGS.get(capability, ())
        if sys.platform != "darwin":
            # What is not used is not named: the libstdc++ of an environment may be older than the compiler's. What is
            # missing is an error here, and not when the library is loaded: clang may come without its OpenMP library.
            link = ("-shared", "-Wl,--as-needed", "-Wl,-z,defs")
            return cls(common, wide, ("-fopenmp",), ("-fopenmp",), link)
        # Apple's clang knows OpenMP but brings neither its header nor its library; torch's wheel does, and has loaded
        # the library. Not run yet.
        torch_folder = Path(torch.__file__).parent
        omp = torch_folder / "lib" / "libomp.dylib"
        compiling = ("-Xclang", "-fopenmp", f"-I{torch_folder / 'include'}")
        return cls(common, wide, compiling, (str(omp), f"-Wl,-rpath,{omp.parent}"), ("-shared",))

    def accepted(self, compiler: list[str], work: Path) -> Flags:
        """Without those that the compiler, or its linker, fails at."""
        probe = work / "probe.cpp"
        probe.write_text(
            "#ifdef _OPENMP\n#include <omp.h>\n#endif\n"
            'extern "C" __attribute__((visibility("default"))) float sum(const float* x, int n) {\n'
            "  float s = 0;\n#pragma omp parallel for reduction(+ : s)\n"
            "  for (int i = 0; i < n; ++i) s += x[i];\n  return s;\n}\n"
        )

        def takes(*flags: str) -> bool:
            try:
                _run_all([[*compiler, *self.common, *flags, *self.link, str(probe), "-o", f"{probe}.so"]], "fails")
            except RuntimeError:
                return False
            return True

        flags = self if takes(*self.wide) else self._replace(wide=())
        return flags if takes(*flags.openmp, *flags.openmp_link) else flags._replace(openmp=(), openmp_link=())


def _forbidden() -> str | None:
    named = os.environ.get("TNT_NATIVE", "")
    if named == "0":
        return "TNT_NATIVE=0 forbids the CPU kernels; unset it"
    if named not in ("", "1"):
        return f"TNT_NATIVE={named!r} is unknown; set 0 to do without the CPU kernels, or unset it"
    return None


def _no_compiler() -> str | None:
    if not sys.platform.startswith(("linux", "darwin")):
        return f"the CPU kernels are built on Linux and macOS, and this is {sys.platform}; on Windows use WSL"
    if _compiler():
        return None
    named = os.environ.get("CXX")
    if named:
        return f"CXX={named!r} names no program; set it to a C++ compiler, or unset it"
    return (
        "no C++ compiler was found (c++, g++ or clang++); install one (apt install g++, dnf install gcc-c++, "
        "xcode-select --install, or conda install cxx-compiler), or name it in CXX"
    )


def _compiler() -> list[str]:
    """The command, which may have arguments (CXX="ccache g++"); empty if there is none."""
    named = os.environ.get("CXX")
    if not named:
        return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), [])
    try:
        command = shlex.split(named)
    except ValueError:  # a quotation mark without its other
        return []
    return command if command and shutil.which(command[0]) else []


def _compile(compiler: list[str], flags: Flags, sources: list[Path], work: Path, done: Callable[[], None]) -> Path:
    """Compile each source and link them to a library in `work`; calls `done` after each. Raises RuntimeError."""
    objects = [str(work / f"{source.stem}.o") for source in sources]
    command, built = [*compiler, *flags.common, *flags.wide, *flags.openmp], work / f"{PREFIX}.so"
    problem = "does not compile the CPU kernels"
    _run_all(
        [[*command, "-c", str(source), "-o", o] for source, o in zip(sources, objects, strict=True)], problem, done
    )
    _run_all([[*command, *flags.link, *objects, *flags.openmp_link, "-o", str(built)]], problem, done)
    return built


def _run_all(commands: Sequence[list[str]], problem: str, done: Callable[[], None] = lambda: None) -> list[str]:
    """Run compilers, some at once, and return what each printed; calls `done` after each.

    Raises:
        RuntimeError: the first that fails, or cannot be started, or all if they take too long; the others are ended.
    """
    deadline, printed = time.monotonic() + TIMEOUT, {}
    waiting, running = list(enumerate(commands)), {}
    try:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                i, command = waiting.pop(0)
                running[i] = _Process(command)
            for i in [i for i, process in running.items() if process.has_ended()]:
                process = running.pop(i)
                printed[i] = process.output()
                if process.status() != 0:
                    raise _failed(process.command, problem, _first_errors(printed[i], process.status()))
                done()
            if time.monotonic() > deadline:
                raise _failed(commands[0], problem, f"it has not ended after {TIMEOUT:.0f} s")
            time.sleep(0.01)
    except OSError as error:
        raise _failed(commands[0], problem, str(error)) from error
    finally:
        for process in running.values():
            process.end()
    return [printed[i] for i in range(len(commands))]


class _Process:
    """A compiler that runs. What it prints goes into a file: a pipe would stay open, and be waited for, as long as any
    process that it has started."""

    def __init__(self, command: list[str]):
        self.command, self._file = command, tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._file, stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C"},  # its errors are looked for, in English
            start_new_session=True,  # so that it can be ended with those that it has started
        )  # fmt: skip

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def status(self) -> int:
        return self._process.returncode

    def output(self) -> str:
        with self._file as file:
            file.seek(0)
            return file.read().decode(errors="replace")

    def end(self) -> None:
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._file.close()


def _failed(command: list[str], problem: str, why: str) -> RuntimeError:
    return RuntimeError(f"{command[0]} {problem} ({why}); {OTHERWISE}")


def _first_errors(printed: str, status: int) -> str:
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [
        line
        for line in lines
        if re.search(r"\berror\b|\bld(\.\w+)?: |undefined|multiple definition", line, re.IGNORECASE)
    ]
    said = errors[:3] or lines[-3:]
    return " | ".join(said) if said else f"it ended with status {status}"


@contextmanager
def _line(begin: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that grows, and ends in any case."""

    def say(text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)

    say(begin)
    try:
        yield say
    except BaseException:
        say(" failed")
        raise
    finally:
        say("\n")
