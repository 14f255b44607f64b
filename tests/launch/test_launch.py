"""``moetrain launch`` without a cluster: what it writes, what it refuses, and runs by torchrun on this machine.

The batch file is read by bash, its options as sbatch reads them; on a real Slurm it runs in test_slurm_cluster.py.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from moetrain_launch import array, slurm, torchrun
from moetrain_launch.job import Job, LaunchError, notes, write_note
from moetrain_launch.settings import LaunchConfig, SlurmConfig

from moetrain import cli
from moetrain.config import read

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
SMALL = [
    "experiment=demo",
    f"train.steps={STEPS}",
    "train.global_batch=4",
    "train.micro_batch=1",
    "train.eval_sequences=2",
    "train.eval_every=0",
    "train.threads=1",
    "checkpoint.every=5",
    "log.progress=false",
    "log.tensorboard=false",
    "export.at_end=false",
    "generate.prompts=[]",
    "model.dim=32",
    "model.n_layers=2",
]


class Became(Exception):
    """In place of becoming torchrun."""


def become(job: Job) -> None:
    raise Became(job)


def job(**settings: Any) -> Job:
    return Job(Path("/runs/My run #1"), ("moetrain.cli", "train"), LaunchConfig(kind="slurm", **settings))


def options(script: str) -> list[str]:
    """What sbatch takes from the head of a batch file, by the shell's rules for quotes."""
    return [shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_a_batch_file_says_what_was_asked_and_nothing_else(tmp_path: Path) -> None:
    own = SlurmConfig(
        partition="gpu", account="ab12", time="2-00:00:00", mem="500G", signal_s=600, extra=["--exclusive"]
    )
    full = slurm.script(
        job(nodes=4, ranks=8, gpus=8, cpus=12, slurm=own, env={"A": "it's $HOME"}, setup=["module load x"])
    )
    asked = options(full)
    for one in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--partition=gpu",
                "--account=ab12", "--time=2-00:00:00", "--mem=500G", "--signal=USR1@600", "--requeue", "--exclusive",
                "--job-name=my-run-1", "--output=/runs/My run #1/slurm.log", "--open-mode=append"):  # fmt: skip
        assert one in asked, asked
    least = slurm.script(job(slurm=SlurmConfig(signal_s=0)))
    assert not [
        o for o in options(least) if o.split("=")[0] in ("--partition", "--account", "--mem", "--signal", "--qos")
    ]
    for script in (full, least):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
        assert all(len(line) < 200 for line in script.splitlines())
    exported = next(line for line in full.splitlines() if line.startswith("export A="))
    shown = subprocess.run(["bash", "-c", f'{exported}\nprintf "%s" "$A"'], capture_output=True, text=True).stdout
    assert shown == "it's $HOME" and "\nmodule load x\n" in full


def test_containers() -> None:
    pyxis = slurm.script(job(container="moe.sqsh", mounts=["/data"]))
    assert (
        "--container-image=moe.sqsh --container-mounts=/data,/runs" in pyxis and "\n  python -m moetrain.cli" in pyxis
    )
    apptainer = slurm.script(job(container="moe.sif", gpus=8, slurm=SlurmConfig(container_with="apptainer")))
    assert "\n  apptainer exec --nv --bind /runs moe.sif python -m moetrain.cli" in apptainer


@pytest.mark.parametrize(
    ("time", "minutes"),
    [(30, 30), ("30", 30), ("30:30", 30.5), ("12:00:00", 720), ("2-0", 2880), ("2-12", 3600), ("1-02:30", 1590),
     ("1-02:30:30", 1590.5), ("UNLIMITED", float("inf"))],
)  # fmt: skip
def test_time_limits_are_read_as_in_sbatchs_manual(time: int | str, minutes: float) -> None:
    assert slurm.minutes(time) == minutes


