"""The command line that all benches share."""

from __future__ import annotations

import argparse

import torch

from bench.ours import MIB, ours
from bench.provider import Provider
from bench.rivals import rivals

GPU_BUDGETS = (1024 * MIB, 2048 * MIB)
CPU_BUDGETS = (64 * MIB, 256 * MIB)  # CPU shapes are smaller: one that they do not fit in, first


def parser(doc: str) -> argparse.ArgumentParser:
    """Options of a bench; `doc` is its docstring, whose first line is its question."""
    found = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "gpu" if torch.cuda.is_available() else "cpu"
    found.add_argument("--size", default=default, choices=("tiny", "cpu", "gpu"), help="shapes")
    found.add_argument(
        "--only", default="", help="providers whose name holds one of these, comma-separated"
    )
    found.add_argument(
        "--repeats",
        type=int,
        default=5 if default == "gpu" else 3,
        help="rounds of timing; what the library promises gets at least 10",
    )
    found.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop measuring after this"
    )
    found.add_argument(
        "--resume", action="store_true", help="measure only what the saved report lacks"
    )
    found.add_argument("--no-plot", action="store_true", help="write no PNG")
    return found


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def all_providers() -> list[Provider]:
    """Ours, then everyone else's, with the budgets of this device."""
    return ours(GPU_BUDGETS if torch.cuda.is_available() else CPU_BUDGETS) + rivals()


def chosen(providers: list[Provider], only: str) -> list[Provider]:
    """Those whose name holds one of the comma-separated pieces of `only`; all if it is empty."""
    pieces = [piece.strip().lower() for piece in only.split(",") if piece.strip()]
    return [p for p in providers if not pieces or any(piece in p.name.lower() for piece in pieces)]
