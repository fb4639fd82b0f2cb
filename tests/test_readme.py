"""Proves that the numbers of README.md are those of the committed results, and that it has every script."""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmark" / "results"


def runs_of(env: str, name: str) -> list[dict]:
    """The committed results, in the order of the seeds."""
    files = sorted((RESULTS / env / name).glob("seed*.json"), key=lambda path: int(path.stem[4:]))
    return [json.loads(path.read_text()) for path in files]


def assert_shown(runs: list[dict], mean: str, seeds: str, seconds: str) -> None:
    finals = [run["final_return"] for run in runs]
    assert seeds.split(", ") == [f"{x:.0f}".replace("-", "−") for x in finals]
    assert mean == f"{statistics.mean(finals):.0f}".replace("-", "−")
    assert int(seconds) == round(statistics.median(run["seconds"] for run in runs))


def test_returns_are_those_of_the_results():
    """Each row: script (variant), environment, steps, mean (each seed), median seconds; no result is left out."""
    row = r"^\| `(\w+)\.py`(?: \((\w+)\))? \| ([\w-]+) \| ([\d,]+) \| (\S+) \((.*?)\) \| (\d+) \|$"
    found = set()
    for script, variant, env, steps, *shown in re.findall(row, README, re.MULTILINE):
        name = f"{script}-{variant}" if variant else script
        runs = runs_of(env, name)
        assert f"--total-timesteps {steps.replace(',', '')} " in runs[0]["command"]
        assert_shown(runs, *shown)
        found.add((env, name))
    names = {(path.parent.parent.name, path.parent.name) for path in RESULTS.glob("*/*/seed*.json")}
    assert found == {(env, name) for env, name in names if not name.startswith("sb3-")}


def test_returns_of_peers_are_those_of_the_results():
    """Each row: script, environment, mean (each seed) here and there, median seconds here and there; none left out."""
    row = r"^\| `(\w+)\.py` \| ([\w-]+) \| (\S+) \((.*?)\) \| (\S+) \((.*?)\) \| (\d+) \| (\d+) \|$"
    found = set()
    for script, env, mean, seeds, peer_mean, peer_seeds, seconds, peer_seconds in re.findall(row, README, re.MULTILINE):
        assert_shown(runs_of(env, script), mean, seeds, seconds)
        assert_shown(runs_of(env, f"sb3-{script}"), peer_mean, peer_seeds, peer_seconds)
        found.add((env, f"sb3-{script}"))
    assert found == {(path.parent.parent.name, path.parent.name) for path in RESULTS.glob("*/sb3-*/seed*.json")}


def test_verdicts_are_those_of_the_report():
    rows = [line.strip("| \n").split(" | ") for line in (RESULTS / "report.md").read_text().splitlines()]
    verdicts = {(row[1], row[0]): row[6] for row in rows if len(row) == 7 and row[6] in ("beaten", "equal", "below")}
    beaten, equal, below = ([pair for pair in verdicts if verdicts[pair] == x] for x in ("beaten", "equal", "below"))
    text = " ".join(README.split())
    assert f"is beaten in {len(beaten)} cases of {len(verdicts)}, equal within 95 % intervals in {len(equal)}" in text
    (named,) = re.findall(r"and ours is below in (.*?)\. ", text)
    assert re.findall(r"`(\w+)\.py` on ([\w-]+)", named) == below


def test_seconds_of_the_sweep_are_those_of_the_results():
    minutes, seconds = divmod(json.loads((RESULTS / "statistics" / "sweep-classic.json").read_text())["seconds"], 60)
    assert f"which took {minutes:.0f} min {seconds:.0f} s" in " ".join(README.split())


def test_speeds_are_those_of_the_results():
    """Each row: median steps a CPU second, and the ratio to stable-baselines3 in brackets; no result is left out."""
    row = r"^\| `(\w+)\.py`, ([\w-]+), [^|]*" + 5 * r"\|([^|]*)" + r"\|$"
    found = set()
    for script, env, *cells in re.findall(row, README, re.MULTILINE):
        figures = json.loads((RESULTS / "speed" / f"{script}-{env}.json").read_text())["figures"]
        expected = []
        for name in ("cleanrl", "sb3", "eager", "compiled", "bare"):
            speed = f"{statistics.median(figures[name]['cpu']):,.0f}" if name in figures else ""
            ours = name in ("eager", "compiled") and speed
            expected.append(f"{speed} ({figures[name]['over_sb3'][1]:.2f} ×)" if ours else speed)
        assert [cell.strip() for cell in cells] == expected, (script, env)
        found.add(f"{script}-{env}")
    assert found == {path.stem for path in (RESULTS / "speed").glob("*.json") if path.stem.count("-") == 2}
    threads = json.loads((RESULTS / "speed" / "threads-ddpg-HalfCheetah-v5.json").read_text())["figures"]
    one, two = (f"{statistics.median(threads[name]['wall']):.0f}" for name in ("eager", "two_threads"))
    assert f"`--num-threads 2` brings {two} steps a second in place of {one}" in " ".join(README.split())


def test_seconds_to_a_return_are_those_of_the_results():
    files = [RESULTS / "speed" / f"race-ppo-{env}.json" for env in ("CartPole-v1", "HalfCheetah-v5")]
    races = [json.loads(path.read_text())["figures"] for path in files]
    pole, cheetah = (
        {side: [statistics.mean(run[x] for run in race[side]) for x in ("seconds", "steps")] for side in race}
        for race in races
    )
    sentence = (
        f"475 on CartPole-v1 after {pole['ours'][0]:.2f} s of training, that of stable-baselines3 after "
        f"{pole['sb3'][0]:.2f} s (mean of {len(races[0]['ours'])} seeds); at 2000 on HalfCheetah-v5 after "
        f"{cheetah['ours'][0]:.1f} s ({round(cheetah['ours'][1], -3):,.0f} steps), compilation included, and after "
        f"{cheetah['sb3'][0]:.0f} s ({round(cheetah['sb3'][1], -3):,.0f} steps; mean of {len(races[1]['ours'])} seeds)"
    )
    assert sentence in " ".join(README.split())


def test_every_script_has_its_number_of_lines():
    """Those above the rule + those below it."""
    rows = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+ \+ \d+) \|$", README, re.MULTILINE))
    expected = {}
    for path in ROOT.glob("*.py"):
        lines = path.read_text().splitlines()
        rule = next(i for i, line in enumerate(lines) if line.startswith("# ----"))
        expected[path.name] = f"{rule} + {len(lines) - rule}"
    assert rows == expected


def test_old_data_has_the_returns_of_the_results():
    first, second, *ddpg = re.search(
        r"`reparameterized` is at (\d+) after 105,000 steps and at (\d+) after 300,000, `ddpg.py` at (\d+) "
        r"\(after 120,000 at (\d+)\) and (\d+)\.",
        " ".join(README.split()),
    ).groups()

    def mean(script: str, steps: str) -> str:
        return f"{statistics.mean(run['evaluations'][steps] for run in runs_of('HalfCheetah-v5', script)):.0f}"

    assert [first, second] == [mean("off_policy_ac", steps) for steps in ("105000", "300000")]
    assert ddpg == [mean("ddpg", steps) for steps in ("105000", "120000", "300000")]
