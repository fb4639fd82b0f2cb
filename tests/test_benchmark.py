"""Proves that a sweep survives kills and failures, that its report has the right numbers, that any agent can be played.

Tests that need more than requirements.txt are skipped where benchmark/requirements.txt is not installed.
"""

import fcntl
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from benchmark import peers, play, published, report, run, speed, suite

ROOT = Path(__file__).resolve().parent.parent


def needs(*packages: str) -> None:
    """Skips the test where one is missing."""
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is in benchmark/requirements.txt alone", exc_type=ImportError)


def folders(path: Path) -> dict[str, str]:
    return {"runs": str(path / "runs"), "results": str(path / "results")}


def job(path: Path, script: str = "a2c", env: str = "CartPole-v1", **flags: Any) -> run.Job:
    """One run in a folder of its own."""
    return run.Job(run.Args(**folders(path), **flags), script, env, 1)


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """python -m benchmark.run as a process; none is left over."""
    words = [f"--{name}={value}" for name, value in folders(tmp_path).items()]
    started = []

    def start(*flags: str, **env: str) -> subprocess.Popen:
        line = [sys.executable, "-m", "benchmark.run", "--jobs", "1", *words, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(line, cwd=ROOT, env=os.environ | env, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.communicate()


def result(finals: list[float], evaluations: dict[str, float] | None = None) -> list[dict]:
    """Results of runs that end with these returns."""
    one = {"versions": {"torch": "1"}, "seconds": 10, "steps_per_second": 100, "diagnostics": {}}
    one |= {"command": "python ppo.py --env-id CartPole-v1 --seed 1 --total-timesteps 1000"}
    curve = evaluations or {"500": 0.0}
    return [one | {"final_return": x, "max_return": x, "evaluations": curve | {"1000": x}} for x in finals]


# ------------------------------------------------------------------------------------------------------------ the suite


def test_no_flags_are_all_scripts_on_the_small_suite() -> None:
    jobs = run.Args().list_jobs()
    pairs = {(job.script, job.env) for job in jobs}
    assert pairs == {(s, e) for s in suite.SCRIPTS for e in suite.CLASSIC} - {("ddpg", e) for e in suite.DISCRETE}
    assert len(jobs) == 5 * len(pairs)
    assert {path.stem for path in ROOT.glob("*.py")} == set(suite.SCRIPTS)


def test_peers_and_suites_are_chosen_by_flags() -> None:
    jobs = run.Args(suite="mujoco", scripts=("ppo",), peers=True, seeds=(3,)).list_jobs()
    assert {(job.script, job.env) for job in jobs} == {(s, e) for s in ("ppo", *suite.PEERS) for e in suite.MUJOCO}


@pytest.mark.parametrize("env", [*suite.CLASSIC, *suite.MUJOCO])
@pytest.mark.parametrize("script", [*suite.SCRIPTS, *suite.VARIANTS, *suite.PEERS])
def test_commands_are_accepted(script: str, env: str) -> None:
    """By the parser of the script; a peer has the budget and the evaluation of the script it is compared with."""
    words = suite.command(script, env, seed=7)
    if script in suite.PEERS:
        flags = tyro.cli(peers.Args, args=[*words[2:], "--run-dir", "x"])
        other = suite.command(flags.algorithm, env, seed=7)
        assert words[-4:] == other[-4:]
        assert words[words.index("--total-timesteps") + 1] == other[other.index("--total-timesteps") + 1]
    else:
        flags = tyro.cli(importlib.import_module(words[0].removesuffix(".py")).Args, args=words[1:])
    assert (flags.env_id, flags.seed, flags.eval_every) == (env, 7, flags.total_timesteps // 20)


def test_committed_results_are_those_of_the_suite() -> None:
    """Not of flags that were changed since."""
    for path in run.RESULTS.glob("*/*/seed*.json"):
        command = suite.command(path.parts[-2], path.parts[-3], int(path.stem[4:]))
        assert json.loads(path.read_text())["command"] == shlex.join(["python", *command]), path


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["--scripts", "pop"], "pop"), (["--jobs", "0"], "--jobs"), (["--steps", "100"], "--results")],
)
def test_bad_flags(flags: list[str], word: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as error:
        tyro.cli(run.Args, args=flags)
    assert error.value.code == 2
    assert word in capsys.readouterr().err


def test_dry_run_prints_what_is_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = run.Args(**folders(tmp_path), scripts=("ppo", "sb3-ppo"), envs=("CartPole-v1",), seeds=(1, 2), dry_run=True)
    done = args.list_jobs()[0]
    done.target.parent.mkdir(parents=True)
    done.target.write_text("{}")
    run.main(args)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:4] for line in lines] == [
        ["-m", "benchmark.peers", "--algorithm"], ["ppo.py", "--env-id", "CartPole-v1"],
        ["-m", "benchmark.peers", "--algorithm"],
    ]  # fmt: skip
    assert [line.endswith("--resume") for line in lines] == [False, True, False]
    assert not (tmp_path / "runs").exists()