@pytest.mark.parametrize(("text", "code"), [("12:00:00", 2), ("'12:00:00'", 0), ("1-12:00:00", 0), ("720", 0)])
def test_a_time_that_yaml_takes_for_a_number_is_refused(
    text: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "mine.yaml").write_text(f"kind: slurm\nslurm: {{time: {text}}}\n")
    assert cli.main(["launch", "--print", "--config-dir", str(tmp_path), "launch=mine"]) == code
    if code:
        assert "launch.slurm.time=43200 is 30 days in minutes; in a file put" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "deaf", "requeued"), [(85, 0, True), (85, 2, True), (85, 9, False), (2, 0, False), (0, 0, False)]
)
def test_the_batch_file_puts_the_job_back(code: int, deaf: int, requeued: bool, tmp_path: Path) -> None:
    """Run by bash. Slurm's programs are stood in for: srun ends with ``code``, squeue gives no answer ``deaf`` times.
    A line of the setup may use what is not set, as activating an environment does."""
    for name, body in {
        "srun": f"exit {code}",
        "squeue": f"echo >> asked; [ $(wc -l < asked) -gt {deaf} ] || exit 1; echo RUNNING",
        "scontrol": 'case "$*" in *hostnames*) echo n1;; *node*) echo "x NodeAddr=127.0.0.1 y";; '
        "requeue*) echo $* >> requeued;; esac",
        "sleep": "",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = slurm.script(job(setup=['echo "at $NOT_SET_ANYWHERE"']))
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(["bash"], input=script, text=True, cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == code and "at \n" in done.stdout, done
    assert (tmp_path / "requeued").exists() == requeued


@pytest.fixture
def login_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's programs as far as an array is made ready: sinfo names a partition, srun is there."""
    for name in ("sinfo", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho main\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.usefixtures("login_node")
def test_a_sweeps_array_asks_for_what_a_single_job_would(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    own = SlurmConfig(reservation="night", time="2-00:00:00", extra=["--exclusive", "--gres=gpu:h100:8"])
    executor = array.executor_of(tmp_path, job(ranks=2, cpus=12, python="/a b/python", slurm=own))
    asked = executor._make_submission_file_text("/bin/true", "0")
    single = options(slurm.script(job(ranks=2, cpus=12, slurm=own)))
    both = {"--reservation=night", "--exclusive", "--gres=gpu:h100:8", "--requeue", "--nodes=1"}
    assert both <= set(single) and both <= set(options(asked)), asked
    assert "--time=2880" in options(asked) and "--cpus-per-task=24" in options(asked)
    assert " --cpus-per-task=24 /bin/true" in asked
    assert executor._submitit_command_str.startswith("'/a b/python' ")


@pytest.mark.usefixtures("login_node")
@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("launch.slurm.time=UNLIMITED", "launch -m needs a time limit"),
        ("launch.slurm.time=3", "launch.slurm.signal_s=180 is not before the limit"),
        ("launch.slurm.time=2h", "is not a time limit"),
        ("launch.slurm.extra=[-x]", "launch -m takes options as --name or --name=value; got '-x'"),
        ("launch.nodes=2", "runs of one node each"),
    ],
)
def test_an_array_that_cannot_be_is_refused_before_anything_is_written(
    word: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    words = ["launch", "-m", "model=tiny", "seed=1,2", "launch=slurm", word, f"run_dir={tmp_path}/lr"]
    assert cli.main(words) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "lr").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("launch=slurm launch.slurm.time=2h", "launch.slurm.time=2h is not a time limit"),
        ("launch=slurm launch.slurm.time=3", "launch.slurm.signal_s=180 is not before the limit launch.slurm.time=3"),
        ("launch=slurm launch.slurm.partitoin=x", "did you mean launch.slurm.partition?"),
        ("launch=slrum", "no preset of launch is called 'slrum'"),
        (
            "launch=slurm",
            "sinfo was not found on this machine; run this on a login node of the cluster, write the file",
        ),
        ("launch=slurm launch.nodes=3 parallel.ep=2", "must divide the world size 3"),
        ("launch=slurm launch.nodes=3 launch.min_nodes=4 parallel.ep=2", "must divide the world size 3"),
        ("launch.nodes=2", "launch.nodes=2 needs launch.rendezvous=HOST:PORT"),
        ("launch.nodes=2 launch.min_nodes=1 parallel.ep=2 launch.rendezvous=a:1", "launch.min_nodes=1, on 1 nodes: "),
        ("launch=kubernetes", "lies on no claim"),
        ("launch=kubernetes launch.kubernetes.claims={d: /d} run_dir=/d/a", "kubectl was not found on this machine"),
        ("--resume nowhere", "--resume nowhere: there is no such folder"),
    ],
)
def test_what_cannot_start_is_one_line(
    words: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    given = [word.replace("{d:", "{d: ") for word in words.replace(": /d}", ":/d}").split()]
    assert cli.main(["launch", *given]) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("moetrain: error: ") and err.count("\n") == 1
    assert not list(tmp_path.rglob("launch*.json"))


def test_a_partition_is_looked_up_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """sinfo is stood in for by a script that says what it was asked; the real one is in the Slurm tests."""
    (tmp_path / "sinfo").write_text('#!/bin/sh\n[ "$*" = "--noheader --format=%R" ] && printf "main\nh100\nmain\n"\n')
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    assert cli.main(["launch", "launch=slurm", "launch.slurm.partition='main,gpu'", "run_dir=a"]) == 2
    says = "launch.slurm.partition=gpu: the cluster has no such partition; it has h100, main"
    assert capsys.readouterr().err == f"moetrain: error: {says}\n"
    assert not list((tmp_path / "cwd").iterdir())


def test_print_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["launch", "--print", "launch=slurm", "launch.nodes=2", "run_dir=a"]) == 0
    assert f"train --resume {tmp_path}/a\n" in capsys.readouterr().out
    assert cli.main(["launch", "--print", "launch.restarts=1", "run_dir=a"]) == 0
    assert "-m torch.distributed.run --nnodes=1 --nproc-per-node=1 --standalone" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", ["file/run", "/proc/run"])
