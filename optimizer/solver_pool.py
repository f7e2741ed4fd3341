"""The children of one planner: one at work, and in quiet times a warm spare that takes over when it is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from optimizer.solver_process import ChildLostError, SolverProcess

QUICK_DEATH_S = 5.0  # a child that ends sooner than this counts as unable to start
MAX_RESTART_WAIT_S = 60.0
START_PATIENCE_S = 20.0  # loading a solver takes some seconds where the machine is busy


class SolverPool:
    """Starts, replaces and ends children. ``command`` None: there are none.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, command: Sequence[str] | None, clock: Callable[[], float]) -> None:
        self.child: SolverProcess | None = None
        self._command = None if command is None else list(command)
        self._clock = clock
        self._spare: SolverProcess | None = None
        self._dying: list[SolverProcess] = []
        self._started_s = 0.0
        self._quick_deaths = 0
        self._restart_s = clock()

    @property
    def spare_is_warm(self) -> bool:
        """Whether a child that is lost now has a successor that need not warm up."""
        return self._spare is not None and self._spare.ready

    def ensure(self) -> None:
        """Start a child unless there is one, or the last ones died too quickly."""
        if self._command is None or self.child is not None or self._clock() < self._restart_s:
            return
        self._started_s = self._clock()
        self.child = self._start()

    def rest(self) -> None:
        """Nothing is asked: notice who got warm or died, and start what is missing."""
        self.bury()
        self.ensure()
        self.hear_idle()
        ready = self.child is not None and self.child.ready
        if self._spare is None and ready and self._clock() >= self._restart_s:
            self._spare = self._start()

    def hear_idle(self) -> None:
        """Notice that a child got warm, or that it died between two questions."""
        if self._spare is not None:
            try:
                self._spare.listen(0.0)
            except ChildLostError:
                self._end(self._spare)
                self._spare = None
                self._wait_before_restart()
        if self.child is not None:
            try:
                self.child.listen(0.0)
            except ChildLostError:
                self.lose()

    def answered(self) -> None:
        """The child works."""
        self._quick_deaths = 0

    def replace(self) -> None:
        """End the child, whatever it does; the spare or a fresh one takes its place."""
        if self.child is not None:
            self._end(self.child)
            self.child = None
        self._promote_spare()
        self.ensure()

    def late(self) -> None:
        """The child did not answer in time: end it, unless it is still starting, which would only begin again.

        What it was asked it never gets to see.
        """
        if self.child is not None:
            self.child.forget()
        starting = self.child is not None and not self.child.ready and not self.spare_is_warm
        if not (starting and self._clock() - self._started_s < START_PATIENCE_S):
            self.replace()

    def lose(self) -> None:
        """The child ended by itself: clear it away; start another, later and later if it never lives long."""
        if self._clock() - self._started_s < QUICK_DEATH_S:
            self._wait_before_restart()
        self.replace()

    def bury(self) -> None:
        """Killed children are waited for when they have ended, not before: a plan may be due."""
        self._dying = [child for child in self._dying if not child.gone()]

    def close(self) -> None:
        """End all. None is started afterwards."""
        self._command = None
        for child in (self.child, self._spare):
            if child is not None:
                self._end(child)
        self.child = self._spare = None
        for child in self._dying:
            child.wait_gone()
        self._dying.clear()

    def _promote_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is None:
            return
        try:
            spare.listen(0.0)
        except ChildLostError:
            self._end(spare)
        else:
            self.child, self._started_s = spare, self._clock()

    def _start(self) -> SolverProcess | None:
        assert self._command is not None
        try:
            return SolverProcess(self._command)
        except OSError:
            self._wait_before_restart()
            return None

    def _end(self, child: SolverProcess) -> None:
        child.kill()
        self._dying.append(child)

    def _wait_before_restart(self) -> None:
        self._quick_deaths += 1
        if self._quick_deaths > 1:
            self._restart_s = self._clock() + min(MAX_RESTART_WAIT_S, 0.25 * 2.0**self._quick_deaths)
