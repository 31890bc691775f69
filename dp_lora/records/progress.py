"""How far a stage is: a bar on a terminal, plain lines elsewhere (in a SLURM log, for example)."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

from dp_lora.records.tracker import check_released

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows steps done, rate, time left and a few values of one stage; silent on all ranks but the first.

    Its stream is the owner's. Rate, time left and the total follow the sizes of the private batches, which no
    noise protects, so that a log of it is as private as the run directory and must not be released. The
    values obey the rule of `tracking` even so: on private data only what `tracking.RELEASED` names.

    Args:
        total: steps of the whole stage.
        description: the stage's name.
        initial: steps that an earlier start of this job has done.
        mode: `bar`, `lines`, `off`, or `auto`: a bar when `stream` is a terminal, else lines.
        unit: what one step is called.
        public: the stage sees public data only, so any value may be shown.
        rank: number of this process among those of the job; null takes RANK of the environment, else 0.
        stream: where to write; null takes stderr at the time of the call.
        clock: seconds that only grow, for tests.
    """

    def __init__(
        self,
        total: int,
        description: str,
        initial: int = 0,
        mode: str = "auto",
        *,
        unit: str = "step",
        public: bool = False,
        rank: int | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert mode in ("auto", "bar", "lines", "off"), mode
        assert 0 <= initial <= total, (initial, total)
        self.total, self.description, self.initial, self.unit = total, description, initial, unit
        self.done = initial
        self._public = public
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._mode = self._resolve(mode, rank)
        self._fields: dict[str, float] = {}
        self._bar: Any = None
        self._start = self._last_line = clock()

    def _resolve(self, mode: str, rank: int | None) -> str:
        if (rank if rank is not None else int(os.environ.get("RANK", "0"))) > 0:
            return "off"
        if mode == "auto":
            return "bar" if self._stream.isatty() else "lines"
        return mode

    def __enter__(self) -> Progress:
        self._start = self._last_line = self._clock()
        if self._mode == "bar":
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total,
                initial=self.initial,
                desc=self.description,
                unit=f" {self.unit}",
                file=self._stream,
                dynamic_ncols=True,
            )
        elif self._mode == "lines":
            resumed = f", resumed at {self.initial}" if self.initial else ""
            self._write(f"{self.description} {self.initial}/{self.total}{resumed}")
        return self

    def update(self, n: int = 1, **fields: float) -> None:
        """Counts `n` steps as done and takes `fields` as the latest values.

        Raises PrivateValueError when a field may not leave a private stage.
        """
        check_released(self.description, fields, public=self._public)
        self.done += n
        self._fields.update(fields)
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(_field_words(self._fields)), refresh=False)
            self._bar.update(n)
        elif self._mode == "lines" and self.done < self.total and self._line_is_due():
            self._last_line = self._clock()
            self._write(self._line(f"{duration(self._seconds_left())} left"))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._mode == "lines":
            ending = "stopped after" if kind is not None else "took"
            self._write(self._line(f"{ending} {duration(self._clock() - self._start)}"))

    def _line(self, when: str) -> str:
        words = [f"{self.description} {self.done}/{self.total}"]
        if self.done > self.initial:
            words.append(rate((self._clock() - self._start) / (self.done - self.initial), self.unit))
        return ", ".join([*words, when, *_field_words(self._fields)])

    def _line_is_due(self) -> bool:
        return self._clock() - self._last_line >= SECONDS_BETWEEN_LINES

    def _seconds_left(self) -> float:
        done_here = self.done - self.initial
        return (self.total - self.done) * (self._clock() - self._start) / done_here if done_here else 0.0

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def _field_words(fields: dict[str, float]) -> list[str]:
    return [f"{name.replace('_', ' ')} {value:.3g}" for name, value in fields.items()]


def rate(seconds_per_step: float, unit: str = "step") -> str:
    """Two significant digits of the time a step takes, or of the steps a second has when it has several.

    >>> rate(2.13), rate(0.004, "image")
    ('2.1 s/step', '250 images/s')
    """
    if seconds_per_step >= 1:
        return f"{_two_digits(seconds_per_step)} s/{unit}"
    return f"{_two_digits(1 / max(seconds_per_step, 1e-9))} {unit}s/s"


def _two_digits(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{float(f'{value:.2g}'):.0f}"


def duration(seconds: float) -> str:
    """Seconds as minutes:seconds, with hours in front when there are any.

    >>> duration(84), duration(3723)
    ('1:24', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
