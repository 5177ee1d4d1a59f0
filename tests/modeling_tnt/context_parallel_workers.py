"""Processes of context parallelism: started once for many cases, each of which leaves its result, or its traceback.

As a script it imports everything once and forks the ranks: an import takes seconds, and there may be four of them.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh

# Of one wait within a case. Far above what a busy machine needs: a rank that fails leaves its group, which the others
# see at once.
PATIENCE = timedelta(seconds=20)
LAUNCH_LIMIT = 1500  # seconds for all cases of a launch


@dataclass
class Ranks:
    """The processes that run a case; with the defaults one alone, without a group."""

    group: Any = None
    rank: int = 0
    size: int = 1

    def enable(self, model: Any, group: Any = None, **options: Any) -> None:
        """Let a model read over these processes, by `group` or else by that of the case; in one process nothing."""
        if self.group is not None:
            model.enable_context_parallel(group or self.group, **options)

    def grid(self, outer: int, timeout: timedelta = PATIENCE) -> DeviceMesh:
        """All processes of the run as a mesh ("dp", "cp") of `outer` rows; every one must call it."""
        inner = self.size // outer
        places = torch.arange(self.size).view(outer, inner)
        groups = [
            dist.new_subgroups_by_enumeration(lists, timeout=timeout, backend="gloo")[0]
            for lists in (places.T.tolist(), places.tolist())
        ]
        return DeviceMesh.from_group(groups, "cpu", places, mesh_dim_names=("dp", "cp"))


def launch(folder: Path, size: int, names: Sequence[str]) -> None:
    """Run the named cases in `size` processes, and leave their results in `folder`; see `outcomes`."""
    done = subprocess.run(
        [sys.executable, __file__, str(folder), str(size), *names],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}, timeout=LAUNCH_LIMIT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    (folder / "output.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout


def outcomes(folder: Path, size: int, name: str, dead: Sequence[int] = ()) -> list[dict[str, Any]]:
    """What each rank that took part in a case and is not to be `dead` has found.

    Raises:
        AssertionError: with the tracebacks of those that failed, or the reasons for which some did not come to it.
    """
    living = [rank for rank in range(size) if rank not in dead]
    missing = [rank for rank in living if not _result(folder, name, rank).exists()]
    said = "".join(
        f"\nrank {rank} {path.read_text()}" for rank in missing if (path := _exit(folder, name, rank)).exists()
    )
    assert not missing, f"{name} was not run to its end by ranks {missing}{said}"
    results = {rank: torch.load(_result(folder, name, rank), weights_only=False) for rank in living}
    errors = [f"rank {rank}:\n{one['error']}" for rank, one in results.items() if "error" in one]
    assert not errors, "\n".join(errors)
    return [one["found"] for one in results.values() if one["found"] is not None]


def _result(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}.{rank}.pt"


def _exit(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}.{rank}.exit"


def _work(rank: int, folder: Path, size: int, names: Sequence[str], port: int) -> None:
    """One rank: case after case, each with a group of its own, so that one that fails leaves the others alone."""
    from context_parallel_programs import CASES

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # NaN in uninitialised memory
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    for i, name in enumerate(names):
        case = CASES[name]
        members = list(case.members or range(size))
        group = dist.new_group(members, timeout=case.patience, backend="gloo")
        result = {"found": None}
        if rank in members:
            result = _run(case, Ranks(group, members.index(rank), len(members)))
        if "error" in result:  # the last references to a group close its connections: the others need not wait
            dist.destroy_process_group(group)
            group = None
            gc.collect()
        torch.save(result, _result(folder, name, rank))
        store.set(f"{name}/{rank}", "done")
        try:
            store.wait([f"{name}/{other}" for other in range(size) if other not in case.dead], 4 * PATIENCE)
        except dist.DistStoreError:
            for left in names[i + 1 :]:
                _exit(folder, left, rank).write_text(f"waited in vain for the other ranks to end {name}")
            break
        if group is not None and rank in members:
            dist.destroy_process_group(group)
    sys.stdout.flush()
    os._exit(0)  # without a wait for what a failed case has left


def _run(case: Any, ranks: Ranks) -> dict[str, Any]:
    """What a case finds, or its traceback."""
    try:
        return {"found": case.run(ranks)}
    except Exception as error:
        text = traceback.format_exc()
        traceback.clear_frames(error.__traceback__)
        return {"error": text}


def _main(folder: Path, size: int, names: Sequence[str]) -> None:
    """The cases one after the other in `size` processes; each in which a rank dies in processes of its own."""
    from context_parallel_programs import CASES  # imports everything before the fork

    from modeling_tnt.kernels import backends

    backends.missing("native", "cpu")  # compiles it once, if need be
    together = [name for name in names if not CASES[name].dead]
    for some in [together, *([name] for name in names if CASES[name].dead)]:
        if some:
            _fork(folder, size, some)


def _fork(folder: Path, size: int, names: Sequence[str]) -> None:
    context, store = mp.get_context("fork"), dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    workers = [context.Process(target=_work, args=(rank, folder, size, names, store.port)) for rank in range(size)]
    for worker in workers:
        worker.start()
    for rank, worker in enumerate(workers):
        worker.join()
        for name in names if worker.exitcode else ():
            _exit(folder, name, rank).write_text(f"ended with the code {worker.exitcode}")


if __name__ == "__main__":
    # By its name: cases and ranks must see the same classes.
    from context_parallel_workers import _main as main

    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