# -------------------------------------------------------------------------------------------------------- one run's log


def test_result_of_a_log_with_known_answers(tmp_path: Path) -> None:
    """200 steps: in the 100 bins of two steps each the mean of the returns that ended there."""
    one = job(tmp_path)
    with SummaryWriter(str(one.directory)) as writer:
        for step in range(1, 201):
            writer.add_scalar("charts/episodic_return", float(step), step)
        for step, value in ((100, 7.0), (150, 9.0), (200, 8.0)):
            writer.add_scalar("eval/episodic_return", value, step)
            writer.add_scalar("charts/SPS", 10 * value, step)
            writer.add_scalar("losses/entropy", -value, step)
    found = run.result_of(one, seconds=12.34)
    assert (found["final_return"], found["max_return"], found["steps_per_second"], found["seconds"]) == (8, 9, 80, 12.3)
    assert found["evaluations"] == {100: 7.0, 150: 9.0, 200: 8.0}
    assert found["training_returns"][2] == 1  # step 1 alone: step 2 opens the next bin
    assert found["training_returns"][4] == 2.5
    assert found["training_returns"][200] == 199  # 198, 199, and the last step
    assert found["diagnostics"] == {"losses/entropy": {102: -7.0, 152: -9.0, 200: -8.0}}
    assert shlex.split(found["command"])[1:] == one.command
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_result_of_a_run_in_which_no_episode_ended(tmp_path: Path) -> None:
    one = job(tmp_path)
    with SummaryWriter(str(one.directory)) as writer:
        for tag in ("eval/episodic_return", "charts/SPS"):
            writer.add_scalar(tag, 5.0, 10)
    found = run.result_of(one, seconds=1)
    assert (found["final_return"], found["training_returns"]) == (5, {})


def test_seconds_of_the_parts_of_a_killed_run(tmp_path: Path) -> None:
    for part, times in enumerate(([1000, 1004, 1030], [5000, 5012], [])):
        with (tmp_path / f"events.out.tfevents.{part}").open("wb") as file:
            writer = RecordWriter(file)
            for wall_time in times:
                writer.write(Event(wall_time=wall_time, step=1).SerializeToString())
    assert run.seconds_before(tmp_path) == 30 + 12


def test_fraction_done_is_that_of_the_last_line(tmp_path: Path) -> None:
    one = job(tmp_path)
    assert run.fraction_done(one) == 0
    one.directory.mkdir(parents=True)
    one.directory.with_suffix(".log").write_text("x\n  9%  step 9  1 steps/s\n 45%  step 45  1 steps/s\nevaluated 88%")
    assert run.fraction_done(one) == 0.45


