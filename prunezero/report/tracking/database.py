"""Database in which MLflow keeps the records of a runs folder: where it is, whether it is ready."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from typing import Any

NETWORK_DISKS = ("nfs", "cifs", "smb", "9p", "fuse.", "lustre", "ceph", "gpfs", "beegfs", "afs")


def open_client(uri: str, runs_dir: Path) -> tuple[Any, str | None]:
    """A client of a tracking server or database, and where the artifacts of a new experiment go.

    None of a server, which knows best.
    """
    is_sqlite = uri.startswith("sqlite:///")
    if is_sqlite:
        prepare_database(Path(uri.removeprefix("sqlite:///").partition("?")[0]))
    from mlflow import MlflowClient

    # Creating the tables tells one line per table, which no user asked for.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    artifacts = (runs_dir / "artifacts").as_uri() if is_sqlite else None
    return MlflowClient(tracking_uri=uri), artifacts


def prepare_database(path: Path) -> None:
    """Create the database's folder and, on a local disk, turn on write-ahead logging for good.

    Write-ahead logging makes one recorded run about twice as fast; it needs shared memory, which
    network disks do not have.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_network_disk(path.parent):
        return
    connection = sqlite3.connect(path, timeout=20)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


def is_network_disk(folder: Path, mounts: Path = Path("/proc/mounts")) -> bool:
    """Whether the folder lies on a network file system; False where the system does not say."""
    try:
        rows = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return False
    folder = folder.resolve()
    holding = [row for row in rows if len(row) > 2 and folder.is_relative_to(row[1])]
    kind = max(holding, key=lambda row: len(row[1]))[2] if holding else ""
    return kind.startswith(NETWORK_DISKS)
