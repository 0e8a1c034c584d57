"""The server, asked by the real `openai` client and by plain HTTP."""

import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from deploy_sweep import promoted

from training.paths import read_json

ROOT = Path(__file__).resolve().parents[1]
KEY = "a-key-for-this-test"


def start(*arguments: str, **env: str) -> subprocess.Popen[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "LORALOOM_API_KEY"}
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.serve", *arguments],
        cwd=ROOT,
        env={**inherited, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    version = promoted(tmp_path_factory.getbasetemp())
    return version.root / next(iter(read_json(version.manifest)["ggufs"].values()))


@pytest.fixture(scope="module")
def url(gguf: Path) -> Iterator[str]:
    process = start(str(gguf), "--port", "0", LORALOOM_API_KEY=KEY)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "http://127.0.0.1:" in line, process.communicate()
    yield line.split(": ", 1)[1].split("/v1", maxsplit=1)[0]
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors


def status(url: str, path: str, **headers: str) -> int:
    request = urllib.request.Request(url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_the_openai_client_gets_an_answer_that_ends(url: str, gguf: Path) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        assert [model.id for model in client.models.list()] == [gguf.stem]
        question = [{"role": "user", "content": "Is 7 even or odd?"}]
        whole = client.chat.completions.create(
            model=gguf.stem, messages=question, temperature=0, max_tokens=60  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        assert whole.choices[0].finish_reason == "stop"
        text = whole.choices[0].message.content
        assert text
        streamed = client.chat.completions.create(
            model=gguf.stem, messages=question, temperature=0, max_tokens=60, stream=True  # pyright: ignore[reportArgumentType, reportCallIssue]
        )  # fmt: skip
        pieces = [chunk.choices[0].delta.content or "" for chunk in streamed]
        assert len(pieces) > 2
        assert "".join(pieces) == text


def test_a_wrong_key_is_refused_and_the_health_check_needs_none(url: str) -> None:
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    assert status(url, "/health") == 200


def test_another_hosts_name_and_other_origins_get_nothing(url: str) -> None:
    assert status(url, "/health", Host="evil.example") == 400
    request = urllib.request.Request(url + "/health", headers={"Origin": "https://evil.example"})
    with urllib.request.urlopen(request, timeout=30) as response:
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "LORALOOM_API_KEY must be set"),
        (["--port", "70000"], "--port is 70000, but must be >= 0 and < 65536"),
        (["--context_length", "0"], "--context_length is 0, but must be >= 1"),
    ],
)
def test_a_wrong_option_is_one_line(gguf: Path, arguments: list[str], message: str) -> None:
    process = start(str(gguf), *arguments)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message in errors
    assert len(errors.strip().splitlines()) == 1


def test_a_port_that_is_taken_and_a_file_that_is_no_model_are_one_line(
    gguf: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(str(gguf), "--port", str(taken.getsockname()[1]))
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "is taken" in errors
    (tmp_path / "no.gguf").write_bytes(b"nothing")
    process = start(str(tmp_path / "no.gguf"), "--port", "0")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "cannot load this file" in errors
    assert "Traceback" not in errors
