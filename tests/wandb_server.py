"""A stand-in of W&B's server: the real client, agents and schedulers talk to it over HTTP on this machine.

GraphQL requests are answered by the method that `_OPERATIONS` names for their operation, `file_stream`
requests by `Run.receive`, and files are PUT to addresses that an answer gave out. All of it lands in the
dataclasses below, for a test to look at. Whatever is not known here is refused and noted in
`WandbServer.errors`, so that a test sees what a real server would have been asked.
"""

import base64
import fnmatch
import hashlib
import itertools
import json
import math
import os
import random
import re
import string
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import quote, unquote

import yaml

Variables = dict[str, Any]

HISTORY, EVENTS = "wandb-history.jsonl", "wandb-events.jsonl"
SUMMARY, OUTPUT = "wandb-summary.json", "output.log"
FEATURES = ("SWEEPS_LOCAL_SCHEDULER", "SWEEPS_QUERY_FILTERING", "CLIENT_IDS")
ENDED = ("finished", "failed", "crashed", "killed")
SWEEP_ENDED = ("FINISHED", "CANCELED", "STOPPED")


@dataclass
class Run:
    """A run as the server knows it; `id` is what W&B calls its name."""

    id: str
    entity: str
    project: str
    display_name: str
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    tags: list[str] = field(default_factory=list)
    raw_config: dict[str, Any] = field(default_factory=dict)
    raw_summary: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    state: str = "pending"  # a sweep's run exists before its process has asked for it
    exit_code: int | None = None
    sweep_id: str | None = None
    agent_id: str | None = None
    stopped: bool = False  # as the button "Stop run" does it
    num_file_streams: int = 0
    created_at_s: float = field(default_factory=time.time)
    last_seen_s: float = field(default_factory=time.monotonic)

    @property
    def config(self) -> dict[str, Any]:
        return {
            key: item["value"] if isinstance(item, dict) and "value" in item else item
            for key, item in self.raw_config.items()
            if key != "_wandb"
        }

    @property
    def summary(self) -> dict[str, Any]:
        return {key: value for key, value in self.raw_summary.items() if key != "_wandb"}

    @property
    def history(self) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.lines.get(HISTORY, [])]
        return sorted(rows, key=lambda row: row.get("_step", 0))

    @property
    def log(self) -> list[str]:
        return self.lines.get(OUTPUT, [])

    @property
    def node_id(self) -> str:
        return f"Run:{self.id}"

    def receive(self, request: dict[str, Any]) -> None:
        """One file_stream request. A chunk sent twice overwrites itself: its offset says where it goes."""
        self.num_file_streams += 1
        for name, chunk in request.get("files", {}).items():
            if name == SUMMARY:
                self.raw_summary = json.loads(chunk["content"][-1])
                continue
            lines, offset = self.lines.setdefault(name, []), chunk["offset"]
            if offset > len(lines):
                # The terminal's emulation may leave out lines; of metrics, that would be a loss.
                if name != OUTPUT:
                    raise RefusalError(
                        400, f"{name} of {self.id}: {offset} lines expected, {len(lines)} here"
                    )
                lines.extend([""] * (offset - len(lines)))
            lines[offset : offset + len(chunk["content"])] = chunk["content"]
        if request.get("complete"):
            self.exit_code = request["exitcode"]
            killed = "killed" if self.stopped else "failed"
            self.state = "finished" if self.exit_code == 0 else killed
        elif self.state in ("pending", "crashed"):
            self.state = "running"


@dataclass
class Sweep:
    """A sweep; `points` yields what is still to be tried, unless a local scheduler queues runs."""

    id: str
    entity: str
    project: str
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    state: str = "RUNNING"
    points: Iterator[dict[str, Any]] = field(default_factory=lambda: iter(()))
    queue: deque[str] = field(default_factory=deque)
    tried: list[dict[str, Any]] = field(default_factory=list)
    exhausted: bool = False
    created_at_s: float = field(default_factory=time.time)

    @property
    def node_id(self) -> str:
        return f"Sweep:{self.id}"


@dataclass
class Agent:
    """What `wandb agent` registers as; a packed agent registers one a slot."""

    id: str
    sweep_id: str
    host: str
    num_heartbeats: int = 0
    run_states: dict[str, bool] = field(default_factory=dict)
    state: str = "RUNNING"
    run_ids: list[str] = field(default_factory=list)


@dataclass
class Artifact:
    """One version of an artifact; `files` are by the name inside it."""

    id: str
    entity: str
    project: str
    name: str
    type: str
    digest: str
    run_id: str | None
    description: str | None = None
    metadata: str | None = None
    wanted_aliases: list[str] = field(default_factory=list)
    aliases: set[str] = field(default_factory=set)
    version: int | None = None  # given when it is committed
    files: dict[str, bytes] = field(default_factory=dict)
    manifest: bytes = b""
    used_by: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)


class RefusalError(Exception):
    """An answer other than success; noted in `errors` unless a test asked for it."""

    def __init__(self, status: int, message: str, *, noted: bool = True):
        super().__init__(message)
        self.status, self.noted = status, noted