def test_expected_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known pairs by their own rate, unknown ones by that of their script, unknown scripts by that of all."""
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    for env, script, seconds in (("CartPole-v1", "a2c", 10), ("Pendulum-v1", "a2c", 30), ("CartPole-v1", "ppo", 50)):
        (tmp_path / env / script).mkdir(parents=True)
        (tmp_path / env / script / "seed1.json").write_text(json.dumps(result([1])[0] | {"seconds": seconds}))
    pairs = [("a2c", "CartPole-v1"), ("a2c", "Acrobot-v1"), ("npg", "CartPole-v1")]
    jobs = [job(tmp_path, script, env, steps=2000) for script, env in pairs]
    assert list(run.expected_seconds(jobs).values()) == pytest.approx([20, 40, 60])


# ------------------------------------------------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def small_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of a few seconds, two that succeed and one that cannot."""
    path = tmp_path_factory.mktemp("sweep")
    args = run.Args(**folders(path), scripts=("a2c", "ppo"), envs=("CartPole-v1",), seeds=(1,), steps=2000)
    jobs = [*args.list_jobs(), run.Job(args, "ppo", "Nowhere-v0", 1)]
    outcomes = {o.job: o for done in run.run_locally(jobs, 1) for o in done}
    assert [outcomes[j].failed for j in jobs] == [False, False, True]
    assert "exited with 2" in outcomes[jobs[-1]].text
    assert "ppo: --env-id Nowhere-v0" in outcomes[jobs[-1]].text.splitlines()[-1]
    report.write_hparams(report.load(path / "results"), path / "runs" / "hparams")
    return path


def test_a_failing_run_does_not_stop_the_others(small_sweep: Path) -> None:
    results = report.load(small_sweep / "results")
    assert {env: list(scripts) for env, scripts in results.items()} == {"CartPole-v1": ["a2c", "ppo"]}
    for runs in results["CartPole-v1"].values():
        (one,) = runs
        assert max(map(int, one["evaluations"])) >= 2000


def test_a_run_waits_for_a_process_that_outlived_its_sweep(tmp_path: Path) -> None:
    """Which holds the lock of its log; when it is gone the result that it left is found."""
    one = job(tmp_path)
    one.directory.mkdir(parents=True)
    outcomes: list[run.Outcome] = []
    with one.directory.with_suffix(".log").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: outcomes.append(run.run(one)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        one.target.parent.mkdir(parents=True)
        one.target.write_text("{}")
    thread.join(10)
    assert outcomes == [run.Outcome(one, False, "there already")]


def wait_for(path: Path, pattern: str, process: subprocess.Popen) -> None:
    """Until the file has the pattern, while the process lives."""
    for _ in range(1200):
        if path.exists() and re.search(pattern, path.read_text()):
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    pytest.fail(f"{path} has no {pattern}: {process.communicate()[0]}")


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path: Path, sweep: Callable) -> None:
    """Stopped by SIGTERM, its run writes a checkpoint; killed outright, its run lives on, and is not run twice."""
    needs("tqdm", "matplotlib", "rliable")
    flags = ("--scripts", "a2c", "ppo", "--envs", "CartPole-v1", "--seeds", "1", "--steps", "60000")
    directory = tmp_path / "runs" / "CartPole-v1"
    first = sweep(*flags)
    wait_for(directory / "a2c" / "seed1.log", r"10%  step", first)
    first.send_signal(signal.SIGTERM)
    out = first.communicate(timeout=300)[0]
    assert first.returncode == 143, out
    assert "the same command goes on" in out
    log = (directory / "a2c" / "seed1.log").read_text()
    stopped = re.search(r"stopped at step ([\d,]+)", log)
    assert stopped, log
    assert not (directory / "ppo").exists()

    second = sweep(*flags)
    wait_for(directory / "ppo" / "seed1.log", r"10%  step", second)
    a2c = tmp_path / "results" / "CartPole-v1" / "a2c" / "seed1.json"
    finished = a2c.stat().st_mtime_ns
    second.kill()
    second.communicate(timeout=60)

    third = sweep(*flags)
    out = third.communicate(timeout=600)[0]
    assert third.returncode == 0, out
    assert a2c.stat().st_mtime_ns == finished
    assert f"from step {stopped[1]}" in (directory / "a2c" / "seed1.log").read_text()
    starts = re.findall(r"from step ([\d,]+), ", (directory / "ppo" / "seed1.log").read_text())
    assert starts[0] == "0"
    assert all(start == "60,416" for start in starts[1:])  # only to find that nothing is left
    for script in ("a2c", "ppo"):
        found = json.loads((tmp_path / "results" / "CartPole-v1" / script / "seed1.json").read_text())
        assert len(found["evaluations"]) in (19, 20)  # the signal ends an evaluation that is under way
    assert (tmp_path / "results" / "report.md").exists()


