"""Publishing, by the real huggingface_hub client: against a stand-in of the hub, and once on the real one."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from deploy_sweep import promoted
from hub_server import TOKEN, USER, Hub, running_hub
from huggingface_hub import HfApi, ModelCard, SpaceCard, constants, get_token

from deploy.push import main
from training.cli import run_command
from training.paths import PromotionPaths, SweepPaths, read_json, write_json

ROOT = Path(__file__).parent.parent
REPO = f"models/{USER}/tiny"
# huggingface_hub 2.4 itself calls httpx2 in the old way when it sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def version(tmp_path_factory: pytest.TempPathFactory) -> PromotionPaths:
    """The promoted version, shared: not to be changed."""
    return promoted(tmp_path_factory.getbasetemp())


def environment(hub: Hub, home: Path) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGG"))
    }
    added = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**kept, **added, "HF_TOKEN": TOKEN}


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


Push = Callable[..., Done]


@pytest.fixture
def push(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Push:
    """`python -m deploy.push`, with the client's settings turned to the stand-in."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))

    def run(*arguments: object, token: str = TOKEN) -> Done:
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr("sys.argv", ["push", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_command(main)
        out, err = capsys.readouterr()
        assert TOKEN not in out + err
        return Done(int(ended.value.code or 0), out, err)

    return run


def same_but_for_texts(version: PromotionPaths, sent: dict[str, bytes], names: set[str]) -> None:
    """Each of these files is bit-exact on the hub, and what is there is what its manifest lists."""
    for name in names:
        assert sent[name] == (version.root / name).read_bytes(), name
    listed = json.loads(sent["manifest.json"])["files"]
    assert set(sent) == {*listed, "manifest.json", ".gitattributes"}
    for name, entry in listed.items():
        assert hashlib.sha256(sent[name]).hexdigest() == entry["sha256"]


def test_every_file_arrives_and_the_repo_is_private(
    hub: Hub, push: Push, version: PromotionPaths, tmp_path: Path
) -> None:
    done = push(version.root, "tiny", "--merged", "--space")

    assert done.returncode == 0, done.stderr
    assert hub.repos[REPO]["private"] is True
    assert hub.repos[f"spaces/{USER}/tiny"]["private"] is True
    sent = hub.files(REPO)
    names = set(read_json(version.manifest)["files"])
    assert {name for name in sent if name.endswith(".gguf")} >= {
        "tiny-Q4_K_M.gguf", "tiny-F16.gguf"
    }  # fmt: skip
    assert set(sent) == {*names, "manifest.json", ".gitattributes"}
    exact = {name for name in names if not name.endswith((".json", ".md"))}
    same_but_for_texts(version, sent, exact | {"merged/tokenizer.json"})

    again = push(version.root, "tiny", "--merged", "--space")
    assert again.stdout.count("files already") == 2
    assert len(hub.received) == len(set(hub.received))


def test_no_path_of_this_machine_is_published(
    hub: Hub, push: Push, version: PromotionPaths, tmp_path: Path
) -> None:
    settings = read_json(version.manifest)["settings"]
    here = str(Path(settings["dataset_name"]).parent)
    assert here in version.manifest.read_text("utf-8")

    push(version.root, "tiny", "--space")

    card = hub.files(REPO)["README.md"].decode()
    assert "merged/" not in card and "`adapter/` loads with PEFT." in card  # as what is there
    for repo in (REPO, f"spaces/{USER}/tiny"):
        for name, content in hub.files(repo).items():
            assert here.encode() not in content, name
            assert str(ROOT).encode() not in content, name
    assert json.loads(hub.files(REPO)["manifest.json"])["settings"]["dataset_name"] == (
        "questions.jsonl"
    )


def test_the_cards_have_metadata_that_the_hub_reads(
    hub: Hub, push: Push, version: PromotionPaths, tmp_path: Path
) -> None:
    push(version.root, "tiny", "--space", "--license", "apache-2.0")

    data = ModelCard(hub.files(REPO)["README.md"].decode()).data
    losses = read_json(version.verification)["losses"]["loss"]
    assert (data["license"], data["pipeline_tag"]) == ("apache-2.0", "text-generation")
    results: Any = data["eval_results"]
    assert {result.dataset_split for result in results} == {"test"}
    assert round(losses["merged"], 4) in {round(result.metric_value, 4) for result in results}
    space = SpaceCard(hub.files(f"spaces/{USER}/tiny")["README.md"].decode()).data
    assert (space["sdk"], space["app_file"]) == ("gradio", "app.py")
    assert space["models"] == [f"{USER}/tiny"]
    config = json.loads(hub.files(f"spaces/{USER}/tiny")["space.json"])
    assert config["model_repo"] == f"{USER}/tiny"
    assert config["model_file"] in hub.files(REPO)


@pytest.mark.parametrize("end", ["refused", "killed"])
def test_a_push_that_failed_goes_on_and_sends_nothing_twice(
    hub: Hub, push: Push, version: PromotionPaths, tmp_path: Path, end: str
) -> None:
    target = hashlib.sha256((version.root / "tiny-Q4_K_M.gguf").read_bytes()).hexdigest()
    if end == "refused":
        hub.refuse = target
        done = push(version.root, "tiny")
        assert done.returncode == 2
        [line] = done.stderr.strip().splitlines()
        assert "tiny-Q4_K_M.gguf" in line
        assert line.endswith("the same command goes on from here")
    else:
        hub.hang = target
        command = [sys.executable, "-m", "deploy.push", str(version.root), "tiny"]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment(hub, tmp_path), stdout=subprocess.DEVNULL
        ) as process:
            assert hub.hanging.wait(60)
            process.kill()
    assert set(hub.files(REPO)) == {".gitattributes"}
    finished = {digest for digest, _ in hub.received} - {target}
    assert finished
    hub.refuse = hub.hang = ""
    hub.received.clear()

    done = push(version.root, "tiny")

    assert done.returncode == 0, done.stderr
    assert target in {digest for digest, _ in hub.received}
    assert finished.isdisjoint(digest for digest, _ in hub.received)
    same_but_for_texts(version, hub.files(REPO), {"tiny-Q4_K_M.gguf", "tiny-F16.gguf"})
    assert len(hub.repos[REPO]["commits"]) == 1


def test_an_update_that_failed_leaves_the_version_before_whole(
    hub: Hub, push: Push, version: PromotionPaths, tmp_path: Path
) -> None:
    assert push(version.root, "tiny").returncode == 0
    before = dict(hub.files(REPO))
    second = other_version(version, tmp_path)
    changed = (second.root / "tiny-Q4_K_M.gguf").read_bytes()
    hub.refuse = hashlib.sha256(changed).hexdigest()
    sent_before = len(hub.received)

    assert push(second.root, "tiny", "--update").returncode == 2

    assert hub.files(REPO) == before
    hub.refuse = ""
    assert push(second.root, "tiny", "--update").returncode == 0
    same_but_for_texts(second, hub.files(REPO), {"tiny-Q4_K_M.gguf", "tiny-F16.gguf"})
    assert hub.files(REPO)["tiny-Q4_K_M.gguf"] == changed
    assert len(hub.repos[REPO]["commits"]) == 2
    digests = [digest for digest, _ in hub.received[sent_before:]]
    assert digests == [hashlib.sha256(changed).hexdigest()] * 2


def test_what_another_commits_meanwhile_is_not_overwritten(
    hub: Hub, push: Push, version: PromotionPaths
) -> None:
    hub.intrude = True

    done = push(version.root, "tiny")

    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert "A commit has happened since" in line
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert push(version.root, "tiny").returncode == 0


def other_version(version: PromotionPaths, folder: Path) -> PromotionPaths:
    """The version once more, with another Q4_K_M file."""
    paths = SweepPaths(folder / "tiny").promotion(2)
    shutil.copytree(version.root, paths.root)
    gguf = paths.root / "tiny-Q4_K_M.gguf"
    gguf.chmod(0o644)
    gguf.write_bytes(gguf.read_bytes() + b"other")
    manifest = read_json(paths.manifest)
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    manifest["files"][gguf.name] = {"sha256": digest, "size_bytes": gguf.stat().st_size}
    write_json(paths.manifest, manifest)
    return paths


def test_a_repo_that_exists_is_refused_until_update(
    hub: Hub, push: Push, version: PromotionPaths, tmp_path: Path
) -> None:
    files = {"README.md": b"theirs", "weights.gguf": b"theirs"}
    hub.repos[REPO] = {"private": False, "sdk": None, "files": files, "commits": []}

    done = push(version.root, "tiny")

    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert "exists and holds something else; --update replaces" in line
    assert hub.received == []
    assert hub.files(REPO)["README.md"] == b"theirs"
    done = push(version.root, "tiny", "--update")
    assert "stays public" in done.stdout
    assert hub.files(REPO)["README.md"] != b"theirs"
    assert hub.files(REPO)["weights.gguf"] == b"theirs"  # not ours to delete


def test_an_update_removes_what_the_version_before_had_sent(
    hub: Hub, push: Push, version: PromotionPaths, tmp_path: Path
) -> None:
    assert push(version.root, "tiny", "--space").returncode == 0
    sweep = SweepPaths(tmp_path / "tiny")
    second = sweep.promotion(2)
    shutil.copytree(version.root, second.root)
    manifest = read_json(second.manifest)
    (second.root / "tiny-F16.gguf").unlink()
    del manifest["files"]["tiny-F16.gguf"], manifest["ggufs"]["F16"]
    write_json(second.manifest, manifest)
    sweep.current_promotion.write_text("0002\n")

    assert "exists and holds something else" in push(sweep.root, "tiny").stderr
    assert push(sweep.root, "tiny", "--space", "--update").returncode == 0

    assert "tiny-F16.gguf" not in hub.files(REPO)
    same_but_for_texts(second, hub.files(REPO), {"tiny-Q4_K_M.gguf"})


def test_a_dry_run_lists_every_file_and_asks_nothing(
    hub: Hub, push: Push, version: PromotionPaths, tmp_path: Path
) -> None:
    done = push(version.root, "tiny", "--space", "--merged", "--dry_run", token="")

    assert done.returncode == 0
    assert hub.requests == []
    for name in (*read_json(version.manifest)["files"], "manifest.json", "app.py", "space.json"):
        assert f"  {name}" in done.stdout
    assert "in all" in done.stdout


def test_a_tampered_file_is_refused_before_anything_is_sent(
    hub: Hub, push: Push, version: PromotionPaths, tmp_path: Path
) -> None:
    copy = tmp_path / "0001"
    shutil.copytree(version.root, copy)
    with open(copy / "tiny-Q4_K_M.gguf", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))

    done = push(copy, "tiny")

    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert "tiny-Q4_K_M.gguf has another SHA-256, but must be as promoted" in line
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("tiny", "", "there is no Hugging Face token: set HF_TOKEN"),
        ("tiny", "hf_wrong", "Invalid user token"),
        ("a/b/c", TOKEN, "repo_id is 'a/b/c', but must be USER/NAME"),
    ],
)
def test_bad_input_is_one_line(
    hub: Hub,
    push: Push,
    version: PromotionPaths,
    tmp_path: Path,
    name: str,
    token: str,
    message: str,
) -> None:
    done = push(version.root, name, token=token)

    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert message in line
    assert hub.repos == {}


def test_a_token_that_may_not_write_is_one_line(
    hub: Hub, push: Push, version: PromotionPaths
) -> None:
    hub.read_only = True

    done = push(version.root, "tiny")

    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert "your token may not write here" in line


@pytest.mark.network
@pytest.mark.skipif(get_token() is None, reason="no Hugging Face token")
def test_the_real_hub_takes_a_version(version: PromotionPaths) -> None:
    api = HfApi()
    repo = f"{api.whoami()['name']}/loraloom-test-{uuid.uuid4().hex[:8]}"
    command = [sys.executable, "-m", "deploy.push", str(version.root), repo]
    env = {**os.environ, "HF_HUB_OFFLINE": "0"}
    try:
        subprocess.run(command, cwd=ROOT, env=env, check=True)
        assert api.model_info(repo).private
        sent = {entry.path for entry in api.list_repo_tree(repo, recursive=True)}
        assert {"README.md", "manifest.json", "tiny-Q4_K_M.gguf"} <= sent
        again = subprocess.run(
            command, cwd=ROOT, env=env, check=True, capture_output=True, text=True
        )
        assert "files already" in again.stdout
    finally:
        api.delete_repo(repo, missing_ok=True)
