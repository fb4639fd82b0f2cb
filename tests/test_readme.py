"""Proves that the numbers of README.md are those of the committed results, and that it has every script."""

import json
import re
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TEXT = " ".join(README.split())
RESULTS = ROOT / "benchmark" / "results"


def runs_of(env: str, name: str) -> list[dict]:
    """The committed results, in the order of the seeds."""
    files = sorted((RESULTS / env / name).glob("seed*.json"), key=lambda path: int(path.stem[4:]))
    return [json.loads(path.read_text()) for path in files]


def load(*names: str) -> dict:
    return json.loads(RESULTS.joinpath(*names).read_text())


def rows_of(pattern: str) -> list[tuple[str, ...]]:
    return re.findall(pattern, README, re.MULTILINE)


def assert_shown(runs: list[dict], average: str, seeds: str, seconds: str) -> None:
    finals = [run["final_return"] for run in runs]
    assert seeds.split(", ") == [f"{x:.0f}".replace("-", "−") for x in finals]
    assert average == f"{mean(finals):.0f}".replace("-", "−")
    assert int(seconds) == round(median(run["seconds"] for run in runs))


def test_returns_are_those_of_the_results():
    """Each row: mean (each seed), median seconds; of peers, here and there. None is left out."""
    found = set()
    pattern = r"^\| `(\w+)\.py`(?: \((\w+)\))? \| ([\w-]+) \| ([\d,]+) \| (\S+) \((.*?)\) \| (\d+) \|$"
    for script, variant, env, steps, *shown in rows_of(pattern):
        name = f"{script}-{variant}" if variant else script
        runs = runs_of(env, name)
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


def test_verdicts_are_those_of_the_report():
    rows = [line.strip("| \n").split(" | ") for line in (RESULTS / "report.md").read_text().splitlines()]
    words = ("beaten", "equal", "below")
    verdicts = {(row[1], row[0]): row[6] for row in rows if len(row) == 7 and row[6] in words}
    beaten, equal, below = ([pair for pair in verdicts if verdicts[pair] == x] for x in words)
    counts = f"in {len(beaten)} cases of {len(verdicts)}, equal within 95 % intervals in {len(equal)}"
    assert f"is beaten {counts}" in TEXT
    (named,) = re.findall(r"and ours is below in (.*?)\. ", TEXT)
    assert re.findall(r"`(\w+)\.py` on ([\w-]+)", named) == below


def test_speeds_are_those_of_the_results():
    """Each row: median steps a CPU second, and the ratio to stable-baselines3. None is left out."""
    found = set()
    for script, env, *cells in rows_of(r"^\| `(\w+)\.py`, ([\w-]+), [^|]*" + 5 * r"\|([^|]*)" + r"\|$"):
        figures = load("speed", f"{script}-{env}.json")["figures"]
        expected = []
        for name in ("cleanrl", "sb3", "eager", "compiled", "bare"):
            speed = f"{median(figures[name]['cpu']):,.0f}" if name in figures else ""
            ours = name in ("eager", "compiled") and speed
            expected.append(f"{speed} ({figures[name]['over_sb3'][1]:.2f} ×)" if ours else speed)
        assert [cell.strip() for cell in cells] == expected, (script, env)
        found.add(f"{script}-{env}")
    assert found == {path.stem for path in (RESULTS / "speed").glob("*.json") if path.stem.count("-") == 2}


def test_sentences_are_those_of_the_results():
    minutes, seconds = divmod(load("statistics", "sweep-classic.json")["seconds"], 60)
    assert f"which took {minutes:.0f} min {seconds:.0f} s" in TEXT
    threads = load("speed", "threads-ddpg-HalfCheetah-v5.json")["figures"]
    one, two = (f"{median(threads[name]['wall']):.0f}" for name in ("eager", "two_threads"))
    assert f"`--num-threads 2` brings {two} steps a second in place of {one}" in TEXT
    races = [load("speed", f"race-ppo-{env}.json")["figures"] for env in ("CartPole-v1", "HalfCheetah-v5")]
    pole, cheetah = [
        {side: [mean(run[x] for run in runs) for x in ("seconds", "steps")] for side, runs in race.items()}
        for race in races
    ]
    assert (
        f"475 on CartPole-v1 after {pole['ours'][0]:.2f} s of training, that of stable-baselines3 after "
        f"{pole['sb3'][0]:.2f} s (mean of {len(races[0]['ours'])} seeds); at 2000 on HalfCheetah-v5 after "
        f"{cheetah['ours'][0]:.1f} s ({round(cheetah['ours'][1], -3):,.0f} steps), compilation included, and "
        f"after {cheetah['sb3'][0]:.0f} s ({round(cheetah['sb3'][1], -3):,.0f} steps; "
        f"mean of {len(races[1]['ours'])} seeds)"
    ) in TEXT
    runs = {script: runs_of("HalfCheetah-v5", script) for script in ("off_policy_ac", "ddpg")}
    asked = (("off_policy_ac", 105), ("off_policy_ac", 300), ("ddpg", 105), ("ddpg", 120), ("ddpg", 300))
    old = [f"{mean(run['evaluations'][f'{k}000'] for run in runs[script]):.0f}" for script, k in asked]
    assert (
        f"`reparameterized` is at {old[0]} after 105,000 steps and at {old[1]} after 300,000, `ddpg.py` at "
        f"{old[2]} (after 120,000 at {old[3]}) and {old[4]}."
    ) in TEXT


def test_every_script_has_its_number_of_lines():
    """Those above the rule + those below it."""
    expected = set()
    for path in ROOT.glob("*.py"):
        lines = path.read_text().splitlines()
        rule = next(i for i, line in enumerate(lines) if line.startswith("# ----"))
        expected.add((path.name, f"{rule} + {len(lines) - rule}"))
    assert set(rows_of(r"^\| `(\w+\.py)` \|.*\| (\d+ \+ \d+) \|$")) == expected
