"""What signals ask for, on a machine of one's own and on a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from dp_lora.training.signals import Interrupted, Leave, Preempted, listening

CLUSTER = """
import os, signal, sys
from dp_lora.training.signals import Leave, Preempted, expect_preemption, listening
expect_preemption(signal.SIGUSR2)
os.kill(os.getpid(), signal.SIGTERM)
with listening() as requests:
    os.kill(os.getpid(), signal.SIGTERM)
    assert requests.save and requests.leave is Leave.NO
    os.kill(os.getpid(), signal.SIGUSR2)
    assert requests.leave is Leave.PREEMPTED
    os.kill(os.getpid(), signal.SIGINT)
    sys.exit(3)
"""
BETWEEN = """
import os, signal, sys
from dp_lora.training.signals import Preempted, expect_preemption
expect_preemption(signal.SIGUSR2)
try:
    os.kill(os.getpid(), signal.SIGUSR2)
except Preempted:
    sys.exit(4)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_to_leave_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with listening() as requests:
        assert requests.leave is Leave.NO
        os.kill(os.getpid(), number)
        assert requests.leave is Leave.STOPPED and not requests.save
    assert signal.getsignal(number) is before
    assert type(requests.leave.error("x")) is Interrupted
    assert type(Leave.PREEMPTED.error("x")) is Preempted


def test_on_a_cluster_the_end_is_announced_and_does_not_come_early() -> None:
    # After a preemption was announced, Ctrl-C leaves at once, as it does the second time anywhere.
    done = subprocess.run([sys.executable, "-c", CLUSTER], capture_output=True, text=True)
    assert done.returncode != 3 and "KeyboardInterrupt" in done.stderr, done.stderr
    assert "AssertionError" not in done.stderr


def test_preemption_between_two_trainings_leaves_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", BETWEEN], capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
