"""Can one coordinator keep a thousand workers busy? A cluster of sham workers says.

    python benchmarks/cluster.py                                   # 1,000 workers, 10^6 questions
    python benchmarks/cluster.py --workers 64 --questions 20000
    python benchmarks/cluster.py --report                          # only the table anew

Workers answer after a while that is drawn for each question, and die at a share of them; the pool,
its order, its retries and its memory are those of a real search. Time is simulated, so a night of a
cluster passes as fast as the coordinator can keep up, which is what is measured: questions a second
of its own time. Messages are pickled as they are on their way to a process or an actor, and their
sizes told. Rows are kept in docs/results/cluster.jsonl, docs/results/cluster.md is the table.
"""

from __future__ import annotations

import argparse
import heapq
import pickle
import random
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from pruning import cpu_name
from rows import append, read
from seconds_and_memory import forget_peak, peak_mib

from prunezero.pruning.recipes.staged import load_recipe
from prunezero.searching.evaluation.request import Request
from prunezero.searching.workers.pool import WorkerPool
from prunezero.searching.workers.worker import Message

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
# Seconds that a question takes at least and at most.
QUICKEST, SLOWEST = 20.0, 60.0
LOADING = 90.0
# How many questions a search asks at once.
BATCH = 10_000

Row = dict[str, Any]


class Cluster:
    """Sham machines, as a launcher of a pool: their clock goes on only while the pool waits."""

    def __init__(self, dying: float, seed: int) -> None:
        self.now = 0.0
        self.loading = 10**6
        self.dying = dying
        self.random = random.Random(seed)
        self.speaking: list[tuple[float, int]] = []
        self.workers: dict[int, Sham] = {}
        self.bytes: list[int] = []
        self.deaths = 0

    def clock(self) -> float:
        """The simulated time."""
        return self.now

    def start(self, place: int) -> Sham:
        """A worker that loads for a while."""
        worker = Sham(self)
        self.workers[worker.handle] = worker
        worker.say(("ready", worker.handle), LOADING)
        return worker

    def wait(self, handles: Sequence[int], seconds: float) -> Collection[int]:
        """Who has something to say next; the clock goes on until then."""
        until = self.now + seconds
        while self.speaking and self.speaking[0][1] not in self.workers:
            heapq.heappop(self.speaking)
        if not self.speaking or self.speaking[0][0] > until:
            self.now = until
            return ()
        self.now, first = heapq.heappop(self.speaking)
        return {first}

    def close(self) -> None:
        """Nothing is held."""


class Sham:
    """A worker that computes nothing, slowly."""

    count = 0

    def __init__(self, cluster: Cluster) -> None:
        Sham.count += 1
        self.handle = Sham.count
        self._cluster = cluster
        self._message: bytes = b""

    def say(self, message: Message, seconds: float) -> None:
        """Have something to say in so many seconds."""
        self._message = pickle.dumps(message)
        heapq.heappush(self._cluster.speaking, (self._cluster.now + seconds, self.handle))

    def ask(self, request: Request) -> bool:
        """Take a question; the answer names it, so that the order can be checked."""
        cluster = self._cluster
        sent = pickle.dumps(request)
        number = pickle.loads(sent).trials
        dies = cluster.random.random() < cluster.dying
        cluster.deaths += dies
        answer = {"layer_error": number / 7, "seconds": 1.0, "number": number}
        self.say(
            ("died", "SIGKILL") if dies else ("answer", answer),
            cluster.random.uniform(QUICKEST, SLOWEST),
        )
        cluster.bytes = [len(sent), len(self._message)]
        return True

    def hear(self) -> Message:
        """What it has to say."""
        message: Message = pickle.loads(self._message)
        return message

    def kill(self) -> None:
        """It says nothing more."""
        self._cluster.workers.pop(self.handle, None)


def main() -> None:
    """Measure, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=1_000_000)
    parser.add_argument("--dying", type=float, default=0.05, help="share of questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    path = RESULTS / "cluster.jsonl"
    if not arguments.report:
        append(path, measured(arguments))
    text = "\n".join(report(read(path))) + "\n"
    path.with_suffix(".md").write_text(text)
    print(text)


def measured(arguments: argparse.Namespace) -> Row:
    """One search's worth of questions."""
    asked = Request.of(load_recipe("ria"))  # type: ignore[arg-type]  # one stage
    cluster = Cluster(arguments.dying, arguments.seed)
    workers = WorkerPool(cluster, arguments.workers)
    forget_peak()
    begin, busy = peak_mib(), time.process_time()
    faults, done = 0, 0
    peaks = []
    with mock.patch("prunezero.searching.workers.pool.time.monotonic", cluster.clock):
        while done < arguments.questions:
            count = min(BATCH, arguments.questions - done)
            requests = [Request((), asked.recipe, done + place) for place in range(count)]
            for place, answer in enumerate(workers.results(requests)):
                faults += "fault" in answer
                if answer.get("number", done + place) != done + place:
                    raise SystemExit(f"answer {done + place} came out of order: {answer}")
            done += count
            peaks.append(peak_mib() - begin)
    spent = time.process_time() - busy
    return {
        **{key: getattr(arguments, key) for key in ("workers", "questions", "dying", "seed")},
        "cpu": cpu_name(),
        "deaths": cluster.deaths,
        "faults": faults,
        "simulated_seconds": cluster.now,
        "coordinator_seconds": spent,
        "peak_after_tenth_mib": peaks[len(peaks) // 10],
        "peak_mib": peaks[-1],
        "question_bytes": cluster.bytes[0],
        "answer_bytes": cluster.bytes[1],
    }


def report(rows: list[Row]) -> list[str]:
    """The table as Markdown."""
    lines = [
        "# One coordinator and many workers",
        "",
        "Made by `python benchmarks/cluster.py`: sham workers that answer after "
        f"{QUICKEST:g} to {SLOWEST:g} simulated seconds and die at a share of the questions. "
        "Answers came in the order of the questions, all of them. A fault is a question over "
        "which two workers died. The coordinator is busy for a share of the time that the cluster "
        f"takes; memory is what it holds beside what it began with, for batches of {BATCH:,}.",
        "",
        "| workers | questions | deaths | faults | answers a second of its own time | "
        "share of the cluster's time | MiB after a tenth, in the end | bytes of a question, of an "
        "answer | processor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = row["questions"] / row["coordinator_seconds"]
        share = row["coordinator_seconds"] / row["simulated_seconds"]
        lines.append(
            f"| {row['workers']:,} | {row['questions']:,} | {row['deaths']:,} | {row['faults']:,} "
            f"| {rate:,.0f} | {100 * share:.1f} % | {row['peak_after_tenth_mib']:.0f}, "
            f"{row['peak_mib']:.0f} | {row['question_bytes']}, {row['answer_bytes']} | "
            f"{row['cpu']} |"
        )
    return lines


if __name__ == "__main__":
    main()
