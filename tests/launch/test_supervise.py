"""launch/supervise.py: a run whose ranks die goes on by itself, and stops when it is asked to."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from commands import ROOT, SMALL, TRAIN, environment, launcher, rows, run
from support.tiers import THOROUGH

from conf.compose import compose
from conf.environment import Environment
from launch import supervise
from launch.supervise import ranks_below

SUPERVISE = ROOT / "launch" / "supervise.py"
RUN = "runs/quickstart"
SLOW = (*SMALL, "train.steps=150", "checkpoint.every=10")
pytestmark = pytest.mark.slow


def wait_for(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Until a checkpoint of this step, or of a later one, is there."""
    end = time.monotonic() + 120
    names: list[str] = []
    while not any(int(name[5:]) >= step for name in names):
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        checkpoints = folder / RUN / "checkpoints"
        names = [entry.name for entry in checkpoints.glob("step_*")]
        time.sleep(0.02)


def test_ranks_that_die_and_a_stop(tmp_path: Path) -> None:
    """A SIGKILL of one rank: again from the checkpoint. SIGTERM: saved, 75, nobody left. And then to the end."""
    command = [sys.executable, SUPERVISE, "ranks=2", "backoff_s=0", *SLOW]
    env = environment(tmp_path / "cache")
    process = subprocess.Popen(
        [str(word) for word in command], cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for(tmp_path, 10, process)
    ranks_below(process.pid)[1].send_signal(signal.SIGKILL)
    time.sleep(1)
    before = max(int(entry.name[5:]) for entry in (tmp_path / RUN / "checkpoints").glob("step_*"))
    wait_for(tmp_path, before + 10, process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "supervise: ended with exit code" in said and "on 2 ranks from step" in said, said
    assert "goodput 0." in said and "1 restarts" in said and "resume=auto continues from there" in said, said
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in everyone)
    done = run(command, tmp_path, env)
    assert done.returncode == 0 and "goodput" in done.stdout, done.stdout + done.stderr
    training, _ = rows(tmp_path / RUN)
    assert [row["step"] for row in training] == list(range(1, 151))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (SMALL, "checkpoint.every=50"),
        ((*SLOW, "resume=auto"), "leave it out"),
        ((*SLOW, "restarts=many"), "restarts=10"),
        ((*SLOW, "train.stesp=3"), "train.steps"),
    ],
)
def test_bad_requests(words: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    done = run([sys.executable, SUPERVISE, "ranks=2", *words], tmp_path, environment(tmp_path / "cache"))
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr


def test_ranks_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    """Neither a supervisor, `deepspeed` itself nor the process that it starts may leave ranks; they save, and stop."""
    env = environment(tmp_path / "cache")
    for killed in ("supervisor", "launch", *(("runner",) if THOROUGH else ())):
        folder = tmp_path / killed
        folder.mkdir()
        command = [*launcher("deepspeed", 2), str(TRAIN), *SLOW]
        if killed == "supervisor":
            command = [sys.executable, str(SUPERVISE), "ranks=2", *SLOW]
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(folder, 10, process)
        children = psutil.Process(process.pid).children(recursive=True)
        launch = next(child for child in children if any("launcher.launch" in word for word in child.cmdline()))
        (launch if killed == "launch" else process).kill()
        _, left = psutil.wait_procs(children, timeout=40)
        assert not left, killed
        process.wait(30)
        newest = max(int(entry.name[5:]) for entry in (folder / RUN / "checkpoints").glob("step_*"))
        assert newest == max(row["step"] for row in rows(folder / RUN)[0]) < 150, "they went on to the end"


def test_a_rank_that_never_lives_is_given_up(tmp_path: Path) -> None:
    """Two starts in vain, and the run goes on with fewer ranks, to its end."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import os\nif os.environ.get('RANK') == '1':\n    os._exit(9)\n")
    env = environment(tmp_path / "cache", PYTHONPATH=str(site))
    done = run([sys.executable, SUPERVISE, "ranks=2", "backoff_s=0", *SMALL, "checkpoint.every=2"], tmp_path, env)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("supervise:") and "on" in line]
    assert ["on 2 ranks" in line for line in said[:2]] == [True, False] and "on 1 ranks" in said[1], done.stdout
    assert "2 restarts" in done.stdout
    assert [row["step"] for row in rows(tmp_path / RUN)[0]] == [1, 2, 3, 4]


def test_gpus_that_went_away_are_not_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start has as many ranks as there are GPUs, and as are legal, but no fewer than `least`."""
    words = ["+recipe=quickstart", "batch.micro_size=null", "batch.accumulation=1"]
    for gpus, least, expected in ((4, 1, 4), (3, 1, 2), (2, 1, 2), (1, 1, 1), (3, 3, 4)):
        monkeypatch.setattr(supervise, "detect", lambda gpus=gpus: Environment("cuda", gpus, bf16_supported=True))
        own = {"ranks": 4, "least": least, "restarts": 3, "backoff_s": 0}
        supervisor = supervise.Supervisor(words, own, compose([*words, "resume=auto"], 4))
        assert supervisor._left(4) == expected, gpus
