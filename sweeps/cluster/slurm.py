"""Jobs of a sweep as arrays of SLURM, through submitit.

submitit writes the batch file, starts the processes and tells them their place. What it does not do is here:
an answer to "was this submitted?" that survives the driver, arrays within the cluster's limit, one question
to the queue for all jobs, and jobs that are queued again when their process was killed from outside.
"""

from __future__ import annotations

import io
import os
import pwd
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError, JobPaths

from dp_lora.config.schema import ResourcesConfig
from dp_lora.errors import UserError
from sweeps.cluster.cells import Cell
from sweeps.cluster.ledger import Ledger, Submission
from sweeps.cluster.node import run_cell, write_report

SIGNAL = "USR2"
"""The signal that announces preemption and the time limit; NCCL has its own use for USR1."""

IN_FLIGHT_S = 15.0
"""How long an `sbatch` may still be on its way when its driver is dead."""

LAUNCH_FAILED = "PENDING (launch failed requeued held)"
"""A job that a node could not start, for no fault of its own; SLURM holds it until somebody releases it."""

NO_SUCH_NODE = "Requested node configuration is not available"

LIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "STAGE_OUT", "RESIZING", "SIGNALING")
"""States of a job that has not ended."""


class Slurm:
    """The cluster that this machine submits to.

    Args:
        ledger: of the sweep.
        max_parallel: jobs at the same time; null leaves it to the cluster.
        notice_s: seconds before the time limit at which a job is told to save.
        max_kills: how often a job that was killed from outside is queued again.
        python: shell words that start Python on a node.
    """

    def __init__(
        self, ledger: Ledger, max_parallel: int | None, notice_s: int, max_kills: int, python: str | None
    ) -> None:
        self.ledger, self.max_parallel = ledger, max_parallel
        self.notice_s, self.max_kills = notice_s, max_kills
        self._released: Counter[str] = Counter()
        # Until the job listens to it, the signal would end the process.
        ignoring = shlex.join(["sh", "-c", f'trap \'\' {SIGNAL}; exec "$0" "$@"'])
        self.python = f"{ignoring} {python or shlex.quote(sys.executable)}"

    @staticmethod
    def check(cells: Sequence[Cell]) -> None:
        """Raises UserError when this is no SLURM machine, or SLURM would refuse one of the requests.

        While nodes are down, `sbatch --test-only` refuses what `sbatch` itself queues until they are back.
        Then a request that fits no node is only refused, or held in the queue, when it is submitted.
        """
        use_box()
        if shutil.which("sbatch") is None:
            raise UserError(
                "hydra/launcher=slurm: this machine has no sbatch; expected a login node of a SLURM cluster "
                "(hydra/launcher=local runs the jobs here)"
            )
        for resources in {_key(cell.config.resources): cell.config.resources for cell in cells}.values():
            options = [f"--{k}={v}" if v is not True else f"--{k}" for k, v in _options(resources).items()]
            with _own_environment():
                said = _run(["sbatch", "--test-only", *options, "--wrap", "true"])
            if not said.returncode:
                continue
            if NO_SUCH_NODE in said.stderr and (down := _unavailable(resources.partition)):
                print(
                    f"dp-lora: SLURM cannot say now whether {describe(resources)} fits a node: {down} cannot "
                    "be used at the moment; the jobs wait for them in the queue",
                    file=sys.stderr,
                )
                continue
            raise UserError(f"resources: SLURM refuses {describe(resources)}: {_message(said.stderr)}")

    def settle(self) -> None:
        """Looks into submissions during which a driver died: adopts what SLURM has, gives up the rest."""
        for submission in self.ledger.open_submissions():
            while True:
                job = self._find(submission.name)
                if job is not None:
                    self._hand_over(submission, job)
                    break
                if time.time() - submission.made > IN_FLIGHT_S:
                    # An array that came even later would find no work, and end.
                    for index in range(len(submission.cells)):
                        self._pickle(submission, index).unlink(missing_ok=True)
                    self.ledger.give_up(submission)
                    break
                time.sleep(1)

    def submit(self, cells: Sequence[Cell]) -> Iterator[tuple[Submission, str]]:
        """Submits the cells, one array for each kind of resources; yields each array and what it asks for.

        Raises UserError with SLURM's message when it refuses; what was yielded before stays submitted.
        """
        arrays = _arrays(cells, self._largest_array())
        for group in arrays:
            resources = group[0].config.resources
            share = self._share(len(group), len(cells))
            yield self._submit_array(group, resources, share), describe(resources)

    def _share(self, size: int, total: int) -> int:
        """How many jobs of an array of `size` may run at the same time."""
        return size if self.max_parallel is None else max(1, self.max_parallel * size // total)

    def _submit_array(self, group: Sequence[Cell], resources: ResourcesConfig, share: int) -> Submission:
        for cell in group:
            self.ledger.freeze(cell)
            self.ledger.failure(cell.identity).unlink(missing_ok=True)
        submission = self.ledger.submitting([cell.identity for cell in group])
        for index, cell in enumerate(group):
            call = DelayedSubmission(run_cell, str(self.ledger.folder), cell.identity)
            call.set_timeout(resources.time_limit_min, 0)
            call.dump(self._pickle(submission, index))
        executor = self._executor(submission.name, resources)
        executor.parameters.update(array_parallelism=share, map_count=len(group))
        try:
            job = self._sbatch(executor)
        except UserError:
            self.ledger.give_up(submission)
            raise
        self._hand_over(submission, job)
        return submission

    def adopt(self, jobs: Mapping[str, Cell]) -> None:
        """Takes back jobs of an earlier driver: SLURM runs them as they are."""

    def fill(self) -> Iterator[tuple[Submission, str]]:
        """Starts what waits for the driver: nothing, SLURM has the whole sweep."""
        yield from ()

    def finally_report(self) -> None:
        """Submits the job that writes the report when all jobs of the sweep have ended, however they did."""
        arrays = sorted({job.partition("_")[0] for job in self.ledger.jobs().values()})
        kept = self.ledger.frozen(next(iter(self.ledger.jobs())))["config"]["resources"]
        # A hold is for the jobs; the report waits for them anyway.
        others = {name: value for name, value in kept["sbatch"].items() if name != "hold"}
        small = ResourcesConfig(
            cpus=1, memory_gb=2.0, time_limit_min=10, partition=kept["partition"], account=kept["account"],
            qos=kept["qos"], sbatch=others, setup=kept["setup"],
        )  # fmt: skip
        executor = self._executor(self.ledger.report_name, small)
        executor.update_parameters(dependency="afterany:" + ":".join(arrays))
        with _own_environment(), _passing_on():
            executor.submit(write_report, str(self.ledger.folder))

    def _hand_over(self, submission: Submission, array: str) -> None:
        """Gives each job of the array its work, and records it."""
        jobs = [f"{array}_{index}" for index in range(len(submission.cells))]
        for index, job in enumerate(jobs):
            paths = JobPaths(self.ledger.logs, job)
            if self._pickle(submission, index).exists():
                paths.move_temporary_file(self._pickle(submission, index), "submitted_pickle")
        self.ledger.submitted(submission, jobs)

    def _pickle(self, submission: Submission, index: int) -> Path:
        return self.ledger.logs / f"{submission.name}_{index}.pkl"

    def _executor(self, name: str, resources: ResourcesConfig) -> submitit.SlurmExecutor:
        executor = submitit.SlurmExecutor(self.ledger.logs, python=self.python)
        options = _options(resources)
        executor.update_parameters(
            job_name=name,
            time=options.pop("time"),
            signal_delay_s=self.notice_s,
            setup=list(resources.setup),
            teardown=self._teardown(),
            stderr_to_stdout=True,
            srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus}"],
            wckey=None,
            additional_parameters={**options, "requeue": True},
        )
        return executor

    def _teardown(self) -> list[str]:
        """Queues the job again when its process was killed (status 137), unless the job itself is over."""
        kills = shlex.quote(str(self.ledger.logs)) + '/"$job".kills'
        return [
            "code=$?",
            # The plain number of an array's last job means the whole array.
            "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
            "job=${job:-$SLURM_JOB_ID}",
            'if [ "$code" = 137 ] && scontrol show job "$job" | grep -q JobState=RUNNING; then',
            f"  echo killed >> {kills}",
            f'  if [ "$(wc -l < {kills})" -le {self.max_kills} ]; then',
            '    scontrol requeue "$job" && sleep 60',
            "  fi",
            "fi",
            'exit "$code"',
        ]

    @staticmethod
    def _sbatch(executor: submitit.SlurmExecutor) -> str:
        with _own_environment(), _passing_on():
            job = executor._submit_command(executor._submitit_command_str)
        return str(job.job_id)

    # What the cluster knows

    def live(self) -> dict[str, str] | None:
        """State, with the reason of those that wait, by job, of all jobs of this user that have not ended.

        None when SLURM does not answer just now.
        """
        said = _run(["squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%F_%K|%T|%r"])
        if said.returncode:
            return None
        found = {}
        for line in said.stdout.splitlines():
            job, state, reason = line.split("|", 2)
            found[job] = f"{state} ({reason})" if state == "PENDING" and reason != "None" else state
        return found

    def release(self, live: Mapping[str, str]) -> list[str]:
        """Releases the sweep's jobs that are held because a node failed to start them, and names them.

        As often as a killed job is queued again; after that a job stays held, for somebody to look into.
        """
        held = [job for job in self.ledger.jobs().values() if live.get(job) == LAUNCH_FAILED]
        released = []
        for job in held:
            if self._released[job] < self.max_kills and not _run(["scontrol", "release", job]).returncode:
                self._released[job] += 1
                released.append(job)
        return released

    def ended(self, jobs: Sequence[str]) -> dict[str, str]:
        """How each of these jobs ended, in SLURM's words; a job that it still calls live is left out."""
        found: dict[str, str] = {}
        arrays = ",".join(sorted({job.partition("_")[0] for job in jobs}))
        said = _run(["sacct", "-X", "-n", "-P", "-j", arrays, "-o", "JobID,State,ExitCode"])
        for line in said.stdout.splitlines():
            job, state, code = line.split("|")
            found[job] = state if code == "0:0" else f"{state}, exit code {code}"
        answer = {}
        for job in jobs:
            state = found.get(job) or self._shown_state(job)
            if not state.startswith((*LIVE, "REQUEUE", "SPECIAL_EXIT", "STOPPED")):
                answer[job] = state
        return answer

    @staticmethod
    def _shown_state(job: str) -> str:
        """The state for clusters without accounting: SLURM forgets it minutes after the end."""
        said = _run(["scontrol", "show", "job", "-o", job])
        words = dict(word.split("=", 1) for word in said.stdout.split() if "=" in word)
        return words.get("JobState", "gone from the queue")

    def log(self, job: str) -> Path:
        """The file with the output of the job's first process."""
        return JobPaths(self.ledger.logs, job).stdout

    def drop(self) -> set[str]:
        """Takes the sweep's jobs that wait off the cluster, and says which cells they were."""
        live = self.live() or {}
        waiting = {
            cell: job for cell, job in self.ledger.jobs().items() if live.get(job, "").startswith("PENDING")
        }
        if waiting and _run(["scancel", "--state=PENDING", *waiting.values()]).returncode == 0:
            return set(waiting)
        return set()

    def stop(self) -> str:
        """The message for a user who interrupts the driver."""
        names = " ".join(f"--name={name}" for name in self.ledger.submissions)
        return f"the jobs go on without the driver; scancel {names} ends them"

    @staticmethod
    def _find(name: str) -> str | None:
        """The number of the array of this name, running or ended."""
        user = str(os.getuid())
        for words in (
            ["squeue", "-h", "-u", user, "-n", name, "-o", "%F"],
            ["sacct", "-X", "-n", "-P", "-u", user, "-S", "now-30days", "--name", name, "-o", "JobID"],
        ):
            lines = _run(words).stdout.split()
            if lines:
                return lines[0].partition("_")[0]
        return None

    @staticmethod
    def _largest_array() -> int:
        for line in _run(["scontrol", "show", "config"]).stdout.splitlines():
            if line.startswith("MaxArraySize"):
                return max(1, int(line.split("=")[1]) - 1)
        return 1000