class WandbServer:
    """`with WandbServer() as server:` serves at `server.url` until the block ends.

    Args:
        entity: whose key `api_key` is.
        seed: of ids and of `method: random`.
        silence_s: a run that has not been heard of for so long is `crashed`.
    """

    def __init__(self, *, entity: str = "tester", seed: int = 0, silence_s: float = math.inf):
        self.entity = entity
        self.silence_s = silence_s
        self.api_key = "local-" + "k" * 40
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.agents: dict[str, Agent] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.errors: list[str] = []
        self.forbidden_projects: set[str] = set()
        self.num_requests: Counter[str] = Counter()
        self._faults: dict[str, list[float]] = {}
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._http = _HttpServer(self, 0)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "WandbServer":
        self.resume()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def env(self, home: Path) -> dict[str, str]:
        """What to add to a client's environment; its files stay below `home`."""
        folders = {name: str(home / name.lower()) for name in ("CONFIG", "CACHE", "DATA")}
        python = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        home.mkdir(parents=True, exist_ok=True)
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": self.api_key,
            "WANDB_MODE": "online",
            "WANDB_DIR": str(home),
            **{f"WANDB_{name}_DIR": folder for name, folder in folders.items()},
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_SILENT": "true",
            "WANDB_DISABLE_GIT": "true",
            "WANDB_DISABLE_CODE": "true",
            # Metrics travel every second instead of every 15, and a retry waits 1 s instead of up to 60.
            "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1",
            "WANDB__FILE_STREAM_RETRY_WAIT_MIN_SECONDS": "1",
            "WANDB__FILE_STREAM_RETRY_WAIT_MAX_SECONDS": "1",
            "WANDB__GRAPHQL_RETRY_WAIT_MIN_SECONDS": "1",
            "WANDB__GRAPHQL_RETRY_WAIT_MAX_SECONDS": "1",
            "PATH": python,  # an agent starts `python`, and that must be ours
        }

    def pause(self) -> None:
        """From now on the port refuses connections."""
        port = self._http.server_address[1]
        self._http.close()
        # Bound and not listening: nobody else gets the port meanwhile.
        self._http = _HttpServer(self, port)

    def resume(self) -> None:
        self._http.serve()

    def fail(self, operation: str, status: int, times: int | None = 1) -> None:
        """Answers the next `times` requests of a GraphQL operation, or of "file_stream", with `status`."""
        self._faults[operation] = [status, math.inf if times is None else times]

    def heal(self) -> None:
        self._faults.clear()

    def stop_run(self, run_id: str) -> None:
        """As the button "Stop run" does."""
        self.runs[run_id].stopped = True

    def set_sweep_state(self, sweep_id: str, state: str) -> None:
        """RUNNING, PAUSED, FINISHED, CANCELED or STOPPED."""
        self.sweeps[sweep_id].state = state
        if state == "CANCELED":
            for run in self._runs_of(self.sweeps[sweep_id]):
                run.stopped = run.stopped or run.state not in ENDED

    def delete_sweep(self, sweep_id: str) -> None:
        del self.sweeps[sweep_id]

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 60) -> Any:
        """The condition's value as soon as it is true; `TimeoutError` if it does not become so."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"still {value!r} after {timeout_s} s; errors: {self.errors}")
            time.sleep(0.05)
        return value

    # What comes in over HTTP.

    def answer(self, method: str, path: str, authorization: str, body: bytes) -> tuple[int, bytes]:
        """Status and body for a request; one at a time, so a handler sees a state at rest."""
        with self._lock:
            try:
                self._notice_silence()
                answer = self._route(method, path, authorization, body)
            except RefusalError as refusal:
                if refusal.noted:
                    self.errors.append(f"{method} {path}: {refusal}")
                answer, status = {"errors": [{"message": str(refusal)}]}, refusal.status
            except Exception:  # noqa: BLE001 - a fault of this file is a fact for the test, too
                self.errors.append(f"{method} {path}: {traceback.format_exc()}")
                answer, status = {"errors": [{"message": "internal error"}]}, 400
            else:
                status = 200
        return status, answer if isinstance(answer, bytes) else json.dumps(answer).encode()

    def _route(self, method: str, path: str, authorization: str, body: bytes) -> Any:
        parts = [unquote(part) for part in path.split("?")[0].strip("/").split("/")]
        if parts[0] == "storage":  # signed addresses: they work without the key
            return self._store(method, parts[1], parts[2], "/".join(parts[3:]), body)
        key = base64.b64encode(f"api:{self.api_key}".encode()).decode()
        if authorization != f"Basic {key}":
            raise RefusalError(401, "invalid API key", noted=False)
        match method, parts:
            case "POST", ["graphql"]:
                return self._graphql(json.loads(body))
            case "POST", ["files", _, project, run_id, "file_stream"]:
                self._check_allowed("file_stream", project)
                run = self._run(run_id)
                run.last_seen_s = time.monotonic()
                run.receive(json.loads(body))
                self._settle(run.sweep_id)
                return {"limits": {}, "stopped": run.stopped}
        raise RefusalError(404, "unknown path")

    def _graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        head = re.search(
            r"^\s*(?:query|mutation)\s+(\w+)\s*(?:\(([^)]*)\))?\s*\{", request["query"], re.M
        )
        operation, declared = (head[1], head[2] or "") if head else ("(none)", "")
        handler = _OPERATIONS.get(operation)
        if handler is None:
            raise RefusalError(400, f"unknown operation {operation}: {request['query']}")
        given, variables = request.get("variables") or {}, {}
        for name, kind, default in re.findall(r"\$(\w+)\s*:\s*([\w\[\]!]+)\s*(=?)", declared):
            variables[name] = given.get(name)
            if variables[name] is None and kind.endswith("!") and not default:
                raise RefusalError(400, f"{operation} lacks its variable {name}")
        inside = variables | (variables.get("input") or {})
        self._check_allowed(operation, inside.get("project") or inside.get("projectName"))
        return {"data": handler(self, variables)}

    def _check_allowed(self, operation: str, project: str | None) -> None:
        self.num_requests[operation] += 1
        if operation in self._faults:
            fault = self._faults[operation]
            if fault[1] > 0:
                fault[1] -= 1
                raise RefusalError(
                    int(fault[0]), f"{operation} fails as the test wants", noted=False
                )
        if project in self.forbidden_projects:
            raise RefusalError(403, "permission denied", noted=False)

    def _store(self, method: str, kind: str, owner: str, name: str, body: bytes) -> Any:
        if kind == "runs":
            files = self._run(owner).files
        elif kind == "artifacts":
            files = self.artifacts[owner].files
        elif method == "PUT":
            self.artifacts[owner].manifest = body
            return {}
        else:
            return self.artifacts[owner].manifest
        if method == "PUT":
            files[name] = body
            return {}
        if name not in files:
            raise RefusalError(404, "no such file")
        return files[name]

    def _notice_silence(self) -> None:
        for run in self.runs.values():
            if run.state == "running" and time.monotonic() - run.last_seen_s > self.silence_s:
                run.state = "crashed"

    # Runs.

    def _run(self, run_id: str) -> Run:
        if run_id.removeprefix("Run:") not in self.runs:
            raise RefusalError(404, f"run {run_id} not found")
        return self.runs[run_id.removeprefix("Run:")]

    def _add_run(self, run_id: str, entity: str, project: str) -> Run:
        self.runs[run_id] = Run(run_id, entity, project, f"run-{len(self.runs) + 1}")
        return self.runs[run_id]

    def _new_id(self) -> str:
        return "".join(self._random.choices(string.ascii_lowercase + string.digits, k=8))

    def upsert_bucket(self, v: Variables) -> Variables:
        """`wandb.init`, its later changes of config or tags, `Run.update`, `Api.create_run`."""
        run = self.runs.get((v.get("id") or v.get("name") or "").removeprefix("Run:"))
        inserted = run is None
        if run is None:
            run = self._add_run(v["name"], v.get("entity") or self.entity, v["project"])
        if v.get("project") not in (None, run.project):
            raise RefusalError(409, f"run {run.id} is of project {run.project}, not {v['project']}")
        for name, attribute in _RUN_VARIABLES.items():
            if v.get(name) is not None:
                setattr(run, attribute, v[name])
        if v.get("config"):
            run.raw_config = json.loads(v["config"])
        if v.get("summaryMetrics"):
            run.raw_summary = json.loads(v["summaryMetrics"])
        if v.get("sweep") and v["sweep"] not in self.sweeps:
            raise RefusalError(404, f"sweep {v['sweep']} of run {run.id} not found")
        if v.get("host"):  # only the process that trains says where it runs, and that once
            ended = run.state in ENDED
            run.last_seen_s = time.monotonic()
            run.state, run.exit_code, run.stopped = "running", None, run.stopped and not ended
        return {"upsertBucket": {"bucket": self._run_node(run, v), "inserted": inserted}}

    def run_resume_status(self, v: Variables) -> Variables:
        """`wandb.init(resume=…)`."""
        run = self.runs.get(v["name"])
        node = self._run_node(run, v) if run else None
        return {"model": {**self._project_node(v), "bucket": node}}

    def project_with_run(self, v: Variables) -> Variables:
        """`Api.run`, and all that reads a run's state, history or files."""
        run = self.runs.get(v.get("name") or v.get("run") or v.get("runName") or "")
        node = self._run_node(run, v) if run and run.project == v["project"] else None
        return {"project": {**self._project_node(v), "run": node}}

    def project_with_runs(self, v: Variables) -> Variables:
        """`Api.runs`, `Sweep.runs`, and a scheduler's look at the runs that it watches."""
        runs = self._select(v)
        fields = {
            "runCount": len(runs),
            "runs": self._page([self._run_node(r, v) for r in runs], v),
        }
        sweep = self.sweeps.get(v.get("sweep") or "")
        fields["sweep"] = {"state": sweep.state} if sweep else None
        return {"project": {**self._project_node(v), **fields}}

    def stop_run_mutation(self, v: Variables) -> Variables:
        """`Api.run(…).stop()`, and a scheduler that prunes."""
        self.stop_run(self._run(v["id"]).id)
        return {"stopRun": {"success": True}}

    def create_run_files(self, v: Variables) -> Variables:
        """`Run.save`, media, and what every run uploads at its end."""
        run = self._run(v["run"])
        files = [
            {"name": name, "uploadUrl": self._address("runs", run.id, name)} for name in v["files"]
        ]
        return {"createRunFiles": {"runID": run.node_id, "uploadHeaders": [], "files": files}}

    def _select(self, v: Variables) -> list[Run]:
        filters = json.loads(v.get("filters") or "{}")
        order = v.get("order") or "+created_at"
        place = (v.get("entity") or self.entity, v["project"])
        runs = [r for r in self.runs.values() if (r.entity, r.project) == place]
        keyed = [(_field(run, order.lstrip("+-")), run) for run in runs if _matches(run, filters)]
        known = sorted(
            [pair for pair in keyed if pair[0] is not None],
            key=lambda pair: pair[0],
            reverse=order.startswith("-"),
        )
        return [run for _, run in known] + [run for value, run in keyed if value is None]

    def _runs_of(self, sweep: Sweep) -> list[Run]:
        return [run for run in self.runs.values() if run.sweep_id == sweep.id]

    def _run_node(self, run: Run, v: Variables) -> Variables:
        rows, lines = run.history, run.lines
        node = {
            "id": run.node_id,
            "projectId": 1,
            "name": run.id,
            "displayName": run.display_name,
            "sweepName": run.sweep_id,
            "state": run.state,
            "exitcode": run.exit_code,
            "config": json.dumps(run.raw_config),
            "group": run.group,
            "jobType": run.job_type,
            "notes": run.notes,
            "tags": run.tags,
            "readOnly": False,
            **_NOTHING,
            **_times(run.created_at_s),
            "user": {"name": self.entity, "username": self.entity},
            "summaryMetrics": json.dumps(run.raw_summary),
            "systemMetrics": lines.get(EVENTS, ["{}"])[-1],
            "historyLineCount": len(rows),
            "eventsLineCount": len(lines.get(EVENTS, [])),
            "logLineCount": len(run.log),
            "historyTail": json.dumps(lines.get(HISTORY, [])[-1:]),
            "eventsTail": json.dumps(lines.get(EVENTS, [])[-1:]),
            "historyKeys": {"lastStep": rows[-1].get("_step", -1) if rows else -1},
            # "t" is the telemetry of a process that has started: without it there is nothing to resume.
            "wandbConfig": json.dumps(
                {"t": {}} if "t" in run.raw_config.get("_wandb", {}).get("value", {}) else {}
            ),
            "project": self._project_node({"project": run.project, "entity": run.entity}),
            "stopped": run.stopped,
            "shouldStop": run.stopped,
            "failed": run.state in ("failed", "crashed"),
            "running": run.state == "running",
            # Nothing is exported: all of it is read through `history` and `sampledHistory`.
            "parquetHistory": {"parquetUrls": [], "liveData": rows[:1]},
        }
        specs = v.get("specs") or v.get("historySpecs") or v.get("spec") or []
        specs = [specs] if isinstance(specs, str) else specs  # GraphQL takes one for a list of one
        node["sampledHistory"] = [_sampled(rows, json.loads(spec)) for spec in specs]
        first, behind = v.get("minStep") or 0, v.get("maxStep")
        wanted = [r for r in rows if first <= r["_step"] < (math.inf if behind is None else behind)]
        size = v.get("samples") or v.get("pageSize") or 500
        node["history"] = [json.dumps(row) for row in _thin(wanted, size)]
        node["events"] = _thin(lines.get(EVENTS, []), size)
        pattern = (v.get("pattern") or "%").replace("%", "*")
        names = v.get("fileNames") or fnmatch.filter(run.files, pattern)
        files = [self._file_node(run, name) for name in names if name in run.files]
        return {**node, "fileCount": len(run.files), "files": self._page(files, v)}

    def _file_node(self, run: Run, name: str) -> Variables:
        data, url = run.files[name], self._address("runs", run.id, name)
        return {
            "id": f"File:{run.id}:{name}",
            "name": name,
            "url": url,
            "directUrl": url,
            "sizeBytes": len(data),
            "mimetype": "application/octet-stream",
            **_times(run.created_at_s),
            "md5": base64.b64encode(hashlib.md5(data).digest()).decode(),
        }

    # Sweeps and agents.

    def _sweep(self, sweep_id: str) -> Sweep:
        if sweep_id.removeprefix("Sweep:") not in self.sweeps:
            raise RefusalError(404, f"sweep {sweep_id} not found")
        return self.sweeps[sweep_id.removeprefix("Sweep:")]

    def upsert_sweep(self, v: Variables) -> Variables:
        """`wandb sweep` and `wandb.sweep`: a new one, `--update`, `--pause`, `--stop`, `--cancel`."""
        if v.get("id"):
            sweep = self._sweep(v["id"])
        else:
            sweep = Sweep(self._new_id(), v.get("entityName") or self.entity, v["projectName"])
            self.sweeps[sweep.id] = sweep
        if v.get("config"):
            sweep.config_text, sweep.config = v["config"], yaml.safe_load(v["config"])
            sweep.points, sweep.exhausted = self._points(sweep), False
        if v.get("state"):
            self.set_sweep_state(sweep.id, v["state"])
        place = {"project": sweep.project, "entity": sweep.entity}
        node = {**self._sweep_node(sweep, {}), "project": self._project_node(place)}
        return {"upsertSweep": {"sweep": node, "configValidationWarnings": []}}

    def project_with_sweep(self, v: Variables) -> Variables:
        """`Api.sweep`, an agent's and a scheduler's look at their sweep, `Sweep.agents`."""
        sweep = self.sweeps.get(v.get("sweep") or v.get("name") or "")
        node = self._sweep_node(sweep, v) if sweep else None
        return {"project": {**self._project_node(v), "sweep": node}}

    def project_with_sweeps(self, v: Variables) -> Variables:
        """`Api.project(…).sweeps()`."""
        sweeps = [
            self._sweep_node(s, {}) for s in self.sweeps.values() if s.project == v["project"]
        ]
        fields = {"totalSweeps": len(sweeps), "sweeps": self._page(sweeps, v)}
        return {"project": {**self._project_node(v), **fields}}

    def create_agent(self, v: Variables) -> Variables:
        """`wandb agent`, and each slot of a packed agent."""
        agent = Agent(self._new_id(), self._sweep(v["sweep"]).id, v["host"])
        self.agents[agent.id] = agent
        return {"createAgent": {"agent": {"id": agent.id}}}

    def heartbeat(self, v: Variables) -> Variables:
        """An agent, every five seconds; the answer carries what it is to do."""
        agent = self.agents.get(v["id"])
        if agent is None or agent.sweep_id not in self.sweeps:
            raise RefusalError(404, "agent or sweep not found", noted=False)
        agent.num_heartbeats += 1
        agent.run_states = json.loads(v["runState"] or "{}")
        commands = self._commands(agent, self.sweeps[agent.sweep_id])
        if any(command["type"] == "exit" for command in commands):
            agent.state = "FINISHED"
        return {"agentHeartbeat": {"agent": {"id": agent.id}, "commands": json.dumps(commands)}}

    def _commands(self, agent: Agent, sweep: Sweep) -> list[dict[str, Any]]:
        busy = [self._run(run_id) for run_id, alive in agent.run_states.items() if alive]
        if sweep.state == "CANCELED":
            return [{"type": "exit"}]
        if stops := [{"type": "stop", "run_id": run.id} for run in busy if run.stopped]:
            return stops  # again at every heartbeat: the agent kills what does not end
        if busy or sweep.state == "PAUSED":
            return []
        run = None if sweep.state in SWEEP_ENDED else self._next_run(sweep)
        if run is None:
            is_waiting = sweep.state == "RUNNING" and "scheduler" in sweep.config
            return [] if is_waiting else [{"type": "exit"}]
        run.agent_id = agent.id
        agent.run_ids.append(run.id)
        program = sweep.config.get("program", "")
        args = {key: item for key, item in run.raw_config.items() if key != "_wandb"}
        return [{"type": "run", "run_id": run.id, "program": program, "args": args}]

    def _next_run(self, sweep: Sweep) -> Run | None:
        if sweep.queue:
            return self.runs[sweep.queue.popleft()]
        capped = len(sweep.tried) >= sweep.config.get("run_cap", math.inf)
        point = None if capped else next(sweep.points, None)
        if point is None:
            sweep.exhausted = "scheduler" not in sweep.config
            self._settle(sweep.id)
            return None
        return self._add_sweep_run(sweep, point)

    def _add_sweep_run(self, sweep: Sweep, point: dict[str, Any]) -> Run:
        run = self._add_run(self._new_id(), sweep.entity, sweep.project)
        run.raw_config = {key: {"value": value} for key, value in point.items()}
        run.sweep_id = sweep.id
        sweep.tried.append(point)
        return run

    def _settle(self, sweep_id: str | None) -> None:
        """A sweep with nothing left to try is finished when its last run is."""
        sweep = self.sweeps.get(sweep_id or "")
        if sweep is None or not sweep.exhausted or sweep.state != "RUNNING":
            return
        if all(run.state in ENDED for run in self._runs_of(sweep)):
            sweep.state = "FINISHED"

    def enqueue_sweep_run(self, v: Variables) -> Variables:
        """`wandb sweep-scheduler`, and `Sweep.enqueue_run`: a run for the next idle agent."""
        sweep, point = self._sweep(v["id"]), json.loads(v["config"])
        is_wire = all(isinstance(item, dict) and "value" in item for item in point.values())
        run = self._add_sweep_run(
            sweep, {key: item["value"] if is_wire else item for key, item in point.items()}
        )
        run.display_name = v.get("displayName") or run.display_name
        sweep.queue.append(run.id)
        return {"enqueueSweepRun": {"id": run.id, "runQueueItemId": f"Item:{run.id}"}}

    def _points(self, sweep: Sweep) -> Iterator[dict[str, Any]]:
        method = sweep.config.get("method")
        if "scheduler" in sweep.config:
            return iter(())
        if method == "grid":  # of a changed sweep, what is left
            return (p for p in _grid(sweep.config["parameters"]) if p not in sweep.tried)
        if method == "random":
            return (_draw(sweep.config["parameters"], self._random) for _ in itertools.count())
        raise RefusalError(
            400, f"The value of `method` is {method!r}, but must be 'grid' or 'random'"
        )

    def _sweep_node(self, sweep: Sweep, v: Variables) -> Variables:
        runs = self._runs_of(sweep)
        agents = [self._agent_node(a, v) for a in self.agents.values() if a.sweep_id == sweep.id]
        losses = [value for run in runs if (value := run.summary.get(_metric(sweep))) is not None]
        return {
            "id": sweep.node_id,
            "name": sweep.id,
            "displayName": sweep.config.get("name"),
            "method": sweep.config.get("method"),
            "state": sweep.state,
            "config": sweep.config_text,
            "bestLoss": min(losses, default=None),
            **_NOTHING,
            "controllerRunName": f"{sweep.id}-controller",
            "earlyStopJobRunning": False,
            **_times(sweep.created_at_s),
            "runCount": len(runs),
            "runCountExpected": sweep.config.get("run_cap"),
            "runs": self._page([self._run_node(run, v) for run in runs], v),
            "agents": self._page(agents, {}),
            "agent": next((node for node in agents if node["id"] == v.get("agentID")), None),
        }

    def _agent_node(self, agent: Agent, v: Variables) -> Variables:
        runs = [self._run_node(self.runs[run_id], v) for run_id in agent.run_ids]
        return {
            "id": agent.id,
            "name": agent.id,
            "host": agent.host,
            "state": agent.state,
            "totalRuns": len(runs),
            **_times(0),
            "runs": self._page(runs, v),
        }

    # Artifacts.

    def create_artifact(self, v: Variables) -> Variables:
        """`Run.log_artifact`; the same content again is the version that is there."""
        given = v["input"]
        kept = self._versions(given["projectName"], given["artifactCollectionName"])
        artifact = next((a for a in kept if a.digest == given["digest"]), None)
        latest = {"id": kept[-1].id} if kept else None
        if artifact is None:
            artifact_id = base64.b64encode(f"Artifact:{len(self.artifacts)}".encode()).decode()
            artifact = Artifact(artifact_id, *map(given.get, _ARTIFACT_VARIABLES))
            self.artifacts[artifact.id] = artifact
        artifact.wanted_aliases = [item["alias"] for item in given.get("aliases") or []]
        if artifact.version is not None:
            self._move_aliases(artifact)
        node = {**self._artifact_node(artifact), "artifactSequence": {"latestArtifact": latest}}
        return {"createArtifact": {"artifact": node}}

    def create_artifact_files(self, v: Variables) -> Variables:
        """`Run.log_artifact`: where to put the files."""
        nodes = [
            {
                "storagePath": item["name"],
                "uploadUrl": self._address("artifacts", item["artifactID"], item["name"]),
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": item["artifactID"]},
            }
            for item in v["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def create_artifact_manifest(self, v: Variables) -> Variables:
        """`Run.log_artifact`: where to put the list of its files."""
        url = self._address("manifests", v["artifactID"], "wandb_manifest.json")
        file = {"id": f"File:{v['artifactID']}", "uploadUrl": url, "uploadHeaders": []}
        manifest = {"id": f"Manifest:{v['artifactID']}", "file": file}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def commit_artifact(self, v: Variables) -> Variables:
        """`Run.log_artifact`: all is there."""
        artifact = self.artifacts[v["artifactID"]]
        artifact.version = len(self._versions(artifact.project, artifact.name))
        self._move_aliases(artifact)
        return {"commitArtifact": {"artifact": self._artifact_node(artifact)}}

    def use_artifact(self, v: Variables) -> Variables:
        """`Run.use_artifact`."""
        given = v.get("input") or v
        artifact = self.artifacts[given["artifactID"]]
        artifact.used_by.add(given["runName"])
        return {"useArtifact": {"artifact": self._artifact_node(artifact)}}

    def link_artifact(self, v: Variables) -> Variables:
        """`Run.link_artifact`, `Artifact.link`."""
        given = v.get("input") or v
        artifact = self.artifacts[given.get("artifactId") or given["artifactID"]]
        artifact.links.add(f"{given['projectName']}/{given['artifactPortfolioName']}")
        done = {"versionIndex": artifact.version}
        return {"linkArtifact": done, "result": done}

    def project_with_artifact(self, v: Variables) -> Variables:
        """`Api.artifact`, `Run.use_artifact`, `Artifact.download`, and the type before a log."""
        name, _, alias = (v.get("name") or f"{v.get('collection')}:{v.get('alias')}").partition(":")
        versions = self._versions(v["project"], name)
        artifact = next((a for a in versions if alias in {*a.aliases, f"v{a.version}"}), None)
        kinds = ("artifact", "artifactCollection", "artifactCollectionMembership")
        fields: Variables = dict.fromkeys(kinds)
        if artifact:
            node = self._artifact_node(artifact)
            files = [
                {"name": path, "directUrl": self._address("artifacts", artifact.id, path)}
                for path in artifact.files
            ]
            fields["artifact"] = node
            fields["artifactCollectionMembership"] = {
                **node,
                "id": f"Membership:{artifact.id}",
                "__typename": "ArtifactCollectionMembership",
                "artifactCollection": node["artifactSequence"],
                "artifact": node,
            }
            fields["artifactCollection"] = {
                **node["artifactSequence"],
                "artifactMembership": {"files": self._page(files, v)},
            }
        return {"project": {**self._project_node(v), **fields}}

    def artifact_manifest(self, v: Variables) -> Variables:
        """`Artifact.manifest`: where to get the list of its files."""
        artifact = self.artifacts[v.get("id") or v.get("artifact_id") or ""]
        url = self._address("manifests", artifact.id, "wandb_manifest.json")
        return {"artifact": {"currentManifest": {"file": {"directUrl": url}}}}

    def artifact_by_id(self, v: Variables) -> Variables:
        """`Artifact.wait`, after a log."""
        return {"artifact": self._artifact_node(self.artifacts[v["id"]])}

    def _versions(self, project: str, name: str) -> list[Artifact]:
        place = f"{project}/{name}"
        found = [a for a in self.artifacts.values() if place in (f"{a.project}/{a.name}", *a.links)]
        committed = [(a.version, a) for a in found if a.version is not None]
        return [a for _, a in sorted(committed, key=lambda pair: pair[0])]

    def _move_aliases(self, artifact: Artifact) -> None:
        wanted = {*artifact.wanted_aliases, "latest"}
        for other in self._versions(artifact.project, artifact.name):
            other.aliases -= wanted
        artifact.aliases |= wanted

    def _artifact_node(self, artifact: Artifact) -> Variables:
        sequence = {
            "__typename": "ArtifactSequence",
            "name": artifact.name,
            "project": self._project_node(vars(artifact)),
        }
        aliases = [
            {"id": f"Alias:{alias}", "alias": alias, "artifactCollection": sequence}
            for alias in sorted(artifact.aliases)
        ]
        return {
            "id": artifact.id,
            "artifactSequence": sequence,
            "versionIndex": artifact.version,
            "artifactType": {"name": artifact.type},
            "ttlDurationSeconds": -1,
            "ttlIsInherited": True,
            "tags": [],
            **_NOTHING,
            "description": artifact.description,
            "metadata": artifact.metadata,
            "state": "PENDING" if artifact.version is None else "COMMITTED",
            "size": sum(map(len, artifact.files.values())),
            "digest": artifact.digest,
            "fileCount": len(artifact.files),
            **_times(0),
            "aliases": aliases,
        }

    # Who and where.

    def viewer(self, _: Variables) -> Variables:
        """`wandb.login`, `Api.default_entity`."""
        empty = {"edges": []}
        return {
            "viewer": {
                "id": "User:1",
                "name": self.entity,
                "username": self.entity,
                "entity": self.entity,
                "email": "tester@example.com",
                "admin": False,
                "flags": "{}",
                **_NOTHING,
                "apiKeys": empty,
                "teams": empty,
            }
        }

    def server_features(self, _: Variables) -> Variables:
        """Every client, before it asks for something that an older server would not know."""
        features = [{"name": name, "isEnabled": True} for name in FEATURES]
        return {"serverInfo": {"features": features}}

    def organization(self, _: Variables) -> Variables:
        """Questions about an entity's organization: it has none."""
        return {"entity": {"organization": None, "xxhashDigestsEnabled": False}}

    def organization_info(self, _: Variables) -> Variables:
        """`Run.link_artifact` into the registry: whose registry that is."""
        organization = {"name": "acme", "orgEntity": {"name": "org_acme"}}
        return {"entity": {"organization": organization, "user": None}}

    def _project_node(self, v: Variables) -> Variables:
        entity = v.get("entity") or v.get("entityName") or self.entity
        name = v.get("project") or v.get("projectName") or "uncategorized"
        return {
            "id": f"Project:{name}",
            "internalId": "1",
            "name": name,
            "entityName": entity,
            "readOnly": False,
            "entity": {"id": f"Entity:{entity}", "name": entity},
        }

    def _address(self, kind: str, owner: str, name: str) -> str:
        return f"{self.url}/storage/{kind}/{quote(owner, safe='')}/{quote(name)}"

    def _page(self, nodes: list[Variables], v: Variables) -> Variables:
        first = int(v.get("cursor") or v.get("after") or v.get("fileCursor") or 0)
        size = v.get("perPage") or v.get("first") or v.get("fileLimit") or len(nodes)
        edges = [
            {"node": node, "cursor": str(number)}
            for number, node in enumerate(nodes[first : first + size], first + 1)
        ]
        behind = first + len(edges)
        page_info = {"endCursor": str(behind), "hasNextPage": behind < len(nodes)}
        return {"edges": edges, "pageInfo": page_info}


_RUN_VARIABLES = {
    "displayName": "display_name",
    "display_name": "display_name",
    "groupName": "group",
    "jobType": "job_type",
    "notes": "notes",
    "tags": "tags",
    "sweep": "sweep_id",
    "state": "state",
}
_ARTIFACT_VARIABLES = (  # in the order of `Artifact`'s fields
    "entityName projectName artifactCollectionName artifactTypeName digest runName description metadata"
).split()
# What nodes have and nobody here looks at.
_NOTHING = dict.fromkeys(
    ("description", "commit", "controller", "scheduler", "historyStep", "commitHash", "deletedAt")
)
_HANDLERS: dict[Callable[[WandbServer, Variables], Variables], str] = {
    WandbServer.artifact_by_id: "ArtifactByID",
    WandbServer.artifact_manifest: "ArtifactManifest FetchArtifactManifest",
    WandbServer.commit_artifact: "CommitArtifact",
    WandbServer.create_agent: "CreateAgent",
    WandbServer.create_artifact: "CreateArtifact",
    WandbServer.create_artifact_files: "CreateArtifactFiles",
    WandbServer.create_artifact_manifest: "CreateArtifactManifest",
    WandbServer.create_run_files: "CreateRunFiles",
    WandbServer.enqueue_sweep_run: "EnqueueSweepRun",
    WandbServer.heartbeat: "Heartbeat",
    WandbServer.link_artifact: "LinkArtifact",
    WandbServer.organization: "OrganizationCoreWeaveOrganizationID XXHashDigestsEnabled",
    WandbServer.organization_info: "FetchOrgInfoFromEntity",
    WandbServer.project_with_artifact: "ArtifactMembershipByName ArtifactType "
    "GetArtifactMembershipFileUrls",
    WandbServer.project_with_run: "HistoryPage QueryRunInfo Run RunFiles RunFullHistory RunHistoryKeys "
    "RunParquetHistory RunSampledHistory RunState SampledHistoryPage",
    WandbServer.project_with_runs: "Runs SweepWatchedRuns",
    WandbServer.project_with_sweep: "GetAgentRuns GetSweep GetSweepAgent GetSweepAgents GetSweepLegacy "
    "GetSweepState SweepConfig SweepRunsWithHistory SweepWithRuns",
    WandbServer.project_with_sweeps: "GetSweeps",
    WandbServer.run_resume_status: "RunResumeStatus",
    WandbServer.server_features: "ServerFeaturesQuery",
    WandbServer.stop_run_mutation: "StopRun",
    WandbServer.upsert_bucket: "UpsertBucket",
    WandbServer.upsert_sweep: "UpsertSweep UpsertSweepState",
    WandbServer.use_artifact: "UseArtifact",
    WandbServer.viewer: "GetDefaultEntity GetViewer Viewer",
}
_OPERATIONS = {name: handler for handler, names in _HANDLERS.items() for name in names.split()}


class _HttpServer(ThreadingHTTPServer):
    """Bound at once; it listens from `serve` on."""

    daemon_threads = True

    def __init__(self, wandb_server: WandbServer, port: int):
        self.wandb_server = wandb_server
        self.thread: threading.Thread | None = None
        super().__init__(("127.0.0.1", port), _Handler, bind_and_activate=False)
        TCPServer.server_bind(self)  # not `HTTPServer`'s, which asks a name server

    def serve(self) -> None:
        self.server_activate()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        if self.thread:
            self.shutdown()
            self.thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was ended in the middle of a request is none of our errors."""


class _Handler(BaseHTTPRequestHandler):
    server: _HttpServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        authorization = self.headers.get("Authorization") or ""
        status, answer = self.server.wandb_server.answer(
            self.command, self.path, authorization, body
        )
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _times(time_s: float) -> dict[str, str]:
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s))
    return dict.fromkeys(("createdAt", "heartbeatAt", "updatedAt"), when)


def _metric(sweep: Sweep) -> str:
    return (sweep.config.get("metric") or {}).get("name", "")


# Points of a sweep.


def _grid(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    values = [_values(name, parameter) for name, parameter in parameters.items()]
    for point in itertools.product(*values):
        yield dict(zip(parameters, point, strict=True))


def _values(name: str, parameter: dict[str, Any]) -> list[Any]:
    if "parameters" in parameter:
        return list(_grid(parameter["parameters"]))
    if "value" in parameter:
        return [parameter["value"]]
    if "values" in parameter:
        return parameter["values"]
    if isinstance(parameter.get("min"), int) and isinstance(parameter.get("max"), int):
        return list(range(parameter["min"], parameter["max"] + 1))
    raise RefusalError(400, f"a grid cannot go through parameter {name}: {parameter}")


def _draw(parameters: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    return {name: _draw_one(name, parameter, rng) for name, parameter in parameters.items()}


def _draw_one(name: str, parameter: dict[str, Any], rng: random.Random) -> Any:
    if "parameters" in parameter:
        return _draw(parameter["parameters"], rng)
    if "min" not in parameter:
        values = _values(name, parameter)
        return rng.choices(values, parameter.get("probabilities"))[0]
    low, high = parameter["min"], parameter["max"]
    match parameter["distribution"]:
        case "int_uniform":
            return rng.randint(low, high)
        case "uniform":
            return rng.uniform(low, high)
        case "log_uniform_values":
            return math.exp(rng.uniform(math.log(low), math.log(high)))
        case "log_uniform":
            return math.exp(rng.uniform(low, high))
    raise RefusalError(400, f"distribution of parameter {name} is not known here: {parameter}")


# Filters, order and sampling of what is read.

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": lambda value, wanted: value == wanted,
    "$ne": lambda value, wanted: value != wanted,
    "$in": lambda value, wanted: value in wanted,
    "$nin": lambda value, wanted: value not in wanted,
    "$exists": lambda value, wanted: (value is not None) == wanted,
}
_FIELDS = {
    "name": "id",
    "sweep": "sweep_id",
    "displayName": "display_name",
    "jobType": "job_type",
    "created_at": "created_at_s",
    "createdAt": "created_at_s",
}


def _matches(run: Run, filters: dict[str, Any]) -> bool:
    return all(_matches_one(run, key, wanted) for key, wanted in filters.items())


def _matches_one(run: Run, key: str, wanted: Any) -> bool:
    if key == "$and":
        return all(_matches(run, part) for part in wanted)
    if key == "$or":
        return any(_matches(run, part) for part in wanted)
    value = _field(run, key)
    if key == "tags" and isinstance(wanted, str):
        return wanted in value
    if not isinstance(wanted, dict):
        return value == wanted
    if unknown := set(wanted) - set(_COMPARE):
        raise RefusalError(400, f"operators {unknown} of a filter are not known here")
    return all(_COMPARE[operator](value, item) for operator, item in wanted.items())


def _field(run: Run, key: str) -> Any:
    if key.startswith("config."):
        return run.config.get(key.removeprefix("config.").removesuffix(".value"))
    if key.startswith(("summary_metrics.", "summaryMetrics.")):
        return run.summary.get(key.partition(".")[2])
    if not hasattr(run, _FIELDS.get(key, key)):
        raise RefusalError(400, f"field {key} of a filter or an order is not known here")
    return getattr(run, _FIELDS.get(key, key))


def _sampled(rows: list[dict[str, Any]], spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that have every key; JSON has no NaN, so here it is a word."""
    first, last = spec.get("minStep", -math.inf), spec.get("maxStep", math.inf)
    keys = spec.get("keys")
    wanted = [
        {key: _json_number(row[key]) for key in keys or row}
        for row in rows
        if first <= row["_step"] <= last and all(key in row for key in keys or [])
    ]
    return _thin(wanted, spec.get("samples", 500))


def _json_number(value: Any) -> Any:
    is_bad = isinstance(value, float) and not math.isfinite(value)
    return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN") if is_bad else value


def _thin(rows: list[Any], size: int) -> list[Any]:
    return rows if len(rows) <= size else [rows[i * len(rows) // size] for i in range(size)]
