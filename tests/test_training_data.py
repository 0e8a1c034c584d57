import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config import TrialConfig
from training.data import DataSplits, content_hash, load_splits, split_of
from training.exceptions import DataError
from training.model import load_tokenizer


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"instruction": question, "output": answer}


@pytest.fixture
def load(tmp_path: Path, tiny_settings: dict[str, Any]) -> Any:
    def load(records: list[dict[str, Any]], **settings: Any) -> DataSplits:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        config = TrialConfig.from_dict({**tiny_settings, "dataset_name": str(path), **settings})
        return load_splits(config, load_tokenizer(config))

    return load


MANY = [talk(f"Is {number} even?", "Yes." if number % 2 == 0 else "No.") for number in range(100)]


def ids_of(splits: DataSplits) -> dict[str, set[str]]:
    return {
        name: set(getattr(splits, name)["example_id"]) for name in ("train", "validation", "test")
    }


def test_the_three_splits_share_no_example(load: Any) -> None:
    ids = ids_of(load(MANY))
    assert sum(map(len, ids.values())) == len(set().union(*ids.values())) == 100
    assert all(len(part) > 0 for part in ids.values())


def test_duplicates_are_left_out_wherever_they_stand(load: Any) -> None:
    doubled = [talk(f"  {record['instruction']}", record["output"] + "\n") for record in MANY]
    splits = load(MANY + doubled)
    assert ids_of(splits) == ids_of(load(MANY))
    assert splits.left_out["duplicates"] == 100
    assert "100 duplicates" in splits.describe()


def test_the_split_does_not_depend_on_the_order_of_the_file(load: Any) -> None:
    assert ids_of(load(MANY)) == ids_of(load(MANY[::-1]))


def test_a_new_record_moves_no_other_one(load: Any) -> None:
    before, after = ids_of(load(MANY[:80])), ids_of(load(MANY))
    assert all(before[name] <= after[name] for name in before)


@given(st.text(), st.floats(0.01, 0.49), st.floats(0.01, 0.49))
def test_every_conversation_has_one_side(text: str, test: float, validation: float) -> None:
    digest = content_hash([{"role": "user", "content": text}])
    config = TrialConfig(test_fraction=test, validation_fraction=validation)
    position = int(digest[:16], 16) / 2**64
    expected = (
        "test" if position < test else "validation" if position < test + validation else "train"
    )
    assert split_of(digest, config) == expected


def test_max_eval_samples_limits_what_is_scored(load: Any) -> None:
    splits = load(MANY, max_eval_samples=3)
    assert (splits.counts["validation"], splits.counts["test"]) == (3, 3)
    whole = load(MANY)
    assert splits.counts["train"] == whole.counts["train"]
    assert ids_of(splits)["test"] == set(sorted(whole.test["example_id"])[:3])


def test_hashes_tell_a_changed_example(load: Any) -> None:
    before = load(MANY).hashes
    assert load(MANY).hashes == before
    changed = load([*MANY, talk("Is 1000 even?", "Yes, it is.")]).hashes
    assert [name for name in before if before[name] != changed[name]] != []


def test_examples_are_cut_at_max_length(load: Any) -> None:
    long = [talk(f"Count to {number}", "1 2 3 4 5 6 7 8 9 " * 20) for number in range(100)]
    splits = load(long, max_length=48)
    assert max(len(ids) for ids in splits.train["input_ids"]) == 48
    assert all(
        len(a) == len(b)
        for a, b in zip(splits.train["input_ids"], splits.train["labels"], strict=True)
    )


def test_a_question_longer_than_max_length_is_left_out_and_counted(load: Any) -> None:
    long = [talk("Why? " * 100 + str(number), "So.") for number in range(5)]
    assert load(MANY + long).left_out["with the answer beyond max_length"] == 5


def test_answers_that_are_all_cut_off_are_refused_with_the_cause(load: Any) -> None:
    long = [talk("Why? " * 100 + str(number), "So.") for number in range(50)]
    with pytest.raises(
        DataError, match="max_length is 64, but must be longer: it cuts off the answers"
    ):
        load(long)


def test_records_without_an_assistant_turn_are_refused_with_the_cause(load: Any) -> None:
    questions = [{"messages": [{"role": "user", "content": str(number)}]} for number in range(50)]
    with pytest.raises(DataError, match="none of its 50 records has an assistant turn"):
        load(questions)


def test_an_empty_file_is_refused(load: Any) -> None:
    with pytest.raises(DataError, match="but it holds no records"):
        load([])


def test_an_empty_split_says_what_to_raise(load: Any) -> None:
    with pytest.raises(
        DataError, match=r"split of its 2 records is empty: raise .*_fraction, which is"
    ):
        load(MANY[:2], validation_fraction=0.01, test_fraction=0.01)


def test_a_record_of_an_unknown_format_is_named_with_its_line(load: Any) -> None:
    with pytest.raises(DataError, match=r"data.jsonl: line 101: the record's fields are a, q"):
        load([*MANY, {"q": "x", "a": "y"}])


def test_the_demo_set_has_thousands_of_different_examples() -> None:
    config = TrialConfig(max_length=256, max_eval_samples=48)
    splits = load_splits(config, load_tokenizer(config))
    assert splits.counts["train"] > 5000
    assert (splits.counts["validation"], splits.counts["test"]) == (48, 48)


def test_tokenised_examples_are_kept_and_found_again(
    tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import data

    config = TrialConfig.from_dict(tiny_settings)
    tokenizer = load_tokenizer(config)
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path / "cache"))
    made = load_splits(config, tokenizer)

    def refuse(*_: Any) -> Any:
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(data, "_make_splits", refuse)
        found = load_splits(config, tokenizer)
        for name in ("train", "validation", "test"):
            assert getattr(found, name).to_list() == getattr(made, name).to_list()
        assert (found.hashes, found.counts, found.left_out) == (
            made.hashes,
            made.counts,
            made.left_out,
        )
        changed = TrialConfig.from_dict({**tiny_settings, "max_length": 60})
        with pytest.raises(AssertionError, match="made again"):
            load_splits(changed, tokenizer)
        tokenizer.chat_template = str(tokenizer.chat_template) + " "
        with pytest.raises(AssertionError, match="made again"):
            load_splits(config, tokenizer)


def test_a_changed_record_and_a_damaged_cache_are_made_again(
    tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(Path(tiny_settings["dataset_name"]).read_text())
    config = TrialConfig.from_dict({**tiny_settings, "dataset_name": str(file)})
    tokenizer = load_tokenizer(config)
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path / "cache"))
    made = load_splits(config, tokenizer)
    (damaged,) = (tmp_path / "cache" / "examples").glob("*/train.parquet")
    damaged.write_bytes(b"torn")
    assert load_splits(config, tokenizer).train.to_list() == made.train.to_list()
    file.write_text(file.read_text().replace("is even", "is not odd"))
    assert load_splits(config, tokenizer).hashes != made.hashes