def use_box() -> None:
    """Makes SLURM's commands talk to the one that `make slurm-up` started, where there is no other."""
    user = pwd.getpwuid(os.getuid()).pw_name
    settings = Path(os.environ.get("SLURM_BOX", f"/var/tmp/slurm-box-{user}")) / "slurm.conf"
    elsewhere = "SLURM_CONF" in os.environ or Path("/etc/slurm/slurm.conf").exists()
    if not elsewhere and settings.exists() and settings.stat().st_uid == os.getuid():
        os.environ["SLURM_CONF"] = str(settings)


def _arrays(cells: Sequence[Cell], largest: int) -> list[list[Cell]]:
    """The cells by their resources, in parts of at most `largest`."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(_key(cell.config.resources), []).append(cell)
    return [
        group[start : start + largest] for group in groups.values() for start in range(0, len(group), largest)
    ]


def _key(resources: ResourcesConfig) -> str:
    """Equal for equal requests."""
    return repr((sorted(_options(resources).items()), resources.setup))


def _options(resources: ResourcesConfig) -> dict[str, Any]:
    """The options of sbatch, by their long names."""
    options: dict[str, Any] = {
        "time": resources.time_limit_min,
        "nodes": resources.nodes,
        "ntasks-per-node": resources.processes_per_node,
        "cpus-per-task": resources.cpus,
        "mem": f"{round(resources.memory_gb * 1024)}M",
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
    }
    if resources.gpus:
        options["gpus-per-node"] = resources.gpus
    extra = {name: value or True for name, value in resources.sbatch.items()}
    return {name: value for name, value in options.items() if value is not None} | extra


def describe(resources: ResourcesConfig) -> str:
    """The resources that are asked of SLURM, in the words of sbatch."""
    return " ".join(f"{name}={value}" for name, value in _options(resources).items())


def _unavailable(partition: str | None) -> str:
    """How many nodes of a partition, or of all, are down, drained or silent, in words; empty when none is."""
    words = ["sinfo", "-h", "-o", "%D|%T", *(["-p", partition] if partition else [])]
    lines = [line.split("|") for line in _run(words).stdout.splitlines() if line.count("|") == 1]
    fit = ("idle", "mixed", "allocated", "completing", "reserved", "planned")
    count = sum(int(number) for number, state in lines if state not in fit)
    return f"{count} node{'s' * (count != 1)}" if count else ""


def _message(stderr: str) -> str:
    """SLURM's own words, on one line."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in stderr.splitlines()]
    return "; ".join(line for line in lines if line) or "no reason given"


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The finished process; status 127 where there is no such program, 124 where it does not answer."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return subprocess.CompletedProcess(words, 127, "", f"{words[0]}: not found")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 124, "", f"{words[0]}: no answer in 60 s")


@contextmanager
def _own_environment() -> Iterator[None]:
    """Without the variables of a job in which the driver may run itself: its jobs would inherit them."""
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    hidden: Mapping[str, str] = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name not in kept
        and (name.startswith(("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")) or name in names)
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def _passing_on() -> Iterator[None]:
    """SLURM's refusal of a submission as an error of the user."""
    try:
        # submitit prints what it raises.
        with redirect_stderr(io.StringIO()):
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"sbatch: {' '.join(str(error).split())[-300:]}") from error
