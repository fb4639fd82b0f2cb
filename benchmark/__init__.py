"""Runs the scripts through their command lines; compares, times, draws and plays what comes of it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
