"""A live page over every sweep of a directory: `python -m analysis.dashboard [runs]`.

Dash asks every two seconds with the versions of what the page shows (`dashboard_pages`); files are read
incrementally (`live`), and what has not changed is not sent again. A sweep is changed by its runner alone:
the buttons (`dashboard_actions`) leave requests for it.
"""

import errno
import logging
import os
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.cli import make_parser, parse, run_command

if TYPE_CHECKING:
    from dash import Dash

_DESCRIPTION = """\
Live page over the sweeps of a directory: leaderboard, loss curves, time line, prunings, findings; buttons
that stop a trial, add seeds, queue a setting and promote. It needs no network.

  python -m analysis.dashboard             every sweep in runs/, at http://127.0.0.1:8050/
  python -m analysis.dashboard runs/NAME   one sweep"""


@dataclass(kw_only=True)
class DashboardOptions:
    """Options of `python -m analysis.dashboard`."""

    port: int = field(
        default=8050, metadata={"help": "TCP port; 0 takes a free one.", "_limits": {"ge": 0}}
    )
    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address to listen at. One that others can reach needs a --token."},
    )
    token: str = field(
        default="",
        metadata={"help": "Text that a browser must bring along once, as ?token=TEXT."},
    )
    read_only: bool = field(
        default=False, metadata={"help": "Show no buttons, and change nothing."}
    )


def main() -> None:
    parser = make_parser("analysis.dashboard", _DESCRIPTION, [DashboardOptions])
    parser.add_argument("runs", nargs="?", default="runs", help="directory of sweeps, or one sweep")
    options, positional = parse(parser)
    serve(Path(positional.runs), options)


def serve(root: Path, options: DashboardOptions) -> None:
    """Answers until it is interrupted.

    Raises:
        SweepError: `root` is not a directory.
        ConfigError: the address cannot be had, or needs a token.
    """
    from werkzeug.serving import WSGIRequestHandler, make_server

    from analysis.dashboard_guard import Guard
    from training.exceptions import SweepError

    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        raise SweepError(
            f"{root} is not a directory that can be read, but must be one of sweeps; "
            "python -m sweeps.run CONFIG makes runs/"
        )
    Guard(options.host, options.port, options.token)  # refuses an open address before it is taken
    listener = _listen(options)
    host, port = options.host, listener.getsockname()[1]
    app = make_app(root, replace(options, port=port))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # two lines a page and second

    class KeepAlive(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

    server = make_server(
        host, port, app.server, threaded=True, request_handler=KeepAlive, fd=listener.fileno()
    )
    shown = f"[{host}]" if ":" in host else host
    end = "?token=TOKEN" if options.token else ""
    print(f"sweeps of {root}: http://{shown}:{port}/{end}   (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()


def make_app(root: Path, options: DashboardOptions) -> "Dash":
    """The application, not served yet."""
    import flask
    from dash import Dash

    from analysis.dashboard_guard import Guard
    from analysis.dashboard_pages import Pages
    from analysis.dashboard_style import index_page
    from analysis.live import Runs

    guard = Guard(options.host, options.port, options.token)
    server: Any = flask.Flask("loraloom")
    app = Dash(
        "loraloom",
        server=server,
        # Dash serves every file below this folder: it must be one that is not there.
        assets_folder=str(root / ".no-assets"),
        include_assets_files=False,
        serve_locally=True,
        suppress_callback_exceptions=True,  # parts of a page come and go
        title="Loraloom",
        update_title="",
        index_string=index_page(),
    )
    pages = Pages(Runs(root), root, is_read_only=options.read_only)
    pages.attach(app)

    @server.get("/sweep/<name>/trials.csv")
    def trials_csv(name: str) -> Any:
        text = pages.csv(name)
        if text is None:
            return flask.Response("no such sweep\n", 404, mimetype="text/plain")
        disposition = {"Content-Disposition": 'attachment; filename="trials.csv"'}
        return flask.Response(text, mimetype="text/csv", headers=disposition)

    guard.protect(server, app.csp_hashes())
    return app


def _listen(options: DashboardOptions) -> socket.socket:
    from training.exceptions import ConfigError

    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port is {options.port}, but must be from 0 to 65535")
    listener = None
    try:
        [first, *_] = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = first
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(64)
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"--port is {options.port}, which another program has; "
                f"--port {options.port % 65535 + 1} may be free"
            ) from None
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--host {options.host} --port {options.port} cannot be listened at: {reason}"
        ) from None
    return listener


if __name__ == "__main__":
    run_command(main)
