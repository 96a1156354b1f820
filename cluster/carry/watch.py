"""Looks beside the training of one rank: is its node being drained, is the run still this command's, does it move."""

import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

from ray.train.v2._internal.execution.context import get_train_context

from cluster.carry.lease import RENEW_S
from cluster.carry.run import Assignment
from imgcls import storage
from imgcls.runs import End, Ending
from imgcls.training.world import Heartbeat


class Watch:
    """Whatever storage answers, `look` comes back, for `lease.repeated` to call it again.

    Where Train's watcher puts its notice it is read: `ray.train.get_preemption_info` asks every rank, and would wait for
    one that is gone.
    """

    def __init__(self, given: Assignment, rank: int, end: Callable[[Ending], None]) -> None:
        """end: puts on record how this rank's attempt ends."""
        self.given, self.rank, self.end = given, rank, end
        self.heartbeat, self.watched = Heartbeat(), threading.get_ident()
        self.notice = get_train_context().preemption_context
        self.leaving = self.lost = False
        self._looked_s = time.monotonic()

    def look(self) -> None:
        if not self.leaving and self.notice.preemption_info is not None:
            self.leaving = True
            with suppress(Exception), storage.within(RENEW_S):
                self.end(Ending(end=End.PREEMPTED))
        if self.rank == 0 and time.monotonic() - self._looked_s > RENEW_S:
            self._looked_s = time.monotonic()
            with suppress(Exception), storage.within(RENEW_S):
                self.lost = self.given.run.holder() != self.given.command
        # The rank that hangs is named before those that wait for it give up.
        waits, since_s = self.heartbeat.state or (False, math.inf)
        # What is waited for has limits of its own; where it has none, as a disk that hangs, this one holds.
        limit_s = (3 if waits else 0.9) * self.given.options.hang_timeout_s
        if time.monotonic() - since_s > limit_s:
            self._end_hung(f"hung: {'waited' if waits else 'busy with one batch'} for {limit_s:g} s")

    def _end_hung(self, error: str) -> None:
        """Ends this process, for Train to begin again."""
        trace = "".join(traceback.format_stack(sys._current_frames()[self.watched]))
        ending = Ending(end=End.CRASHED, error=error, step=self.heartbeat.step, trace=trace)
        recording = threading.Thread(target=self.end, args=(ending,), daemon=True)
        recording.start()
        recording.join(10)  # storage may be what hangs
        os._exit(1)
