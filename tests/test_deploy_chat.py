"""Talking to a promoted model."""

import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deploy_sweep import promoted
from transformers import AutoTokenizer

from deploy.chat import (
    ChatOptions,
    _converse,
    _read_question,
    find_gguf,
    latest_turns,
    open_chat,
    prompt_tokens,
    stream_answer,
)
from training.exceptions import ConfigError, ModelError
from training.paths import PromotionPaths, SweepPaths

ROOT = Path(__file__).parent.parent


@pytest.fixture
def version(tmp_path_factory: pytest.TempPathFactory) -> PromotionPaths:
    """The promoted version, shared: not to be changed."""
    return promoted(tmp_path_factory.getbasetemp())


def test_a_prompt_is_answered_once_and_nothing_else_is_printed(version: PromotionPaths) -> None:
    sweep = version.root.parent.parent
    command = [sys.executable, "-m", "deploy.chat", str(sweep), "--prompt", "Is 12 even?"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout in ("Yes, it is.\n", "No, it is odd.\n")


def test_a_sweep_a_version_and_a_file_lead_to_the_same_gguf(
    version: PromotionPaths, tmp_path: Path
) -> None:
    sweep = SweepPaths(tmp_path / "tiny")
    shutil.copytree(version.root, sweep.promotion(2).root)
    sweep.current_promotion.write_text("0002\n")
    expected = sweep.promotion(2).gguf("tiny", "Q4_K_M")

    for path in (sweep.root, sweep.promoted, sweep.promotion(2).root, expected):
        assert find_gguf(path) == expected


def test_a_place_without_a_promotion_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds nothing promoted; `python -m deploy\.promote"):
        find_gguf(tmp_path)
    with pytest.raises(ModelError, match="is not there"):
        find_gguf(tmp_path / "none")


def test_the_prompt_has_the_tokens_that_transformers_renders_with_one_bos(
    version: PromotionPaths,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(version.merged)
    messages = [{"role": "user", "content": "Is 7 even?"}]
    messages += [{"role": "assistant", "content": "No."}, {"role": "user", "content": "And 8?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    model = open_chat(find_gguf(version.root), 128)

    tokens = prompt_tokens(model, messages)
    usage = model.create_chat_completion(messages, max_tokens=1)["usage"]

    assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens[:2].count(tokenizer.bos_token_id) == 1
    assert usage["prompt_tokens"] == len(tokens)


def test_an_answer_is_streamed_in_pieces(version: PromotionPaths) -> None:
    model = open_chat(find_gguf(version.root), 128)

    pieces = list(stream_answer(model, [{"role": "user", "content": "Is 7 even?"}], ChatOptions()))

    assert len(pieces) > 2
    assert "".join(pieces).endswith(".")


def test_a_conversation_keeps_its_turns_and_ends_at_end_of_input(
    version: PromotionPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_chat(find_gguf(version.root), 256)
    monkeypatch.setattr("sys.stdin", io.StringIO("Is 7 even?\n\nIs 8 even?\n"))

    _converse(model, ChatOptions(max_tokens=20))

    printed = capsys.readouterr().out
    assert printed.count(".\n") == 3  # The line about Ctrl-D and two answers.


def test_several_lines_are_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'one\n"""\ntwo\n\n  three\n"""\nfour\\\nfive\n"""\nsix'
    monkeypatch.setattr("sys.stdin", io.StringIO(text))

    questions = [_read_question() for _ in range(5)]

    assert questions == ["one", "two\n\n  three", "four\nfive", "six", None]


def test_a_system_prompt_is_part_of_every_prompt(
    version: PromotionPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_chat(find_gguf(version.root), 256)
    asked: list[list[dict[str, str]]] = []
    complete = model.create_chat_completion

    def watch(messages: list[dict[str, str]], **options: Any) -> Any:
        asked.append(messages)
        return complete(messages, **options)

    monkeypatch.setattr(model, "create_chat_completion", watch)
    monkeypatch.setattr("sys.stdin", io.StringIO("Is 7 even?\n" * 9))
    _converse(model, ChatOptions(max_tokens=20, system="Be terse."))

    assert len(asked) == 9
    assert all(messages[0] == {"role": "system", "content": "Be terse."} for messages in asked)
    assert [len(messages) for messages in asked[:2]] == [2, 4]
    assert len(asked[-1]) < 18  # the oldest turns went, the system prompt did not
    assert len(prompt_tokens(model, asked[-1])) <= 236


def test_a_template_without_system_prompts_is_one_line(version: PromotionPaths) -> None:
    model = open_chat(find_gguf(version.root), 128)
    refuses = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    )
    model.metadata["tokenizer.chat_template"] = refuses
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]

    with pytest.raises(ConfigError, match="takes no conversation of system and user: No system"):
        latest_turns(model, messages, ChatOptions(max_tokens=8))


def test_ctrl_c_ends_the_answer_and_not_the_conversation(
    version: PromotionPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_chat(find_gguf(version.root), 256)
    complete, num_asked = model.create_chat_completion, 0

    def interrupt(messages: list[dict[str, str]], **options: Any) -> Iterator[Any]:
        nonlocal num_asked
        num_asked += 1
        for number, chunk in enumerate(complete(messages, **options)):
            if num_asked == 1 and number == 3:
                raise KeyboardInterrupt
            yield chunk

    monkeypatch.setattr(model, "create_chat_completion", interrupt)
    monkeypatch.setattr("sys.stdin", io.StringIO("Is 7 even?\nIs 8 even?\n"))

    _converse(model, ChatOptions(max_tokens=20))

    first, second = capsys.readouterr().out.splitlines()[1:3]
    assert num_asked == 2
    assert not first.endswith(".") and second.endswith(".")


def test_a_conversation_longer_than_the_context_forgets_its_oldest_turns(
    version: PromotionPaths,
) -> None:
    model = open_chat(find_gguf(version.root), 256)
    messages = []
    for number in range(9):
        messages += [{"role": "user", "content": f"Is {number} even?"}]
        messages += [{"role": "assistant", "content": "Yes, it is."}]
    messages += [{"role": "user", "content": "Is 100 even?"}]

    kept = latest_turns(model, messages, ChatOptions(max_tokens=150))

    assert kept == messages[-len(kept) :]
    assert 1 < len(kept) < len(messages)
    assert kept[0]["role"] == "user"
    with pytest.raises(ConfigError, match=r"the prompt is \d+ tokens, but must be at most"):
        latest_turns(model, messages[:1], ChatOptions(max_tokens=250))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--max_tokens", "0"], "--max_tokens is 0, but must be >= 1"),
        (["--temperature", "-1"], "--temperature is -1.0, but must be >= 0"),
        (["--max_tokens", "9000"], "--max_tokens is 9000, but must be < --context_length"),
    ],
)
def test_a_wrong_option_is_one_line(
    option: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deploy import chat

    monkeypatch.setattr("sys.argv", ["chat", "nowhere", *option])

    with pytest.raises(ConfigError, match=message):
        chat.main()
