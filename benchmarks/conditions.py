"""Under which conditions recipes are measured: options that several measurements share."""

from __future__ import annotations

import argparse
import os

from prunezero.pruning.testbed import Settings


def add_conditions(
    parser: argparse.ArgumentParser, *, calibration_tokens: int, evaluation_tokens: int
) -> None:
    """Draws, sizes of text, threads, and whether only the table is made anew."""
    parser.add_argument("--draws", type=int, default=3, help="of calibration text")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--calibration-tokens", type=int, default=calibration_tokens)
    parser.add_argument("--evaluation-tokens", type=int, default=evaluation_tokens)
    parser.add_argument("--test-tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report", action="store_true")


def settings_of(arguments: argparse.Namespace, seed: int) -> Settings:
    """The sizes that were asked for, of one draw of calibration text."""
    return Settings(
        arguments.sequence_length,
        arguments.calibration_tokens,
        arguments.evaluation_tokens,
        arguments.test_tokens,
        seed,
    )
