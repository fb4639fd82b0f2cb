"""Proves that the numbers of README.md are those of the committed results, and that it has every script."""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmark" / "results"


def test_returns_are_those_of_the_results():
    """Each row: script (variant), environment, steps, mean (each seed), median seconds; no result is left out."""
    row = r"^\| `(\w+)\.py`(?: \((\w+)\))? \| ([\w-]+) \| ([\d,]+) \| (\S+) \((.*?)\) \| (\d+) \|$"
    rows = re.findall(row, README, re.MULTILINE)
    found = set()
    for script, variant, env, steps, mean, seeds, seconds in rows:
        name = f"{script}-{variant}" if variant else script
        files = sorted((RESULTS / env / name).glob("seed*.json"), key=lambda path: int(path.stem[4:]))
        runs = [json.loads(path.read_text()) for path in files]
        finals = [run["final_return"] for run in runs]
        assert f"--total-timesteps {steps.replace(',', '')} " in runs[0]["command"]
        assert [f"{x:.0f}".replace("-", "−") for x in finals] == seeds.split(", "), (name, env)
        assert mean == f"{statistics.mean(finals):.0f}".replace("-", "−"), (name, env)
        assert int(seconds) == round(statistics.median(run["seconds"] for run in runs)), (name, env)
        found.add((env, name))
    assert found == {(path.parent.parent.name, path.parent.name) for path in RESULTS.glob("*/*/seed*.json")}


def test_every_script_has_its_number_of_lines():
    rows = dict(re.findall(r"^\| `(\w+\.py)` \|.*?\| (\d+) \| [^|]*\|$", README, re.MULTILINE))
    assert rows == {path.name: str(len(path.read_text().splitlines())) for path in ROOT.glob("*.py")}
