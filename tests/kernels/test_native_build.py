"""The build of the CPU kernels, on sources of a line or two: cached, safe beside other processes, never in the way."""

import errno
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from modeling_tnt.kernels.native import build
from modeling_tnt.kernels.native.build import Builder, Flags

pytestmark = pytest.mark.skipif(build._no_compiler() is not None, reason="needs a C++ compiler")

EXPORT = 'extern "C" __attribute__((visibility("default"))) '
ADD = EXPORT + "int add(int a, int b) { return a + b; }\n"
THREADS = f"""{EXPORT} int count_threads(int asked) {{
  int threads = 0;
#pragma omp parallel num_threads(asked) reduction(+ : threads)
  threads += 1;
  return threads;
}}
"""
COMPILER = """#!/bin/sh
case "$*" in
*" -c "*)
    echo "$$ $*" >> "{folder}/compiled"
    while [ -e "{folder}/hang" ]; do sleep 0.05; done;;
*"{refused}"*)
    echo "error: unknown argument"; exit 1;;
esac
exec c++ "$@"
"""
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    for name in ("TNT_NATIVE", "CXX", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TNT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sources(tmp_path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "add.cpp").write_text(ADD)
    return folder


class Compiler:
    """The one of this machine, in CXX: writes down what it compiles, waits while there is `hang`, refuses a flag."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.hang, self._log = folder, folder / "hang", folder / "compiled"
        self._script = folder / "compiler"
        self.refuse("nothing")
        self._script.chmod(0o755)
        monkeypatch.setenv("CXX", str(self._script))

    def refuse(self, flag: str) -> None:
        self._script.write_text(COMPILER.format(folder=self.folder, refused=flag))

    def compiled(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []


@pytest.fixture
def compiler(tmp_path, monkeypatch) -> Iterator[Compiler]:
    compiler = Compiler(tmp_path, monkeypatch)
    yield compiler
    compiler.hang.unlink(missing_ok=True)  # so that none is left waiting


def start(function: Callable[[], object]) -> multiprocessing.Process:
    process = FORK.Process(target=function)
    process.start()
    return process


def build_elsewhere(sources: Path) -> None:
    """In another process: this one has loaded nothing then, and a file of the cache may be damaged."""
    process = start(lambda: Builder(sources).library())
    process.join(60)
    assert process.exitcode == 0


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so"))


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 180  # several processes import torch, beside other tests
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def use_capability(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)


# ------------------------------------------------------------------------------------------------------------ building


def test_builds_once_and_says_so(sources, cache, compiler, capfd):
    (sources / "threads.cpp").write_text(THREADS)
    builder = Builder(sources)
    assert builder.missing() is None and not builder.is_built() and compiler.compiled() == []

    library = builder.library()
    assert library.add(3, 4) == 7 and library.count_threads(1) == 1
    assert builder.is_built() and builder.missing() is None and builder.library() is library
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith(f"building the CPU kernels of modeling_tnt, once, with {os.environ['CXX']} ... ")
    assert said.endswith(" s") and ";" not in said
    assert len(compiler.compiled()) == 2 and len(libraries(cache)) == 1

    again = Builder(sources)
    assert again.is_built() and again.library().add(3, 4) == 7
    assert len(compiler.compiled()) == 2 and capfd.readouterr().err == ""
    assert not list(Path(tempfile.gettempdir()).iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_threads_are_those_of_torch(sources):
    """A second OpenMP runtime would have threads of its own, which wait beside torch's."""
    (sources / "threads.cpp").write_text(THREADS)
    assert Builder(sources).library().count_threads(2) == 2
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    assert len([path for path in mapped if Path(path).name.startswith(("libgomp.so", "libomp.so"))]) == 1


def test_a_compiler_with_arguments(sources, monkeypatch):
    monkeypatch.setenv("CXX", "env c++ -Wall")
    assert Builder(sources).library().add(3, 4) == 7


def test_the_compiler_is_the_one_that_torch_uses(monkeypatch):
    assert build._compiler() == [cpp_extension.get_cxx_compiler()]
    monkeypatch.setenv("CXX", "g++")
    assert build._compiler() == [cpp_extension.get_cxx_compiler()]


@pytest.mark.parametrize(
    ("capability", "there", "absent"),
    [
        ("AVX512", ["-mavx512vl", "-mfma", "-mprefer-vector-width=512"], []),
        ("AVX2", ["-mavx2", "-mfma"], ["-mavx512f", "-mprefer-vector-width=512"]),
        ("DEFAULT", ["-O3"], ["-mavx2", "-mfma"]),
        ("SVE256", ["-O3"], ["-mavx2", "-mfma"]),
    ],
)
def test_vector_instructions_are_those_of_torch(capability, there, absent, monkeypatch):
    use_capability(capability, monkeypatch)
    flags = Flags.of_machine()
    given = {*flags.common, *flags.wide}
    assert given.issuperset(there) and given.isdisjoint(absent)
    assert given.isdisjoint({"-march=native", "-ffast-math", "-Ofast"})


def test_a_flag_that_the_compiler_does_not_know_is_left_out(sources, compiler, monkeypatch, capfd):
    use_capability("AVX512", monkeypatch)  # what is built is not called: this CPU may be another
    compiler.refuse("-mprefer-vector-width")
    Builder(sources).library()
    (command,) = compiler.compiled()
    assert "-mavx512f" in command and "-fopenmp" in command and "-mprefer" not in command
    assert ";" not in capfd.readouterr().err


def test_without_openmp_there_is_one_thread(sources, compiler, capfd):
    compiler.refuse(" -fopenmp ")
    (sources / "threads.cpp").write_text(THREADS)
    assert Builder(sources).library().count_threads(2) == 1
    assert "; with one thread, as OpenMP is missing: install it" in capfd.readouterr().err


# --------------------------------------------------------------------------------------------------------------- cache


def test_a_second_process_loads_what_the_first_has_built(sources, compiler):
    Builder(sources).library()
    code = (
        "import importlib.util, pathlib, sys\n"
        "spec = importlib.util.spec_from_file_location('build', sys.argv[1])\n"
        "build = importlib.util.module_from_spec(spec)\n"
        "sys.modules['build'] = build\n"
        "spec.loader.exec_module(build)\n"
        "builder = build.Builder(pathlib.Path(sys.argv[2]))\n"
        "print(builder.is_built(), builder.library().add(3, 4))"
    )
    command = [sys.executable, "-c", code, build.__file__, str(sources)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("True 7\n", "")
    assert len(compiler.compiled()) == 1


def test_four_processes_build_once(sources, cache, compiler, capfd):
    compiler.hang.touch()
    processes, said = [start(lambda: sys.exit(Builder(sources).library().add(3, 4))) for _ in range(4)], []

    def all_are_there() -> bool:
        said.append(capfd.readouterr().err)
        return "".join(said).count("another process is building") == 3 and len(compiler.compiled()) == 1

    wait_for(all_are_there)
    compiler.hang.unlink()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [7] * 4
    assert len(compiler.compiled()) == 1 and len(libraries(cache)) == 1
    assert "".join([*said, capfd.readouterr().err]).count("building the CPU kernels of modeling_tnt") == 1


def test_a_killed_build_is_not_in_the_way(sources, cache, compiler, monkeypatch):
    compiler.hang.touch()
    process = start(lambda: Builder(sources).library())
    wait_for(compiler.compiled)
    process.kill()
    process.join()
    (cache / "cpu_kernels-1-2.partial").touch()  # what is left if it is killed a little later

    monkeypatch.delenv("CXX")  # the compiler of the killed process still runs
    assert Builder(sources).library().add(3, 4) == 7
    assert len(libraries(cache)) == 1 and not list(cache.glob("*.partial"))


def test_a_stopped_process_is_not_waited_for_for_ever(sources, cache, monkeypatch, capfd):
    monkeypatch.setattr(build, "LOCK_WAIT", 0.1)
    with build._locked(cache):
        assert Builder(sources).library().add(3, 4) == 7
    waiting, built = capfd.readouterr().err.splitlines()
    assert waiting.startswith("another process is building") and "for this process alone (The file lock" in built


@pytest.mark.parametrize("damage", ["cut short", "not a library"])
def test_a_damaged_library_is_built_again(damage, sources, cache, compiler):
    build_elsewhere(sources)
    (path,) = libraries(cache)
    if damage == "cut short":
        os.truncate(path, path.stat().st_size // 2)
        assert not Builder(sources).is_built()
    else:  # and its name says that it is whole
        content = b"something else"
        path.unlink()
        digest = hashlib.sha256(content).hexdigest()[:16]
        path.with_name(f"{path.stem.rpartition('-')[0]}-{digest}.so").write_bytes(content)
    assert Builder(sources).library().add(3, 4) == 7
    build_elsewhere(sources)
    assert len(compiler.compiled()) == 2


def test_the_name_depends_on_all_that_the_code_does(sources, monkeypatch):
    names = [Builder(sources).name(["c++"])]
    for file, text in (("add.cpp", ADD + "\n"), ("tile.h", ""), ("tile.h", "#define D 3\n"), ("b.cpp", "")):
        (sources / file).write_text(text)
        names.append(Builder(sources).name(["c++"]))
    names.append(Builder(sources).name(["c++", "-O1"]))
    for capability in ("AVX512", "AVX2", "DEFAULT"):
        use_capability(capability, monkeypatch)
        names.append(Builder(sources).name(["c++", "-O2"]))
    monkeypatch.setattr(build, "_run_all", lambda *_: ["another version"])
    names.append(Builder(sources).name(["c++", "-O2"]))
    assert len(set(names)) == len(names)
    assert Builder(sources).name(["c++", "-O2"]) == names[-1]


def test_old_builds_are_removed_but_for_the_newest(sources, cache):
    cache.mkdir()
    days = {"old1": 50, "old2": 45, "old3": 44, "old4": 43, "old5": 42, "young1": 2, "young2": 1}
    for name, age in days.items():
        path = cache / f"cpu_kernels-{name}-1.so"
        path.touch()
        os.utime(path, (time.time() - age * 86400,) * 2)
    (cache / "mine.so").touch()
    Builder(sources).library()
    left = {path.name.split("-")[1] for path in cache.glob("cpu_kernels-*.so") if "-1.so" in path.name}
    assert left == {"young1", "young2", "old5", "old4"} and (cache / "mine.so").exists()


def test_without_tnt_cache_it_lies_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("TNT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache" / "modeling_tnt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_folder() == tmp_path / "xdg" / "modeling_tnt"
    monkeypatch.setenv("TNT_CACHE", "~/kernels")
    assert build.cache_folder() == tmp_path / "kernels"


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("reason", ["file", "read-only", "full", "no home", "no locks", "not executable"])
def test_a_folder_that_cannot_be_used(reason, sources, cache, monkeypatch, capfd):
    if reason == "file":
        cache.write_text("in the way")
    elif reason == "read-only":
        monkeypatch.setenv("TNT_CACHE", "/proc/modeling_tnt")  # cannot be written, not even by root
    elif reason == "full":
        monkeypatch.setattr(shutil, "copyfile", no_room)
    elif reason == "no home":
        monkeypatch.delenv("TNT_CACHE")
        monkeypatch.setattr(Path, "home", no_home)
    elif reason == "no locks":
        monkeypatch.setattr(build.FileLock, "acquire", lambda *_, **__: no_locks())
    else:  # mounted so that nothing may be executed: what is loaded from there is refused
        monkeypatch.setattr(build, "_keep", lambda *_: cache / "missing.so")

    assert Builder(sources).library().add(3, 4) == 7
    (said,) = capfd.readouterr().err.splitlines()
    assert "for this process alone (" in said and said.endswith("set TNT_CACHE to a folder that can be written")
    assert libraries(cache) == [] and not list(Path(tempfile.gettempdir()).iterdir())


def no_locks():
    raise NotImplementedError("FileSystem does not appear to support flock")


def test_a_folder_that_can_only_be_read_serves_what_it_holds(sources, compiler, monkeypatch):
    build_elsewhere(sources)
    monkeypatch.setattr(build, "_locked", no_room)
    assert Builder(sources).library().add(3, 4) == 7
    assert len(compiler.compiled()) == 1


# -------------------------------------------------------------------------------------------------------------- errors


def refusal(builder: Builder) -> str:
    """What `missing` says, and `library` raises."""
    reason = builder.missing()
    with pytest.raises(RuntimeError) as caught:
        builder.library()
    assert str(caught.value) == reason and not builder.is_built()
    return reason


def failure(builder: Builder) -> str:
    """What `library` raises where nothing was missing, and `missing` says from then on."""
    assert builder.missing() is None
    with pytest.raises(RuntimeError) as caught:
        builder.library()
    assert refusal(builder) == str(caught.value)
    return str(caught.value)


def test_without_a_compiler(sources, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler was found (c++, g++ or clang++); install one (apt install g++" in refusal(Builder(sources))


@pytest.mark.parametrize("named", ["/nowhere/c++", "'c++", "  "])
def test_a_compiler_that_does_not_exist(named, sources, monkeypatch):
    monkeypatch.setenv("CXX", named)
    assert refusal(Builder(sources)) == f"CXX={named!r} names no program; set it to a C++ compiler, or unset it"


def test_a_compiler_that_does_not_run(sources, tmp_path, monkeypatch):
    program = tmp_path / "program"
    for content, why in ((b"#!/bin/sh\nexit 3", "it ended with status 3)"), (b"\0", "[Errno 8] Exec format error")):
        program.write_bytes(content)
        program.chmod(0o755)
        monkeypatch.setenv("CXX", str(program))
        assert f"{program} does not run ({why}" in failure(Builder(sources))


def test_a_platform_that_is_not_built_for(sources, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert "this is win32; on Windows use WSL" in refusal(Builder(sources))


def test_forbidden(sources, monkeypatch):
    monkeypatch.setenv("TNT_NATIVE", "0")
    assert refusal(Builder(sources)) == "TNT_NATIVE=0 forbids the CPU kernels; unset it"
    monkeypatch.setenv("TNT_NATIVE", "off")
    assert "TNT_NATIVE='off' is unknown; set 0" in refusal(Builder(sources))
    monkeypatch.setenv("TNT_NATIVE", "1")
    assert Builder(sources).missing() is None


def test_no_sources(tmp_path):
    assert "holds no C++ sources" in refusal(Builder(tmp_path / "nothing"))


def test_an_error_names_file_and_line_and_is_remembered(sources, cache, compiler, capfd):
    (sources / "bad.cpp").write_text("int f() {\n  return nothing;\n}\n")
    builder = Builder(sources)
    reason = failure(builder)
    assert f"does not compile the CPU kernels ({sources}/bad.cpp:2:10: error:" in reason and "nothing" in reason
    assert "name another C++ compiler in CXX, or set TNT_NATIVE=0 to do without the CPU kernels" in reason
    assert sum("bad.cpp" in line for line in compiler.compiled()) == 1
    (said,) = capfd.readouterr().err.splitlines()
    assert said.endswith(" failed") and libraries(cache) == [] and not list(Path(tempfile.gettempdir()).iterdir())


@pytest.mark.parametrize(
    ("source", "said"),
    [(ADD, "multiple definition of"), (f"int g();\n{EXPORT} int f() {{ return g(); }}", "undefined")],
)
def test_an_error_of_the_linker(source, said, sources):
    (sources / "b.cpp").write_text(source)
    reason = failure(Builder(sources))
    assert reason.startswith("c++ does not compile the CPU kernels (") and said in reason


def test_a_library_that_does_not_load(sources, monkeypatch):
    monkeypatch.setattr(build, "_compile", lambda *_: sources / "add.cpp")
    assert "what the C++ compiler made cannot be loaded (" in failure(Builder(sources))


def test_a_compiler_that_hangs_is_ended(sources, compiler, monkeypatch):
    compiler.hang.touch()
    monkeypatch.setattr(build, "TIMEOUT", 2)
    assert "it has not ended after 2 s" in failure(Builder(sources))
    with pytest.raises(ProcessLookupError):
        os.kill(int(compiler.compiled()[0].split()[0]), 0)