def test_a_run_directory_that_cannot_be_written(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert cli.main(["launch", f"run_dir={at}"]) == 2
    err = capsys.readouterr().err
    assert "cannot be written: " in err and "choose another run_dir" in err and err.count("\n") == 1


def test_a_run_directory_with_another_run_or_one_at_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def started(*words: str) -> Job | None:
        """The job that this process would have become."""
        with pytest.raises(Became) as became:
            assert cli.main(["launch", *words]) != 0
            raise Became(None)
        return became.value.args[0]

    monkeypatch.setattr(torchrun, "run", become)
    assert started("run_dir=a", "seed=1") and read("a/config.yaml").seed == 1
    assert started("run_dir=a", "seed=2"), "it has not begun; another config may take its place"
    Path("a/checkpoints/step-1").mkdir(parents=True)
    assert started("run_dir=a", "seed=2"), "the same words go on with it"
    capsys.readouterr()
    assert not started("run_dir=a", "seed=3")
    assert "a already holds a run; continue it with --resume" in capsys.readouterr().err
    before = Path("a/config.yaml").read_text()
    job = started("--resume", "a", "train.steps=7")
    assert job and job.command[-2:] == ("--config", str(tmp_path / "a/config-next.yaml"))
    assert read(job.command[-1]).train.steps == 7
    assert Path("a/config.yaml").read_text() == before, "the ranks may find that they cannot go on with the other one"
    assert len(list(Path("a").glob("config-before-resume-*.yaml"))) == 1
    words = ["-c", "import time; time.sleep(60)", str(tmp_path / "a")]
    with subprocess.Popen([sys.executable, *words]) as other:
        write_note(tmp_path / "a", "local", str(other.pid), tmp_path / "a" / "log.txt")
        assert not started("--resume", "a")
        assert f"at work already: RUNNING as process {other.pid}" in capsys.readouterr().err
        other.kill()
    assert started("--resume", "a")


def test_status_of_what_is_half_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "status", str(tmp_path / "no")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert cli.main(["launch", "status", str(tmp_path)]) == 2
    assert "was not started by 'moetrain launch'" in capsys.readouterr().err
    write_note(tmp_path, "local", "1", tmp_path / "log.txt")  # process 1 is not this run
    assert cli.main(["launch", "status", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"ended on {socket.gethostname()}\nno step yet\n"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.25}\n{"step": 2, "lo')
    (tmp_path / "summary.json").write_text('{"exit_reason": "fin')
    assert cli.main(["launch", "status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("\nstep 1, loss 5.2500\n")
    (tmp_path / "metrics.jsonl").write_text("x" * 2**21 + '\n{"step": 8, "loss": null}\n{"step": 9, "loss": null}\n')
    tracemalloc.start()
    assert cli.main(["launch", "status", str(tmp_path)]) == 0
    assert tracemalloc.get_traced_memory()[1] < 2**22  # of the file it reads the end
    tracemalloc.stop()
    assert capsys.readouterr().out.endswith("\nstep 9, loss bad\n")
    assert cli.main(["launch", "logs", str(tmp_path)]) == 2
    assert "is not there yet" in capsys.readouterr().err
    (tmp_path / "log.txt").write_text("".join(f"{n}\n" for n in range(9)))
    assert cli.main(["launch", "logs", str(tmp_path), "-n", "2", "--follow"]) == 0
    assert capsys.readouterr().out == "7\n8\n"
    assert cli.main(["launch", "logs", str(tmp_path), "-n", "0"]) == 0
    assert capsys.readouterr().out == ""
    (tmp_path / "launch.json").write_text("{")
    with pytest.raises(LaunchError, match=r"launch.json cannot be read"):
        notes(tmp_path)


def test_logs_are_followed_on_every_machine_of_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whichever note comes first: that of a machine elsewhere says nothing about the run's end."""
    (tmp_path / "log.txt").write_text("first\n")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path)]) as here:
        write_note(tmp_path, "local", str(here.pid), tmp_path / "log.txt")
        note = json.loads((tmp_path / f"launch-{socket.gethostname()}.json").read_text())
        (tmp_path / "launch-0.json").write_text(json.dumps(note | {"host": "0"}))
        follow = threading.Thread(target=cli.main, args=(["launch", "logs", str(tmp_path), "--follow"],))
        follow.start()
        time.sleep(1.5)
        assert follow.is_alive()
        here.kill()
    follow.join(timeout=30)
    assert not follow.is_alive()
    assert capfd.readouterr().out == "first\n"


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "launch")),
        "OMP_NUM_THREADS": "1",
        "PET_RDZV_CONF": "last_call_timeout=1",  # seconds that torchrun waits for more machines than it needs; else 30
    }
    command = [sys.executable, "-m", "moetrain.cli", *words]
    with open(folder / "out.txt", "ab") as out:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out)


