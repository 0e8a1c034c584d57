import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from training.cli import run_command
from training.exceptions import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def run(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "training.run", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_lists_every_setting_with_its_default() -> None:
    page = run("--help")
    assert page.returncode == 0
    text = " ".join(page.stdout.split())
    assert "--learning_rate" in text
    assert "Peak learning rate of AdamW; > 0. (default: 0.0002)" in text
    assert "--output_dir" in text


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--lora_r", "0"], "error: --lora_r is 0, but must be >= 1"),
        (["--max_steps", "-5"], "error: --max_steps is -5, but must be >= 1"),
        (["--learning_rate", "0"], "error: --learning_rate is 0.0, but must be > 0"),
        (
            ["--learnin_rate", "1"],
            "--learnin_rate is not an option; did you mean '--learning_rate'?",
        ),
        (["--max_steps", "1.5"], "argument --max_steps: invalid int value: '1.5'"),
        (
            ["--dataset_name", "gone.jsonl"],
            "error: dataset_name is gone.jsonl, but there is no such",
        ),
    ],
)
def test_a_wrong_option_is_one_line_and_status_2(
    args: list[str], line: str, tmp_path: Path
) -> None:
    done = run(*args, "--output_dir", str(tmp_path / "trial"), "--report_to", "none")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert line in done.stderr


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("x is 1, but must be 2"), 2, "error: x is 1, but must be 2\n"),
        (OSError(errno.ENOSPC, "full", "a/b"), 2, "error: a/b: no space left on the disk\n"),
        (OSError(errno.EDQUOT, "quota"), 2, "error: output: no space left on the disk\n"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            2,
            "error: output: no space left on the disk\n",
        ),
        (
            SafetensorError("I/O error: Disk quota exceeded (os error 122)"),
            2,
            "error: output: no space left on the disk\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "a"),
            2,
            "error: a: Permission denied\n",
        ),
        (PermissionError(errno.EPERM, "Not permitted", b"a"), 2, "error: a: Not permitted\n"),
        (OSError(errno.EROFS, "Read-only", "a"), 2, "error: a: Read-only\n"),
        (NotADirectoryError(errno.ENOTDIR, "No directory", "a"), 2, "error: a: No directory\n"),
        (FileExistsError(errno.EEXIST, "File exists", "a"), 2, "error: a: File exists\n"),
        (OSError(errno.ENAMETOOLONG, "Too long", "a"), 2, "error: a: Too long\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted; the same command continues\n"),
    ],
)
def test_an_error_of_the_users_ends_a_command_with_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_info:
        run_command(main)
    assert exit_info.value.code == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    "fault",
    [
        ZeroDivisionError(),
        FileNotFoundError(errno.ENOENT, "No such file", "a"),
        PermissionError(errno.EACCES, "Permission denied"),  # of no file: the user sees no reason
        SafetensorError("Error while deserializing header: HeaderTooLarge"),
    ],
)
def test_a_fault_of_ours_keeps_its_traceback(fault: Exception) -> None:
    def main() -> None:
        raise fault

    with pytest.raises(type(fault)):
        run_command(main)


@pytest.mark.parametrize("module", ["sweeps.run", "deploy.promote"])
def test_ctrl_c_while_libraries_load_is_one_line(module: str) -> None:
    code = (
        "import runpy, sys, training, os, signal\n"
        "class Late:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('optuna', 'transformers'):\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Late())\n"
        f"sys.argv = ['x', '/nowhere']; runpy.run_module({module!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode in (-signal.SIGINT, 130)
    assert done.stderr.strip() in ("interrupted", "interrupted; the same command continues")
