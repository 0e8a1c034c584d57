import pytest

from training.exceptions import DataError
from training.formats import PLAIN_TEXT, to_messages

QUESTION = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": QUESTION},
        {
            "conversations": [
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "Because."},
            ]
        },
        {"conversations": QUESTION},
        {"instruction": "Why?", "output": "Because.", "input": ""},
        {"prompt": "Why?", "completion": "Because."},
        {"prompt": QUESTION[:1], "completion": QUESTION[1:]},
        {"messages": QUESTION, "text": None, "score": 5.1},
    ],
)
def test_each_format_gives_the_same_messages(record: dict) -> None:
    assert to_messages(record, "x") == QUESTION


def test_alpacas_input_and_system_are_part_of_the_prompt() -> None:
    record = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief."}
    assert to_messages(record, "x") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add\n\n1 2"},
        {"role": "assistant", "content": "3"},
    ]


def test_plain_text_is_one_message_without_a_template() -> None:
    assert to_messages({"text": "Once."}, "x") == [{"role": PLAIN_TEXT, "content": "Once."}]


@pytest.mark.parametrize(
    ("record", "must"),
    [
        (
            {"q": "Why?", "a": "Because."},
            "data.csv: line 3: the record's fields are a, q, but must be",
        ),
        ({"messages": []}, r"data.csv: line 3: messages is \[\], but must be a list of messages"),
        ({"messages": [{"role": "usr", "content": "x"}]}, r"messages\[0\].role is 'usr'.*'user'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] is .*, but must have role and content"),
        ({"prompt": "x", "completion": 3}, "completion is 3, but must be text"),
        ({"instruction": "x", "output": 3}, "output is 3, but must be text"),
    ],
)
def test_a_wrong_record_is_named_with_its_place(record: dict, must: str) -> None:
    with pytest.raises(DataError, match=must):
        to_messages(record, "data.csv: line 3")
