"""Collectives: the same bits on every rank, any size, any number of ranks, and an end when a peer is gone.

Run as a program it is one rank: `python -m tests.test_comm DIRECTORY RANK WORLD_SIZE NATIVE`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from treadle.engine.comm import Communicator, SharedMemoryComm, SingleComm, TorchComm, make_comm
from treadle.engine.native import load_native
from treadle.errors import EngineFailed, EngineStartFailed

CPU = torch.device("cpu")
# Elements: one, less and more than a vector, a hidden state, and more than two buffers hold.
SIZES = (1, 5, 16, 576, 33 * 576, 150_001)


def values(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * rank + size)).to(dtype)


@dataclass(frozen=True)
class Ended:
    """What the ranks of a group left behind, and what each said on stderr."""

    directory: Path
    native: bool
    outcomes: list[dict[str, np.ndarray]]
    words: list[str]


@pytest.fixture(scope="module", params=[(4, True), (2, False)], ids=["shared memory", "gloo"])
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """One group for all tests, for each rank imports torch. All of its ranks ended well."""
    world_size, native = request.param
    if native and load_native() is None:
        pytest.skip("no C compiler here")
    directory = tmp_path_factory.mktemp("group")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.test_comm", str(directory), str(rank), str(world_size), str(int(native))],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    words = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, words
    return Ended(directory, native, [dict(np.load(directory / f"{rank}.npz")) for rank in range(world_size)], words)


def test_sums_and_gathers(ended: Ended) -> None:
    outcomes = ended.outcomes
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = f"{dtype}.{size}"
            parts = [values(rank, size, dtype).float() for rank in range(len(outcomes))]
            expected = parts[0]
            for part in parts[1:]:
                expected = expected + part
            sums = [torch.from_numpy(outcome[f"sum.{name}"]) for outcome in outcomes]
            assert all(torch.equal(one, sums[0]) for one in sums)
            if ended.native:  # in rank order, and rounded once
                assert torch.equal(sums[0], expected.to(dtype).float())
            torch.testing.assert_close(sums[0], expected, rtol=0, atol=1e-5 if dtype is torch.float32 else 0.1)
            for outcome in outcomes:
                assert torch.equal(torch.from_numpy(outcome[f"gather.{name}"]), torch.stack(parts))
    if ended.native:
        assert {path.suffix for path in ended.directory.iterdir()} == {".npz"}  # the shared files are gone


def test_many_rounds_at_unlike_speeds(ended: Ended) -> None:
    """Ranks that outrun each other by turns would show a buffer that was overwritten too early."""
    assert [outcome["wrong rounds"].tolist() for outcome in ended.outcomes] == [[]] * len(ended.outcomes)


def test_a_lost_peer_is_an_error(ended: Ended) -> None:
    assert "EngineFailed" in ended.words[0]
    if ended.native:
        assert "rank 1" in ended.words[0]


def test_a_peer_that_never_starts_is_an_error(tmp_path: Path) -> None:
    native = load_native()
    if native is None:
        pytest.skip("no C compiler here")
    with pytest.raises(EngineStartFailed, match="1 of 2"):
        SharedMemoryComm(0, 2, tmp_path, native, timeout=0.05)


def core() -> float:
    """Where this thread is."""
    return float(Path("/proc/thread-self/stat").read_text().rpartition(")")[2].split()[36])


def test_ranks_on_one_core_part_and_are_bound_to_none(tmp_path: Path) -> None:
    """Two threads that were put on one core, and then may go where they like."""
    native, cores = load_native(), os.sched_getaffinity(0)
    if native is None or len(cores) < 2:
        pytest.skip("no C compiler, or one core")

    def rank(number: int) -> bool:
        """Whether it may still go everywhere. Cores are noted round by round: both see the same."""
        comm = SharedMemoryComm(number, 2, tmp_path, native, timeout=60)
        os.sched_setaffinity(0, {min(cores)})
        comm.barrier()
        os.sched_setaffinity(0, cores)
        for _ in range(100_000):
            where = comm.all_gather(torch.tensor([core()]))
            if where[0] != where[1]:
                break
        else:
            return False
        return os.sched_getaffinity(0) == cores

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(rank, range(2))) == [True, True]


def test_a_group_of_one_talks_to_nobody(tmp_path: Path) -> None:
    comm = make_comm(0, 1, CPU, init_method="", shared_dir=tmp_path)
    assert isinstance(comm, SingleComm)
    x = values(0, 7, torch.float32)
    assert torch.equal(comm.all_reduce(x.clone()), x)
    assert torch.equal(comm.all_gather(x), x[None])


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    if load_native() is None:
        pytest.skip("no C compiler here")
    with pytest.raises(EngineStartFailed, match="missing"):
        make_comm(0, 2, CPU, init_method="x", shared_dir=tmp_path / "missing", timeout=0.05)


def collect(comm: Communicator) -> dict[str, np.ndarray]:
    outcome = {}
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = values(comm.rank, size, dtype)
            outcome[f"gather.{dtype}.{size}"] = comm.all_gather(x).float().numpy()
            outcome[f"sum.{dtype}.{size}"] = comm.all_reduce(x).float().numpy()
    return outcome


def race(comm: Communicator) -> list[int]:
    """Rounds whose sum was wrong."""
    idle, wrong = torch.randn(40, 40), []
    for round_ in range(600):
        if round_ % comm.world_size == comm.rank:
            idle @ idle
        x = torch.full((round_ % 97 + 1,), float(round_ + comm.rank))
        expected = comm.world_size * round_ + sum(range(comm.world_size))
        if not torch.equal(comm.all_reduce(x), torch.full_like(x, float(expected))):
            wrong.append(round_)
    return wrong


def run_rank(directory: Path, rank: int, world_size: int, native: bool) -> None:
    torch.set_num_threads(1)
    method = f"file://{directory}/rendezvous"
    comm: Communicator = make_comm(rank, world_size, CPU, init_method=method, shared_dir=directory, native=native)
    assert isinstance(comm, SharedMemoryComm if native else TorchComm)
    outcome = collect(comm)
    np.savez(directory / f"{rank}.npz", **outcome, **{"wrong rounds": np.array(race(comm))})
    comm.barrier()
    library = load_native() if native else None
    if library is not None:  # here a lost peer is one that does not come in time, and this group's time is long
        comm = SharedMemoryComm(rank, world_size, directory, library, "hasty", timeout=2.0)
        comm.barrier()
    if rank == 0:
        try:
            comm.all_reduce(torch.ones(3))
        except EngineFailed as error:
            print(repr(error), file=sys.stderr)
            os._exit(0)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")