def until(what: Callable[[], object], folder: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, (folder / "out.txt").read_text()[-3000:]
        time.sleep(0.1)


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    assert process.wait(timeout=300) == 0, (folder / "out.txt").read_text()[-3000:]


def losses(run_dir: Path) -> list[tuple[int, float]]:
    file = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(row["step"], row["loss"]) for row in rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``moetrain train`` has gone through, on two ranks."""
    folder = tmp_path_factory.mktemp("launch")
    finish(start(folder, "train", *SMALL, "run_dir=straight"), folder)
    return folder


def test_a_cancelled_run_goes_on_by_the_same_words(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, words = straight / "again", ["launch", *SMALL, "run_dir=again"]
    process = start(straight, *words)
    until(lambda: list(run_dir.glob("checkpoints/step-*[05]")), straight)
    assert cli.main(["launch", "status", str(run_dir)]) == 0
    assert f"RUNNING as process {process.pid}" in capsys.readouterr().out
    assert cli.main(["launch", "cancel", str(run_dir)]) == 0
    assert process.wait(timeout=100) != 0 and len(losses(run_dir)) < STEPS
    finish(start(straight, *words), straight)
    assert losses(run_dir) == losses(straight / "straight")


def test_two_machines_meet_and_one_goes_on_alone_when_the_other_is_gone(straight: Path) -> None:
    """Elastic: two launchers, one rank each. The first may begin alone before the second comes, and then again with
    it. When the second is killed, with its rank, the first goes on alone, from the newest checkpoint to the end."""
    with socket.socket() as held:
        held.bind(("localhost", 0))
        port = held.getsockname()[1]
    run_dir = straight / "two"
    words = ["launch", *SMALL, "run_dir=two", "launch.nodes=2", "launch.ranks=1", "launch.min_nodes=1", "parallel.ep=1",
             f"launch.rendezvous=localhost:{port}", "train.steps=150"]  # fmt: skip
    first = start(straight, *words)
    until(lambda: (run_dir / "config.yaml").exists(), straight)
    second = start(straight, *words)
    log = run_dir / "log.txt"
    until(lambda: log.exists() and "dp 1x2" in log.read_text(), straight)
    until(lambda: list(run_dir.glob("checkpoints/step-*[05]")), straight)
    tree = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(second.pid)], capture_output=True, text=True
    ).stdout.split()
    for pid in [second.pid, *map(int, tree)]:
        os.kill(pid, signal.SIGKILL)
    second.wait()
    finish(first, straight)
    assert [step for step, _ in losses(run_dir)] == list(range(1, 151))
    assert "resumed from" in log.read_text().rpartition("dp 1x2")[2]