@pytest.mark.slow
def test_ray(tmp_path: Path, sweep: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a local cluster: the same results as without it, a failing run among them; a home of its own for its files."""
    needs("tqdm", "matplotlib", "rliable", "ray")
    (tmp_path / "home").mkdir()
    flags = ("--scripts", "ppo", "--envs", "CartPole-v1", "Nowhere-v0", "--seeds", "1", "--steps", "1000")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    process = sweep(*flags, "--executor", "ray", HOME=str(tmp_path / "home"), RAY_worker_niceness="0")
    out = process.communicate(timeout=600)[0]
    assert process.returncode == 1, out
    assert "ppo Nowhere-v0 seed 1: FAILED: it exited with 2" in out
    assert "1 of 2 runs failed" in out
    there = json.loads((tmp_path / "results" / "CartPole-v1" / "ppo" / "seed1.json").read_text())
    here = job(tmp_path / "here", "ppo", steps=1000)
    run.run(here)
    assert there["evaluations"] == json.loads(here.target.read_text())["evaluations"]


# ----------------------------------------------------------------------------------------------------------- the report


def test_steps_to_a_threshold() -> None:
    one = {"evaluations": {"100": 1.0, "200": 5.0, "300": 4.0, "400": 9.0}}
    assert [report.steps_to(one, threshold) for threshold in (0, 5, 6, 10)] == [100, 200, 400, float("inf")]


def test_figure_to_beat() -> None:
    """The highest within the budget, else the one with the fewest steps."""
    assert published.figure_to_beat("ddpg", "HalfCheetah-v5", 300_500).value == 9137
    assert published.figure_to_beat("ddpg", "Hopper-v5", 300_000).value == 1241
    assert published.figure_to_beat("off_policy_ac", "CartPole-v1", 100_000).steps == 200_000
    assert published.figure_to_beat("ppo", "HalfCheetah-v5", 1_001_472).value == 5819
    assert published.figure_to_beat("npg", "Pendulum-v1", 100_000) is None
    low, high = published.Figure(100, "CleanRL", std=10, runs=4).interval
    assert (low, high) == pytest.approx((90.2, 109.8))
    for script, figures in published.PUBLISHED.items():
        assert script in suite.SCRIPTS
        assert all(figure.source in published.SOURCES for env in figures for figure in figures[env])


def test_iqm_is_that_of_rliable() -> None:
    needs("rliable")
    from rliable.metrics import aggregate_iqm

    for runs in range(1, 10):
        scores = np.random.default_rng(runs).normal(size=(runs, 1, 4))
        assert report.iqm(scores) == pytest.approx([aggregate_iqm(scores[..., k]) for k in range(4)])
    assert report.iqm(np.array([1.0, 2, 3, 4, 1000]).reshape(5, 1, 1)) == pytest.approx(3)


def test_interval_of_curves_with_known_answers() -> None:
    """At common steps, up to the end of the shortest curve; all the same, the interval has no width."""
    needs("rliable")
    curves = [{"100": 0.0, "200": 10.0}, {"100": 0.0, "200": 10.0, "400": 99.0}]
    steps, mean, low, high = report.interval(curves, points=4)
    assert steps.tolist() == [50, 100, 150, 200]
    assert mean.tolist() == low.tolist() == high.tolist() == [0, 0, 5, 10]
    spread = [{"10": float(x)} for x in range(20)]
    _, mean, low, high = report.interval(spread, points=1)
    assert mean == pytest.approx(9.5)
    assert 4 < low < 8 < 11 < high < 15  # the deviation of this mean is about 1.9
    again = report.interval(spread, points=1)
    assert (low, high) == (again[2], again[3])


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((80, 90), "beaten"), ((94, 94), "beaten"), ((99, 99), "equal"), ((90, 97), "equal"), ((106, 120), "below")],
)
def test_verdict(interval: tuple[float, float], expected: str) -> None:
    """Seeds 95 to 105: their mean cannot be below 95, nor above 105."""
    needs("rliable")
    assert report.verdict(result([95, 100, 105, 97, 103]), interval)[0] == expected


def test_probability_of_improvement() -> None:
    """1 if all of ours end higher, ½ if all are equal; over two environments the mean of both."""
    needs("rliable")
    high, low, mixed = result([3, 4, 5]), result([0, 1, 2]), result([1, 4, 9])
    assert report.improvement([high], [low]) == (1, 1, 1)
    assert report.improvement([low], [high]) == (0, 0, 0)
    assert report.improvement([high], [high])[0] == 0.5
    assert report.improvement([high], [mixed])[0] == pytest.approx((3 + 1 + 0.5 + 0) / 9, abs=0.06)
    assert report.improvement([high, low], [low, high])[0] == 0.5


def test_report_of_a_part_of_a_sweep(tmp_path: Path) -> None:
    """One seed of one script, then a peer beside it, then an environment that the suite has not."""
    needs("rliable", "matplotlib")
    for step, (env, name, finals) in enumerate(
        [("CartPole-v1", "ppo", [480.0]), ("CartPole-v1", "sb3-ppo", [100.0, 200.0]), ("Own-v0", "ppo", [1.0, 2.0])]
    ):
        folder = tmp_path / "results" / env / name
        folder.mkdir(parents=True)
        for seed, one in enumerate(result(finals), 1):
            (folder / f"seed{seed}.json").write_text(json.dumps(one))
        report.main(report.Args(**folders(tmp_path)))
        text = (tmp_path / "results" / "report.md").read_text()
        assert (tmp_path / "results" / "curves.png").exists()
        assert (tmp_path / "results" / "peers.png").exists() == ("peers.png" in text) == (step > 0)
        assert "| CartPole-v1 | 475 | ppo | 1 of 1 | 1,000 | 10 |" in text
        assert "| RL Zoo, 100,000 steps | (one seed) |" in text
    assert "| ppo | sb3-ppo | CartPole-v1 | 480 | 150.0 | 1.00 [1.00, 1.00] |" in text
    assert "| Own-v0 | ppo | 1,000 | 1.5 [1.0, 2.0] |  | none published |  |" in text
    assert "trust_regions" not in text
    assert not (tmp_path / "runs").exists()


def test_trust_regions_are_compared_at_equal_budgets(tmp_path: Path) -> None:
    """On Acrobot-v1 PPO has three times the steps of the others."""
    needs("matplotlib")
    curve = {"500": 0.02, "1000": 0.01}
    run = result([3.0])[0] | {"diagnostics": {"losses/kl": curve, "losses/approx_kl": curve}}
    three = {script: [run] for script in ("npg", "trpo", "ppo")}
    assert not report.draw_trust_regions({"Acrobot-v1": three}, tmp_path / "acrobot.png")
    assert report.draw_trust_regions({"Hopper-v5": three}, tmp_path / "hopper.png")


def test_the_committed_report_is_that_of_the_committed_results() -> None:
    needs("rliable")
    figures = [path.name for path in run.RESULTS.glob("*.png")]
    assert report.text(report.load(run.RESULTS), figures) == (run.RESULTS / "report.md").read_text()


# ---------------------------------------------------------------------------------------------------------- TensorBoard


@pytest.fixture(scope="module")
def board(small_sweep: Path) -> Iterator[str]:
    """TensorBoard on the runs of the sweep; its address."""
    line = [sys.executable, "-m", "tensorboard.main", "--logdir", str(small_sweep / "runs"), "--port", "0"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        address = next(found[1] for text in process.stdout if (found := re.search(r"(http://\S+:\d+)", text)))
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=60)


def ask(address: str, path: str, until: Any, body: dict | None = None, **query: str) -> Any:
    """What it answers, as soon as it has read enough of the logs."""
    url = f"{address}/data/plugin/{path}?{urllib.parse.urlencode(query)}"
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    for _ in range(300):
        with urllib.request.urlopen(request, timeout=30) as answer:
            found = json.load(answer)
        if until(found):
            break
        time.sleep(0.2)
    return found


def test_tensorboard_overlays_the_runs_of_a_sweep(board: str, small_sweep: Path) -> None:
    """By environment and script, with the same tags, of which each has the values of the result."""
    runs = [f"CartPole-v1/{script}/seed1" for script in ("a2c", "ppo")]
    common = {"charts/episodic_return", "charts/SPS", "eval/episodic_return", "losses/policy_loss", "losses/entropy"}
    tags = ask(board, "scalars/tags", lambda found: all(common <= found.get(name, {}).keys() for name in runs))
    assert all(common <= tags[name].keys() for name in runs), tags
    for name in runs:
        found = json.loads((small_sweep / "results" / f"{name}.json").read_text())["evaluations"]
        points = ask(board, "scalars/scalars", bool, run=name, tag="eval/episodic_return")
        assert {str(step): value for _, step, value in points} == pytest.approx(found, abs=1e-3)


def test_tensorboard_has_the_hyperparameters_of_the_sweep(board: str, small_sweep: Path) -> None:
    """A session for each run, with all of its flags and its returns."""
    body = {"experimentName": "", "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING"]}
    body |= {"colParams": [], "startIndex": 0, "sliceSize": 10}
    found = ask(board, "hparams/session_groups", lambda x: len(x.get("sessionGroups", [])) == 2, body)
    groups = {group["hparams"]["script"]: group for group in found["sessionGroups"]}
    assert groups.keys() == {"a2c", "ppo"}
    assert groups["ppo"]["hparams"]["clip_coef"] == 0.2  # a default
    assert {"env": "CartPole-v1", "total_timesteps": 2000, "seed": 1}.items() <= groups["a2c"]["hparams"].items()
    for script, group in groups.items():
        values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        run_ = json.loads((small_sweep / "results" / "CartPole-v1" / script / "seed1.json").read_text())
        assert values["hparams/final_return"] == pytest.approx(run_["final_return"])
    runs = small_sweep / "runs" / "CartPole-v1"
    kinds = {path.name.split(".")[0] for path in runs.glob("*/seed1/*")}
    assert kinds == {"events", "checkpoint"}


# ----------------------------------------------------------------------------------------------- playing, and the peers


@pytest.mark.parametrize("script", suite.SCRIPTS)
def test_play_of_each_script_is_its_own_evaluation(script: str, tmp_path: Path) -> None:
    env = "Pendulum-v1" if script == "ddpg" else "CartPole-v1"
    module = importlib.import_module(script)
    flags = {"env_id": env, "total_timesteps": 300, "eval_episodes": 3, "run_dir": str(tmp_path / "run")}
    last = module.train(module.Args(**flags))
    returns, recorder = play.play(play.Args(str(tmp_path / "run"), episodes=3))
    assert np.mean(returns) == pytest.approx(last["eval/episodic_return"])
    assert sum(recorder.arrays["rewards"]) == pytest.approx(sum(returns))
    assert sum(recorder.arrays["ends"]) == 3


def test_play_makes_a_gif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    import ppo

    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    ppo.train(ppo.Args(total_timesteps=300, eval_episodes=0, run_dir=str(tmp_path / "run")))
    gif, record = tmp_path / "x.gif", tmp_path / "x.npz"
    play.main(play.Args(str(tmp_path / "run"), episodes=2, gif=str(gif), max_frames=10, width=120, record=str(record)))
    with Image.open(gif) as image:
        assert image.size == (120, 80)
        assert 5 <= image.n_frames <= 10
        assert len(image.getcolors()) > 1
    assert np.load(record)["ends"].sum() == 2


@pytest.mark.parametrize(("content", "words"), [(None, "does not exist"), (b"not one", "is damaged")])
def test_play_of_no_checkpoint(
    content: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if content:
        (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(SystemExit) as error:
        play.main(play.Args(str(tmp_path)))
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


def test_peers_are_evaluated_as_scripts_are(tmp_path: Path) -> None:
    """The same policy has the same return and length in both."""
    import ppo

    torch.manual_seed(3)
    evaluations = []
    for seed in (5, 6):
        args = ppo.Args(total_timesteps=64, num_envs=1, seed=seed, eval_episodes=7, run_dir=str(tmp_path / f"{seed}"))
        result = ppo.train(args)
        evaluations.append((result["eval/episodic_return"], result["eval/episodic_length"]))
        with ExitStack() as stack:
            agent = ppo.Agent(ppo.Envs(stack, args, 1), args)
        agent.load_state_dict(torch.load(tmp_path / f"{seed}" / "checkpoint.pt", weights_only=True)["agent"])
        act = agent.in_numpy()
        model = SimpleNamespace(
            get_vec_normalize_env=lambda: None, predict=lambda obs, deterministic, act=act: (act(obs, 0), None)
        )
        assert peers.evaluate(model, "CartPole-v1", seed=seed, episodes=7) == pytest.approx(evaluations[-1])
    assert evaluations[0] != pytest.approx(evaluations[1])


@pytest.mark.parametrize("script", suite.PEERS)
def test_a_peer_writes_what_a_script_writes(script: str, tmp_path: Path) -> None:
    needs("stable_baselines3", "sb3_contrib")
    env = "Pendulum-v1" if script == "sb3-ddpg" else "CartPole-v1"
    peers.train(peers.Args(str(tmp_path / "runs" / env / script / "seed1"), script[4:], env, 1, 1200, 400, 2))
    found = run.result_of(job(tmp_path, script, env), 1.0)
    assert all(step % 400 < 1024 for step in found["evaluations"])
    assert len(found["evaluations"]) in (2, 3)
    assert max(found["evaluations"]) >= 1200
    assert found["training_returns"]
    assert found["steps_per_second"] > 0
    assert found["versions"].keys() >= {"stable-baselines3", "sb3-contrib"}


@pytest.mark.parametrize(("script", "env", "first"), [("ddpg", "Pendulum-v1", 1000), ("ppo", "CartPole-v1", 512)])
def test_speed_is_that_of_steps_with_updates(script: str, env: str, first: int) -> None:
    """From the end of the first iteration that has one; and the seconds are split into parts of the whole."""
    needs("psutil", "stable_baselines3")
    stamps, clock = speed.measure(speed.Args(script=script, env_id=env, steps=2048), "split")
    assert stamps[0][0] == first
    assert 0 <= stamps[-1][0] - stamps[0][0] - 2048 < 1024
    seconds = stamps[-1][1] - stamps[0][1]
    assert clock.keys() == {"environment", "environment and bookkeeping", "acting"}
    assert 0 < clock["environment"] < clock["environment and bookkeeping"]
    assert 0 < clock["environment and bookkeeping"] + clock["acting"] < seconds


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")  # so does the zoo for InvertedPendulum
@pytest.mark.parametrize(("algorithm", "env"), peers.ZOO)
def test_settings_of_the_zoo_are_accepted(algorithm: str, env: str) -> None:
    needs("stable_baselines3", "sb3_contrib")
    assert env in (*suite.CLASSIC, *suite.MUJOCO)
    model = peers.make(algorithm, env, 1, **peers.ZOO[algorithm, env])
    assert model.gamma == peers.ZOO[algorithm, env].get("gamma", 0.99)
