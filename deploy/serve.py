"""Serves a promoted model as an OpenAI-compatible API: llama-cpp-python's own server, on this machine alone.

    python -m deploy.serve runs/NAME
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What does `math.sqrt` do in Python?"}]}'

`/health` answers 200 once the model is loaded. To listen on another address needs an API key
(`LORALOOM_API_KEY`), which clients send as `Authorization: Bearer KEY`.
"""

import errno
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.gguf_model import last_error, load_llama_cpp
from deploy.llama_cpp_wheel import num_cores
from deploy.registry import find_gguf
from training.cli import make_parser, parse, run_command
from training.exceptions import ConfigError, ModelError

API_KEY = "LORALOOM_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class ServeOptions:
    """Options of `python -m deploy.serve`."""

    host: str = field(
        default="127.0.0.1",
        metadata={"help": f"Address to listen on; another than this machine's needs {API_KEY}."},
    )
    port: int = field(default=8000, metadata={"help": "Port; 0 is any free one."})
    context_length: int = field(
        default=4096, metadata={"help": "Longest conversation in tokens, if the model takes it."}
    )


def main() -> None:
    parser = make_parser("deploy.serve", __doc__ or "", [ServeOptions])
    parser.add_argument("promoted", help="a sweep's directory, promoted/NUMBER, or a .gguf file")
    options, positional = parse(parser)
    serve(Path(positional.promoted), options)


def serve(promoted: Path, options: ServeOptions) -> None:
    """Serves until it is interrupted.

    Raises:
        ConfigError: an option is wrong, the port is taken, or a key is missing.
        ModelError: nothing promoted is there, or llama.cpp cannot load it.
    """
    import uvicorn

    key = os.environ.get(API_KEY) or None
    if options.host not in LOOPBACK and key is None:
        raise ConfigError(
            f"--host is {options.host}, which others can reach: {API_KEY} must be set then"
        )
    if not 0 <= options.port < 2**16:
        raise ConfigError(f"--port is {options.port}, but must be >= 0 and < 65536")
    if options.context_length < 1:
        raise ConfigError(f"--context_length is {options.context_length}, but must be >= 1")
    path = find_gguf(promoted)
    listener = _listen(options.host, options.port)
    app = make_app(path, key, options)
    port = listener.getsockname()[1]
    print(f"{path.name}: http://{options.host}:{port}/v1 (Ctrl-C ends it)", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with listener:
        server.run(sockets=[listener])


def make_app(path: Path, api_key: str | None, options: ServeOptions) -> Any:
    """llama-cpp-python's application with the model loaded, a health check, and without its open doors.

    Raises:
        ModelError: llama.cpp cannot load the file.
    """
    load_llama_cpp()
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings
    from starlette.middleware.cors import CORSMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    model = ModelSettings(
        model=str(path),
        model_alias=path.stem,
        n_ctx=options.context_length,
        n_threads=num_cores(),
        n_threads_batch=num_cores(),
        chat_format="chat_template.default",  # the file's own, and no guess
        verbose=False,
    )
    try:
        app = create_app(server_settings=ServerSettings(api_key=api_key), model_settings=[model])
    except (ValueError, OSError) as error:
        raise ModelError(
            f"{path}: llama.cpp cannot load this file as a GGUF model{last_error()}"
        ) from error
    # Theirs lets every web page in the user's browser talk to the model.
    app.user_middleware = [m for m in app.user_middleware if m.cls is not CORSMiddleware]
    if options.host in LOOPBACK:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok", "model": path.stem}

    return app


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used: {error}"
        raise ConfigError(f"--port is {port} on --host {host}, but that {reason}") from None


if __name__ == "__main__":
    run_command(main)
