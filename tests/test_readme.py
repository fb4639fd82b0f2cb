"""Proves that README.md and benchmark/README.md have the numbers of the results, and name what there is."""

import ast
import importlib
import json
import re
from pathlib import Path
from statistics import mean, median

import tyro

from benchmark import suite

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
README = (ROOT / "README.md").read_text()
BENCHMARK = (ROOT / "benchmark" / "README.md").read_text()
TEXT = " ".join(BENCHMARK.split())
RESULTS = ROOT / "benchmark" / "results"
REPORT = [line.strip("| ").split(" | ") for line in (RESULTS / "report.md").read_text().splitlines()]


def runs_of(env: str, name: str) -> list[dict]:
    files = sorted((RESULTS / env / name).glob("seed*.json"), key=lambda path: int(path.stem[4:]))
    return [json.loads(path.read_text()) for path in files]


def load(*names: str) -> dict:
    return json.loads(RESULTS.joinpath(*names).read_text())


def rows_of(pattern: str, text: str = BENCHMARK) -> list[tuple[str, ...]]:
    return re.findall(pattern, text, re.MULTILINE)


def assert_shown(runs: list[dict], average: str, seeds: str, seconds: str) -> None:
    finals = [run["final_return"] for run in runs]
    assert seeds.split(", ") == [f"{x:.0f}".replace("-", "−") for x in finals]
    assert average == f"{mean(finals):.0f}".replace("-", "−")
    assert int(seconds) == round(median(run["seconds"] for run in runs))


def test_returns_are_those_of_the_results():
    """Each row: mean (each seed), median seconds; of peers, here and there; ¹: not by the script's flags for a Box."""
    found = set()
    pattern = r"^\| `(\w+)\.py`(?: \((\w+)\))?( ¹)? \| ([\w-]+) \| ([\d,]+) \| (\S+) \((.*?)\) \| (\d+) \|$"
    for script, variant, mark, env, steps, *shown in rows_of(pattern):
        name = f"{script}-{variant}" if variant else script
        runs = runs_of(env, name)
        usual = (*suite.CONTINUOUS.values(), "")
        exception = script in suite.CONTINUOUS and not variant and suite.flags(script, env) not in usual
        assert mark == (" ¹" if exception else "")
        assert f"--total-timesteps {steps.replace(',', '')} " in runs[0]["command"]
        assert_shown(runs, *shown)
        found.add((env, name))
    pattern = r"^\| `(\w+)\.py` \| ([\w-]+)" + 2 * r" \| (\S+) \((.*?)\)" + r" \| (\d+) \| (\d+) \|$"
    for script, env, *ours_and_peers in rows_of(pattern):
        ours, peers = (ours_and_peers[i] for i in (0, 1, 4)), (ours_and_peers[i] for i in (2, 3, 5))
        assert_shown(runs_of(env, script), *ours)
        assert_shown(runs_of(env, f"sb3-{script}"), *peers)
        found.add((env, f"sb3-{script}"))
    assert found == {(path.parts[-3], path.parts[-2]) for path in RESULTS.glob("*/*/seed*.json")}


def test_what_the_settings_cost_is_that_of_the_results():
    keys = "steps", "script", "env", "setting"
    found = {tuple(row[key] for key in keys): row["returns"] for row in load("settings.json")}
    envs = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
    for steps, script in dict.fromkeys(key[:2] for key in found):
        cells = []
        for env in envs:
            tuned, ours = (mean(found[steps, script, env, each]) for each in ("tuned", "one setting"))
            peer = found.get((steps, script, env, "stable-baselines3"))
            cells.append(f"{tuned:.0f} → {ours:.0f}" + (f" ({mean(peer):.0f})" if peer else ""))
        assert f"| `{script}.py` | {' | '.join(cells)} |".replace("-", "−") in BENCHMARK
    for script in suite.CONTINUOUS:
        assert [found[1_000_000, script, env, "one setting"] for env in envs] == [
            [round(run["final_return"], 1) for run in runs_of(env, script)] for env in envs
        ]


def test_returns_on_other_environments_are_those_of_the_results():
    found = {(row["script"], row["env"]): row["returns"] for row in load("others.json")}
    for script in dict.fromkeys(script for script, _ in found if not script.startswith("sb3")):
        cells = []
        for env in suite.OTHERS:
            both = (found.get((name, env)) for name in (script, f"sb3-{script}-defaults"))
            ours, theirs = (returns and f"{mean(returns):.0f}" for returns in both)
            cells.append((ours or "") + (f" ({theirs})" if theirs else ""))
        assert f"| `{script}.py` | {' | '.join(cells)} |".replace("-", "−") in BENCHMARK.replace("-", "−")


def test_verdicts_are_those_of_the_report():
    words = ("beaten", "equal", "below")
    verdicts = {(row[1], row[0]): row[6] for row in REPORT if len(row) == 7 and row[6] in words}
    beaten, equal, below = ([pair for pair in verdicts if verdicts[pair] == x] for x in words)
    counts = f"in {len(beaten)} cases of {len(verdicts)}, equal within 95 % intervals in {len(equal)}"
    assert f"is beaten {counts}" in TEXT
    (named,) = re.findall(r"and ours is below in (.*?)\. ", TEXT)
    assert re.findall(r"`(\w+)\.py` on ([\w-]+)", named) == below


