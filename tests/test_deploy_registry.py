"""Versions of a promotion: listed, verified, rolled back; killed in the making, and made again alike."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from deploy_sweep import promoted

from deploy.promote import PromoteOptions, promote
from deploy.registry import current_version, find_gguf, publish, rollback, verify, versions_table
from training.exceptions import ModelError, SweepError
from training.paths import PromotionPaths, SweepPaths, read_json

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> PromotionPaths:
    """The promoted version, shared: not to be changed."""
    return promoted(tmp_path_factory.getbasetemp())


@pytest.fixture
def sweep(version: PromotionPaths, tmp_path: Path) -> SweepPaths:
    """A sweep whose version 2, the current one, is version 1 once more; without large files."""
    paths = SweepPaths(tmp_path / "tiny")
    shutil.copytree(version.root, paths.promotion(1).root)
    shutil.copytree(version.root, paths.promotion(2).root)
    paths.current_promotion.write_text("0002\n")
    return paths


def _run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.registry", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _change(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def test_the_command_lists_verifies_and_rolls_back(sweep: SweepPaths) -> None:
    listed = _run(sweep.root)
    assert listed.returncode == 0
    assert re.search(r"^ *\* +2 +0 +60 .*Q4_K_M F16", listed.stdout, re.MULTILINE)
    assert _run(sweep.root, "--verify").returncode == 0

    rolled_back = _run(sweep.root, "--rollback")

    assert (rolled_back.returncode, rolled_back.stderr) == (0, "")
    assert current_version(sweep).root.name == "0001"
    card = sweep.promotion(2).card
    _change(card, card.read_bytes() + b"!")
    wrong = _run(sweep.root, "--verify", 2)
    assert wrong.returncode == 2
    assert "README.md is " in wrong.stdout
    assert (
        wrong.stderr.count("\n") == 1 and "version 0002 is not as it was promoted" in wrong.stderr
    )


def test_verification_finds_what_was_changed_removed_and_added(
    sweep: SweepPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    tampered = sweep.promotion(1)
    weights = tampered.adapter / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    _change(weights, bytes(content))
    tampered.modelfile.unlink()
    (tampered.root / "extra.txt").write_text("?")

    with pytest.raises(SweepError, match="version 0001 is not as it was promoted"):
        verify(sweep)

    printed = capsys.readouterr().out
    assert "adapter/adapter_model.safetensors has another SHA-256" in printed
    assert "Modelfile is missing" in printed
    assert "extra.txt is not in the manifest" in printed
    assert f"{sweep.promotion(2).root}: as promoted" in printed
    with pytest.raises(SweepError, match="0001: not as it was promoted"):
        rollback(sweep)
    assert current_version(sweep).root.name == "0002"


def test_a_rollback_goes_to_a_version_that_is_there(sweep: SweepPaths) -> None:
    with pytest.raises(SweepError, match=r"version 7 is not there \(there: 1, 2\)"):
        rollback(sweep, 7)
    assert rollback(sweep).root.name == "0001"
    with pytest.raises(SweepError, match="no version is older than the current one, 1"):
        rollback(sweep)
    assert rollback(sweep, 2).root.name == "0002"


def test_a_version_removed_by_hand_is_named_and_its_number_not_given_again(
    sweep: SweepPaths,
) -> None:
    shutil.rmtree(sweep.promotion(2).root)

    with pytest.raises(ModelError, match=r"names version 2, which is not there \(there: 1\)"):
        find_gguf(sweep.root)
    sweep.promotion_draft.mkdir()
    assert publish(sweep, PromotionPaths(sweep.promotion_draft)).root.name == "0003"
    shutil.rmtree(sweep.promotion(3).root)
    assert rollback(sweep).root.name == "0001"


KILLED_AFTER_RENAME = """
import os, sys
from pathlib import Path
from deploy.registry import publish
from training.paths import PromotionPaths, SweepPaths
rename = os.rename
os.rename = lambda old, new: (rename(old, new), os.kill(os.getpid(), 9))
paths = SweepPaths(Path(sys.argv[1]))
publish(paths, PromotionPaths(paths.promotion_draft))
"""


def test_a_version_published_by_a_promotion_that_was_killed_is_the_current_one(
    sweep: SweepPaths,
) -> None:
    shutil.copytree(sweep.promotion(1).root, sweep.promotion_draft)
    command = [sys.executable, "-c", KILLED_AFTER_RENAME, str(sweep.root)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert sweep.current_promotion.read_text() == "0002\n"

    assert current_version(sweep).root.name == "0003"
    assert find_gguf(sweep.root).parent.name == "0003"
    assert rollback(sweep).root.name == "0002"
    assert current_version(sweep).root.name == "0002"


def test_a_gguf_that_was_cut_off_is_not_run(sweep: SweepPaths) -> None:
    gguf = find_gguf(sweep.root)
    _change(gguf, gguf.read_bytes()[:1000])

    with pytest.raises(ModelError, match=r"is 1,000 bytes, but must be [\d,]+"):
        find_gguf(sweep.root)


def test_a_damaged_manifest_and_current_are_one_line(sweep: SweepPaths) -> None:
    _change(sweep.promotion(1).manifest, b"{")
    assert "damaged manifest" in versions_table(sweep).to_string()
    with pytest.raises(SweepError, match=r"manifest\.json: is damaged"):
        rollback(sweep)
    sweep.current_promotion.write_text("nothing")
    with pytest.raises(SweepError, match="is 'nothing', but must be a version's number"):
        find_gguf(sweep.root)


def test_published_files_are_read_only_and_say_where_they_come_from(
    version: PromotionPaths,
) -> None:
    files = [path for path in version.root.rglob("*") if path.is_file()]
    assert not any(path.stat().st_mode & 0o222 for path in files)
    manifest = read_json(version.manifest)
    assert manifest["data"]["test_hash"] and manifest["data"]["validation_hash"]
    assert manifest["seed"] == manifest["settings"]["seed"] and manifest["base_revision"] == "main"
    assert manifest["forced"] is False and {"commit", "dirty"} <= manifest["code"].keys()


@pytest.mark.slow
def test_a_killed_promotion_leaves_no_version_and_the_next_is_the_same_byte_for_byte(
    version: PromotionPaths, tmp_path: Path
) -> None:
    sweep = SweepPaths(tmp_path / "tiny")
    shutil.copytree(version.root.parent.parent, sweep.root)
    command = [sys.executable, "-m", "deploy.promote", str(sweep.root), "--output_name", "tiny"]
    with subprocess.Popen([*command, "--quantization", "Q4_K_M", "F16"], cwd=ROOT) as process:
        deadline = time.monotonic() + 120
        while not any(sweep.promotion_draft.glob("merged/*.safetensors")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert sweep.promotion_draft.is_dir() and not sweep.promotion(2).root.exists()
    assert current_version(sweep).root.name == "0001"

    options = PromoteOptions(quantization=["Q4_K_M", "F16"], output_name="tiny")
    again = promote(sweep.root, options)

    assert again.root.name == "0002" and not sweep.promotion_draft.exists()
    first, second = read_json(version.manifest), read_json(again.manifest)
    timed = {"README.md", "verification.json", "quantization.png"}
    assert first["files"].keys() == second["files"].keys()
    for name in first["files"].keys() - timed:
        assert first["files"][name] == second["files"][name], name
    assert first["content_sha256"] == second["content_sha256"]
