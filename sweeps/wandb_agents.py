"""W&B's side of `sweeps.agent`: the agents that speak for its slots.

`Agents` registers one W&B agent for each run in flight and sends their heartbeats from a thread; what the
server answers comes back as `Command`s. Errors of the network are for the next heartbeat to mend: training
never waits for one.
"""

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sweeps.terminal import first_line
from sweeps.wandb_sweep import ENDED, WandbSweep
from training.exceptions import SweepError

POLL_S = 5.0
"""Between heartbeats, as in W&B's own agent."""
_LOOK_EVERY = 6
"""Rounds without a run after which the sweep's state is asked for again."""


@dataclass(frozen=True)
class Command:
    """What the server wants of us."""

    kind: str
    """`run`, `stop`, `exit`, `refused`, or `none` after each round of heartbeats."""
    run_id: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    """Of `run`: every setting that the sweep gives."""
    reason: str = ""
    """Of `refused`."""


class Agents:
    """One W&B agent a run in flight, registered as slots ask for runs.

    Args:
        api: `connect()`'s.
        sweep: whose runs are wanted.
        receive: called with every command, from the thread that sends the heartbeats.
        say: prints a line.
    """

    def __init__(
        self,
        api: Any,
        sweep: WandbSweep,
        receive: Callable[[Command], None],
        say: Callable[[str], None],
    ):
        self.api, self.sweep, self.receive, self.say = api, sweep, receive, say
        self.runs: dict[str, str | None] = {}
        """Agent -> the run that it has."""
        self.adopted: list[str] = []
        """Runs of an earlier process that no agent has yet."""
        self.lock = threading.RLock()
        self.woken = threading.Event()
        self.wants = False
        """Whether idle agents ask for runs."""
        self.closed = False
        self.num_beats = 0
        """Rounds of heartbeats: whoever waits for an answer knows that there has been one."""
        self.is_deleted = False
        self.problem = ""
        self.state = "RUNNING"
        self.num_empty = 0
        """Rounds in a row in which a run was wanted and none was given."""
        self.thread = threading.Thread(target=self._beat_on, name="W&B agents", daemon=True)

    def start(self) -> None:
        """Registers the first agent, so that what is wrong shows at once.

        Raises:
            SweepError: the server refuses it.
        """
        try:
            self._register()
        except Exception as error:
            raise SweepError(
                f"{self.sweep.path}: W&B refuses the agent: {first_line(error)}"
            ) from error
        self.thread.start()

    def ask(self) -> None:
        """Another run is wanted; it comes as a command, with one of the next heartbeats."""
        self.wants = True
        self.woken.set()

    def adopt(self, run_id: str) -> None:
        """The run of a process that died is ours."""
        with self.lock:
            self.adopted.append(run_id)
        self.woken.set()

    def free(self, run_id: str) -> None:
        """The run has ended: its agent may ask for another one."""
        with self.lock:
            self.adopted = [run for run in self.adopted if run != run_id]
            self.runs = {a: None if run == run_id else run for a, run in self.runs.items()}

    def close(self) -> None:
        self.closed = True
        self.woken.set()
        self.thread.join(timeout=2 * POLL_S)

    def _register(self) -> str:
        from wandb.apis.public.sweeps import _register_agent

        sweep = self.sweep
        agent = _register_agent(
            self.api,
            socket.gethostname(),
            sweep_id=sweep.id,
            project=sweep.project,
            entity=sweep.entity,
        )["id"]
        with self.lock:
            self.runs[agent] = None
        return agent

    def _beat_on(self) -> None:
        last = 0.0
        while not (self.closed or self.is_deleted):
            self.woken.wait(max(0.0, last + POLL_S - time.monotonic()))
            self.woken.clear()
            if self.closed:
                return
            last = time.monotonic()
            try:
                self._beat()
                self._told_of(None)
            except Exception as error:  # noqa: BLE001 - the next heartbeat may find W&B again
                self._told_of(error)
            self.num_beats += 1
            self.receive(Command("none"))

    def _beat(self) -> None:
        with self.lock:
            idle = [agent for agent, run in self.runs.items() if run is None]
            orphans, needed = list(self.adopted), len(self.adopted) + self.wants
        while len(idle) < needed:
            idle.append(self._register())
        with self.lock:
            for agent, run in zip(idle, orphans, strict=False):
                if run in self.adopted:
                    self.adopted.remove(run)
                    self.runs[agent] = run
            runs = list(self.runs.items())
        wanted = self.wants
        for agent, run in runs:
            # An idle agent is given a run when it shows itself: it does so only where one is wanted.
            if run is None and not self.wants:
                continue
            for command in self._heartbeat(agent, run):
                self._obey(agent, run, command)
        self.num_empty = self.num_empty + 1 if wanted and self.wants else 0
        if self.num_empty % _LOOK_EVERY == 1:
            self._look_at_sweep()

    def _look_at_sweep(self) -> None:
        """Why there is no run: to a heartbeat a key that is refused looks as a paused sweep does."""
        from wandb.apis.public.sweeps import _get_sweep_state
        from wandb.sdk.lib.service.service_connection import WandbApiFailedError

        sweep = self.sweep
        try:
            state = _get_sweep_state(
                self.api, sweep.id, entity=sweep.entity, project=sweep.project
            ).upper()
        except WandbApiFailedError as error:
            if error.response is None or error.response.http_status not in (401, 403):
                raise
            self.receive(Command("refused", reason=f"W&B refuses us: {first_line(error)}"))
            return
        if state in ENDED:
            self.receive(Command("exit"))
        elif state != self.state:
            self.say(f"W&B: the sweep is {state.lower()}: waiting for runs")
        self.state = state

    def _heartbeat(self, agent: str, run: str | None) -> list[dict[str, Any]]:
        from wandb.apis.public.sweeps import _agent_heartbeat
        from wandb.sdk.sweeps import SweepNotFoundError

        try:
            return _agent_heartbeat(self.api, agent, {}, {run: True} if run else {})
        except SweepNotFoundError:
            if not self.is_deleted:
                self.is_deleted = True
                self.say(f"W&B: the sweep {self.sweep.path} is deleted: runs in flight go on")
                self.receive(Command("exit"))
            return []

    def _obey(self, agent: str, run: str | None, command: dict[str, Any]) -> None:
        kind, run_id = command.get("type"), command.get("run_id")
        if kind in ("run", "resume") and run_id:
            self.wants = False
            with self.lock:
                self.runs[agent] = run_id
            params = {name: spec.get("value") for name, spec in (command.get("args") or {}).items()}
            self.receive(Command("run", run_id, params))
        elif kind == "stop" and run_id:
            self.receive(Command("stop", run_id))
        elif kind == "exit":
            with self.lock:
                self.runs.pop(agent, None)
            self.wants = False
            # The agent's own run ends, too, as under W&B's agent.
            self.receive(Command("exit", run))

    def _told_of(self, error: Exception | None) -> None:
        problem = first_line(error) if error else ""
        if problem and problem != self.problem:
            self.say(f"W&B does not answer: {problem}; training goes on")
        self.problem = problem
