from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from training.chat import IGNORE, ChatRenderer, tokenize
from training.config import TrialConfig
from training.exceptions import DataError
from training.formats import PLAIN_TEXT, Messages
from training.model import load_tokenizer

TALK = [
    {"role": "user", "content": "Count: 1 2"},
    {"role": "assistant", "content": "3, 4"},
    {"role": "user", "content": "Go on"},
    {"role": "assistant", "content": "5!"},
]


@pytest.fixture
def tokenizer(tiny_model_dir: Any) -> PreTrainedTokenizerBase:
    return load_tokenizer(TrialConfig(model_name_or_path=str(tiny_model_dir)))


def encode(tokenizer: Any, messages: Messages) -> tuple[list[int], list[str]]:
    """Token ids, and the supervised stretches as text."""
    rendered = ChatRenderer(tokenizer, [tokenizer.eos_token]).render(messages, "x")
    ((ids, labels),) = tokenize(tokenizer, [rendered])
    supervised = labels != IGNORE
    assert (labels[supervised] == ids[supervised]).all()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], supervised, [False]])))
    stretches = [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]
    return ids.tolist(), stretches


def test_only_assistant_turns_and_their_end_tokens_are_supervised(tokenizer: Any) -> None:
    _, supervised = encode(tokenizer, TALK)
    assert supervised == ["3, 4<|im_end|>", "5!<|im_end|>"]


def test_the_tokens_are_those_of_the_models_own_template(tokenizer: Any) -> None:
    ids, _ = encode(tokenizer, TALK)
    assert ids == tokenizer.apply_chat_template(TALK, tokenize=True)["input_ids"]


def test_a_template_that_prints_todays_date_gives_the_same_tokens_every_day(tokenizer: Any) -> None:
    llamas = (
        "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
        '        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else %}\n'
        '        {%- set date_string = "never" %}\n    {%- endif %}\n{%- endif %}\n'
        '{{- "Today: " + date_string + "\\n" }}\n'
    )
    gpt_oss = (
        '{%- macro system() %}{{ "Current date: " + strftime_now("%Y-%m-%d") + "\\n" }}'
        "{%- endmacro %}{{ system() }}"
    )
    undated = ChatRenderer(tokenizer, [tokenizer.eos_token]).render(TALK, "x").text
    tokenizer.chat_template = llamas + gpt_oss + tokenizer.chat_template
    rendered = ChatRenderer(tokenizer, [tokenizer.eos_token]).render(TALK, "x")
    assert rendered.text == "Today: 26 Jul 2024\nCurrent date: 2024-07-26\n" + undated


def test_a_fixed_date_leaves_the_rest_of_a_template_as_it_is(tokenizer: Any) -> None:
    for start in ("\n", "  {% if true %} a{% endif %}\n", " b "):
        template = start + tokenizer.chat_template
        tokenizer.chat_template = template + "{% if false %}{{ strftime_now('%Y') }}{% endif %}"
        text = ChatRenderer(tokenizer, [tokenizer.eos_token]).render(TALK, "x").text
        assert text == tokenizer.apply_chat_template(TALK, tokenize=False)


def test_labels_equal_trls_assistant_mask(tokenizer: Any) -> None:
    """TRL's mask comes from generation markers, which the demo model's template has to be given."""
    marked = tokenizer.chat_template.replace(
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{message['content'] + '<|im_end|>'}}{% endgeneration %}{% else %}"
        "{{message['content'] + '<|im_end|>'}}{% endif %}{{'\n'}}",
    )
    assert marked != tokenizer.chat_template
    theirs = tokenizer.apply_chat_template(
        TALK,
        chat_template=marked,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    rendered = ChatRenderer(tokenizer, [tokenizer.eos_token]).render(TALK, "x")
    ((ids, labels),) = tokenize(tokenizer, [rendered])
    assert ids.tolist() == theirs["input_ids"]
    assert (labels != IGNORE).astype(int).tolist() == theirs["assistant_masks"]


def test_the_end_token_is_supervised_and_is_not_the_pad_token(tokenizer: Any) -> None:
    rendered = ChatRenderer(tokenizer, [tokenizer.eos_token]).render(TALK[:2], "x")
    ((_, labels),) = tokenize(tokenizer, [rendered])
    assert tokenizer.eos_token_id in labels
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_template_without_an_end_token_is_given_one(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    _, supervised = encode(tokenizer, TALK[:2])
    assert supervised == ["3, 4<|im_end|>"]


def test_plain_text_is_supervised_whole_and_ends_once(tokenizer: Any) -> None:
    ids, supervised = encode(tokenizer, [{"role": PLAIN_TEXT, "content": "Once upon."}])
    assert supervised == ["Once upon.<|im_end|>"]
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_template_that_rewrites_earlier_turns_is_refused_by_name(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + (' (last)' if loop.last else '') + m.content }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
    )
    with pytest.raises(DataError, match="tiny-llama writes a turn differently once others follow"):
        encode(tokenizer, TALK)


def test_qwen3s_rewriting_template_is_replaced_by_trls_training_template(tokenizer: Any) -> None:
    from trl.chat_template_utils import qwen3_chat_template

    tokenizer.chat_template = qwen3_chat_template
    _, supervised = encode(tokenizer, TALK)
    assert [text.replace("<think>\n\n</think>\n\n", "") for text in supervised] == [
        "3, 4<|im_end|>",
        "5!<|im_end|>",
    ]


def test_a_conversation_without_a_template_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"line 7: is a conversation, but .* has no chat template"):
        ChatRenderer(tokenizer, ["</s>"]).render(TALK, "line 7")


def test_what_the_template_refuses_is_named_with_its_place(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"line 7: the chat template of .* roles must alternate"):
        ChatRenderer(tokenizer, ["</s>"]).render(TALK, "line 7")
