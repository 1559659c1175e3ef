"""Workers in actors of a Ray cluster: how a search uses many machines.

An actor loads its model once and answers one request after another. Ray starts actors and says
when one has died; who replaces it and what becomes of its request is the pool's business.
Source: Moritz et al. 2018, arXiv:1712.05889.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Collection, Sequence
from typing import Any

from prunezero.errors import SearchError, reason
from prunezero.files.cache import cache_dir
from prunezero.searching.evaluation.request import Request
from prunezero.searching.workers.pool import DEADLINE, Worker, WorkerPool
from prunezero.searching.workers.processes import usable_cores
from prunezero.searching.workers.worker import EvaluatorPlan, Message, WorkerLoop

# Settings of this process that its workers on other machines must have as well.
_SHARED = ("HF_HUB_OFFLINE", "HF_HOME", "PRUNEZERO_CACHE_GIB")

# For the head of a cluster.
_SECONDS_TO_ANSWER = 10.0


def ray_pool(
    plan: EvaluatorPlan,
    address: str,
    count: int,
    *,
    threads: int | None = None,
    deadline: float = DEADLINE,
) -> WorkerPool:
    """Evaluators in actors of a Ray cluster, which is joined; the first request starts the actors.

    Args:
        address: of a running cluster, "auto" for the one of this machine, or "local" for a new
            one that ends with the search.
        count: actors at most, each with a GPU of its own where the model is on one.
        threads: of each actor; None divides the cores. Sums differ in their last bits between
            numbers of threads.
        deadline: seconds for one request.

    Raises:
        SearchError: Ray is not installed, the cluster does not answer or is too small.
    """
    ray = _imported()
    is_ours = not ray.is_initialized()
    if is_ours:
        _join(ray, address, (threads or max(1, usable_cores() // count)) * count)
    try:
        machines = [one["Resources"] for one in ray.nodes() if one["Alive"]]
        each = _share(machines, plan.device, count, threads)
        cluster = _Cluster(ray, plan, count, each, is_ours=is_ours)
        return WorkerPool(cluster, count, deadline, threads=each)
    except BaseException:
        if is_ours:
            ray.shutdown()
        raise


def _imported() -> Any:
    # Ray reports its use to its makers unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise SearchError(
            'a search on a cluster needs Ray; install it by `pip install "prunezero[cluster]"`'
        ) from error
    return ray


def _join(ray: Any, address: str, cores: int) -> None:
    """Start a cluster on this machine, or join one that runs.

    Raises:
        SearchError: it does not answer.
    """
    shared = {name: os.environ[name] for name in _SHARED if name in os.environ}
    shared["PRUNEZERO_CACHE"] = str(cache_dir().resolve())
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    own = {"num_cpus": cores, "include_dashboard": False} if address == "local" else {}
    try:
        _knock(address)
        # What Ray has to say about its own future is not for whoever searches.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address=address, runtime_env={"env_vars": shared}, **quiet, **own)
    # Ray ends the program where it finds nobody.
    except (RuntimeError, ValueError, OSError, SystemExit) as error:
        raise SearchError(
            f"the Ray cluster '{address}' cannot be joined ({reason(error)}); start one by "
            "`ray start --head`, or say 'local'"
        ) from error


def _knock(address: str) -> None:
    """Find out in seconds whether anybody is at HOST:PORT, for which Ray takes minutes.

    Raises:
        OSError: nobody is.
    """
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_ANSWER).close()


def _share(
    machines: Sequence[dict[str, float]], device: str, count: int, threads: int | None
) -> int:
    """Threads for each of `count` actors, the most with which all find a place.

    Raises:
        SearchError: there is no place for so many.
    """
    cores = [int(machine.get("CPU", 0)) for machine in machines]
    gpus = [int(machine.get("GPU", 0)) if device == "cuda" else count for machine in machines]
    for each in [threads] if threads else range(max(cores, default=0), 0, -1):
        places = zip(cores, gpus, strict=True)
        if sum(min(free // each, gpu) for free, gpu in places) >= count:
            return each
    have = f"{sum(cores)} cores" + (f" and {sum(gpus)} GPUs" if device == "cuda" else "")
    raise SearchError(
        f"the cluster has {have} on {len(machines)} machines, which is too few for {count} workers"
        f"{f' of {threads} threads' if threads else ''}; ask for fewer --workers"
    )


class _Cluster:
    """A Ray cluster, as a launcher of a pool."""

    def __init__(
        self, ray: Any, plan: EvaluatorPlan, count: int, threads: int, *, is_ours: bool
    ) -> None:
        self._ray = ray
        self._is_ours = is_ours
        self._plan = ray.put(plan)
        self._threads = threads
        self.loading = count
        self._actors = ray.remote(WorkerLoop).options(
            num_cpus=threads, num_gpus=int(plan.device == "cuda"), max_restarts=0
        )

    def start(self, place: int) -> Worker:
        return _Actor(self._ray, self._actors.remote(self._plan, self._threads))

    def wait(self, handles: Sequence[Any], seconds: float) -> Collection[Any]:
        waiting = list(handles)
        self._ray.wait(waiting, timeout=seconds)
        # The one that was waited for, and all others that are ready as well.
        return self._ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]

    def close(self) -> None:
        # A cluster that somebody else had joined stays theirs.
        if self._is_ours:
            self._ray.shutdown()


class _Actor:
    """A worker in an actor; its handle is the reference to what it will say."""

    def __init__(self, ray: Any, loop: Any) -> None:
        self._ray = ray
        self._loop = loop
        self.handle = loop.start.remote()

    def ask(self, request: Request) -> bool:
        self.handle = self._loop.result.remote(request)
        return True

    def hear(self) -> Message:
        try:
            return self._ray.get(self.handle)
        except self._ray.exceptions.RayError as error:
            return "died", reason(error)

    def kill(self) -> None:
        self._ray.kill(self._loop, no_restart=True)