def test_speeds_are_those_of_the_results():
    """Each row: median steps a CPU second, and the ratio to stable-baselines3. None is left out."""
    found = set()
    for script, env, *cells in rows_of(r"^\| `(\w+)\.py`, ([\w-]+), [^|]*" + 6 * r"\|([^|]*)" + r"\|$"):
        figures = load("speed", f"{script}-{env}.json")["figures"]
        expected = []
        for name in ("bare", "acting", "eager", "compiled", "sb3", "cleanrl"):
            speed = f"{median(figures[name]['cpu']):,.0f}" if name in figures else ""
            ours = name in ("eager", "compiled") and speed
            expected.append(f"{speed} ({figures[name]['over_sb3'][1]:.2f} ×)" if ours else speed)
        assert [cell.strip() for cell in cells] == expected, (script, env)
        found.add(f"{script}-{env}")
    assert found == {path.stem for path in (RESULTS / "speed").glob("*.json")}


def test_speeds_on_a_gpu_are_those_that_were_measured():
    figures = load("gpu.json")["steps_per_second"].values()
    assert all(f" {speed:,}" in TEXT for speeds in figures for speed in speeds)


def test_sentences_are_those_of_the_results():
    ends, seeds = list(load("statistics", "trpo-Hopper-v5.json").values())[2:]
    seeds = [end for each in seeds.values() for end in each]
    rows = zip(("at full pace", "frozen", "slowing down [^|]*"), ends.values(), strict=True)
    assert all(rows_of(rf"^\| {name} \| {found['evaluations'][-1]:.0f} \|$") for name, found in rows)
    asked = (("off_policy_ac", 105), ("off_policy_ac", 300), ("ddpg", 105), ("ddpg", 120), ("ddpg", 300))
    old = [mean(run["evaluations"][f"{k}000"] for run in runs_of("HalfCheetah-v5", name)) for name, k in asked]
    for sentence in (
        "{:.0f}, {:.0f}, {:.0f} and {:.0f} at full pace, {:.0f}, {:.0f}, {:.0f} and {:.0f} now".format(*seeds),
        "`reparameterized` is at {:.0f} after 105,000 steps and at {:.0f} after 300,000, `ddpg.py` at {:.0f} "
        "(after 120,000 at {:.0f}) and {:.0f}.".format(*old),
    ):
        assert sentence in TEXT


def test_every_script_has_its_number_of_lines_and_every_tag_a_row():
    expected, row = set(), r'"((?:charts|losses|eval)/\w+)"'
    for path in SCRIPTS:
        lines = path.read_text().splitlines()
        rule = next(i for i, line in enumerate(lines) if line.startswith("# ----"))
        expected.add((path.name, f"{rule} + {len(lines) - rule}"))
    assert set(rows_of(r"^\| `(\w+\.py)` \|.*\| (\d+ \+ \d+) \|$", README)) == expected
    logged = set(re.findall(row, "".join(path.read_text() for path in SCRIPTS)))
    assert {*rows_of("^\\| " + row.replace('"', "`"), README), "eval/episodic_length"} == logged


def test_readme_is_short_and_its_results_are_those_of_the_report():
    assert len(README.split()) <= 1500
    assert len(rows_of(r"^\|", README)) <= 45
    rows = rows_of(r"^\| `(\w+)\.py` \| ([\w-]+) \| (\S+) \| (\S+) \((.*?)\) \| (\d+) \|$", README)
    published = {(row[1], row[0]): row[4:6] for row in REPORT if len(row) == 7}
    for script, env, ours, theirs, source, seconds in rows:
        runs = runs_of(env, script)
        assert ours == f"{mean(run['final_return'] for run in runs):.0f}".replace("-", "−")
        assert int(seconds) == round(median(run["seconds"] for run in runs))
        value, named = published[script, env]
        assert [theirs, source] == [value.partition(" ")[0].replace("-", "−"), named.partition(",")[0]]
    assert {row[0] for row in rows} == {path.stem for path in SCRIPTS}
    figures = load("speed", "ppo-HalfCheetah-v5.json")["figures"]
    assert "| {:,.0f} | {:,.0f} (stable".format(*(median(figures[x]["cpu"]) for x in ("compiled", "sb3"))) in README


def test_flags_files_and_code_that_are_shown_exist():
    sources = [*SCRIPTS, *(ROOT / "benchmark").glob("*.py")]
    fields = set(re.findall(r"^    (\w+): .* = ", "".join(path.read_text() for path in sources), re.MULTILINE))
    for flag in re.findall(r"(?<![\w-])--([a-z][a-z-]+)", README + BENCHMARK):
        assert flag.replace("-", "_").removeprefix("no_") in fields | {"help", "nproc_per_node", "logdir"}, flag
    for folder, text in ((ROOT, README), (ROOT / "benchmark", BENCHMARK)):
        assert all((folder / link).exists() for link in re.findall(r"\]\(([^)#]+)\)", text))
    (taste,) = re.findall(r"```python\n(def .*?)```", README, re.DOTALL)
    assert taste in (ROOT / "ppo.py").read_text()


def test_each_topic_of_the_lecture_has_its_function_and_flag():
    """A function or class of that name is in the file; a script takes the flags with their values."""
    rows = rows_of(r"^\| [^|`]+ \| `([\w/]+\.py)` \| `(\w+)` \|(?: `(.*)`)? \|$")
    assert len(rows) == len(BENCHMARK.partition("| topic |")[2].splitlines()) - 2 > 40
    for file, function, flags in rows:
        nodes = ast.walk(ast.parse((ROOT / file).read_text()))
        assert function in {getattr(node, "name", None) for node in nodes}, (file, function)
        if flags:
            tyro.cli(importlib.import_module(file.removesuffix(".py")).Args, args=flags.split())
