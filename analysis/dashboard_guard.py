"""Who may ask the dashboard: checks of every request before anything else sees it.

A page elsewhere may send a browser here under another name (DNS rebinding: checked by Host) or in its own
name (checked by Origin). An address that others can reach needs a token: in the URL once, then as a cookie.
"""

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import flask

from training.exceptions import ConfigError

SHORTEST_TOKEN = 8
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Guard:
    """What a request must bring along."""

    host: str
    port: int
    token: str = ""

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.token:
            raise ConfigError(
                f"--host is {self.host!r}, which others may reach, so there must be a --token, too"
            )
        if self.token and len(self.token) < SHORTEST_TOKEN:
            raise ConfigError(
                f"--token has {len(self.token)} characters, but must have {SHORTEST_TOKEN} or more"
            )

    def protect(self, server: flask.Flask, script_hashes: Sequence[str]) -> None:
        """Puts the checks before, and the headers on, everything that `server` answers."""
        policy = (
            f"default-src 'none'; script-src 'self' {' '.join(script_hashes)}; "
            "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
            "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
        )

        @server.before_request
        def check() -> flask.Response | None:
            return self._refuse()

        @server.after_request
        def finish(response: flask.Response) -> flask.Response:
            response.headers.update({**_HEADERS, "Content-Security-Policy": policy})
            if self.token and response.status_code < 400 and "token" in flask.request.args:
                response.set_cookie(
                    self._cookie, self._proof, httponly=True, samesite="Strict", path="/"
                )
            return response

    @property
    def _cookie(self) -> str:
        return f"loraloom_{self.port}"  # a browser sends cookies to every port of a host

    @property
    def _proof(self) -> str:
        """What the cookie holds: it says that the token was known, and not the token."""
        return hmac.new(self.token.encode(), b"loraloom dashboard", hashlib.sha256).hexdigest()

    def _refuse(self) -> flask.Response | None:
        request = flask.request
        if not self._is_own_name(request.host):
            return _answer(403, "the Host header names another machine")
        if request.method not in ("GET", "HEAD", "POST"):
            return _answer(405, "only GET and POST are answered")
        origin = request.headers.get("Origin")
        if request.method == "POST" and origin is not None and not _is_same(origin, request.host):
            return _answer(403, "the Origin header names another page")
        if self.token and not self._knows_token(request):
            return _answer(401, "open the address with ?token=TOKEN at its end")
        return None

    def _knows_token(self, request: Any) -> bool:
        given = request.args.get("token", "")
        if hmac.compare_digest(given.encode(), self.token.encode()):
            return True
        return hmac.compare_digest(
            request.cookies.get(self._cookie, "").encode(), self._proof.encode()
        )

    def _is_own_name(self, host: str) -> bool:
        name = (urlsplit(f"//{host}").hostname or "") if host else ""
        if is_loopback(name) or name == self.host:
            return True
        # Rebinding needs a name: an address says where the browser really went.
        return not is_loopback(self.host) and (_is_address(name) or name in _own_names())


def is_loopback(host: str) -> bool:
    """Whether only this machine can ask there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_same(origin: str, host: str) -> bool:
    return urlsplit(origin).netloc == host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _own_names() -> set[str]:
    return {socket.gethostname().lower(), socket.getfqdn().lower()}


def _answer(status: int, text: str) -> flask.Response:
    return flask.Response(f"{text}\n", status, mimetype="text/plain")
