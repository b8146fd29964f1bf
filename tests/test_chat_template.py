"""Chat templates of language models: rendered as others render them, in a sandbox, errors in one line."""

from __future__ import annotations

import datetime
import json
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from test_convert import published
from tokenizers import decoders, models, pre_tokenizers

import vl_jax
from vl_jax.data.published.text_processor import TextProcessor
from vl_jax.data.text import chat_template, rendering
from vl_jax.data.text.chat_template import ChatTemplate

# With a line for each statement, as published templates have: blocks leave no blanks and no empty lines.
TURNS = """
{{- bos_token }}
{%- if messages[0].role != "user" and messages[0].role != "system" %}
    {{- raise_exception("the first message must be a user's") }}
{%- endif %}
{% for message in messages %}
    {% if message.role == "skipped" %}
        {% continue %}
    {% endif %}
<|{{ message.role }}|>{{ message.content | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{%- endif %}
"""
AS_JSON = "{% set seen = namespace(n=0) %}{{ messages | tojson(indent=2) }}{{ tools is none }}{{ pad_token }}"
MESSAGES = [
    {"role": "system", "content": " Be brief & <kind>. "},
    {"role": "user", "content": "问: what's 1 < 2?"},
    {"role": "assistant", "content": "true"},
    {"role": "skipped", "content": "?"},
    {"role": "user", "content": "And 2 < 1?\n"},
]


def write(folder: Path, template: object, file: str = "tokenizer_config.json") -> Path:
    """A folder with a byte-level tokenizer and a template, which begins a text with ``<s>`` by itself."""
    folder.mkdir(exist_ok=True)
    letters = pre_tokenizers.ByteLevel.alphabet()
    plain = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(letters))}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(["<s>", "</s>", "<|user|>", "<|assistant|>"])
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", plain.token_to_id("<s>"))]
    )
    plain.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": False, "lstrip": False},
        "add_bos_token": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if file == "tokenizer_config.json":
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if file == "chat_template.json":
        (folder / file).write_text(json.dumps({"chat_template": template}))
    if file == "chat_template.jinja":
        (folder / file).write_text(str(template))
    return folder


def load(folder: Path) -> ChatTemplate:
    template = ChatTemplate.load(folder)
    assert template is not None
    return template


def test_a_conversation_is_written_as_the_template_says(tmp_path):
    text = load(write(tmp_path, TURNS)).text(MESSAGES, add_generation_prompt=True)
    assert text == (
        "<s><|system|>Be brief & <kind>.</s>\n<|user|>问: what's 1 < 2?</s>\n<|assistant|>true</s>\n"
        "<|user|>And 2 < 1?</s>\n<|assistant|>"
    )


@pytest.mark.parametrize("template", [TURNS, AS_JSON], ids=["turns", "json"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_transformers_makes_the_same_text_and_ids(tmp_path, template, add_generation_prompt):
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path, template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    options = {"add_generation_prompt": add_generation_prompt}
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, **options)
    assert load(folder).text(MESSAGES, **options) == expected
    if add_generation_prompt:
        processor = TextProcessor.load(folder, max_tokens=1000)
        assert processor is not None
        ids = theirs.apply_chat_template(MESSAGES, return_dict=False, **options)
        np.testing.assert_array_equal(processor(conversations=MESSAGES).tokens[0], ids)


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_a_file_of_its_own_comes_before_the_config(tmp_path, file):
    write(tmp_path, "config")
    config = (tmp_path / "tokenizer_config.json").read_text()
    write(tmp_path, "own", file)
    (tmp_path / "tokenizer_config.json").write_text(config)
    assert load(tmp_path).text(MESSAGES, add_generation_prompt=True) == "own"


def test_of_several_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "talk"}]
    assert load(write(tmp_path, named)).text(MESSAGES, add_generation_prompt=True) == "talk"


def test_a_template_may_ask_for_the_date(tmp_path):
    found = load(write(tmp_path, "{{ strftime_now('%Y') }}")).text(MESSAGES, add_generation_prompt=True)
    assert int(found) in {datetime.datetime.now().year - 1, datetime.datetime.now().year}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "tokenizer_config.json: line 1 of the chat template: "),
        ("{{ raise_exception('no') }}", "tokenizer_config.json: the chat template: no"),
        ("{{ messages[0].content + 1 }}", "tokenizer_config.json: the chat template: "),
        ("{{ messages.append(1) }}", "tokenizer_config.json: the chat template: .*unsafe"),
        (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "tokenizer_config.json: the chat template: .*unsafe",
        ),
        (3, "tokenizer_config.json: chat_template must be a text, or a list"),
    ],
)
def test_errors_of_a_template_are_one_line_that_names_the_file(tmp_path, template, message):
    with pytest.raises(ValueError, match=message) as error:
        load(write(tmp_path, template)).text(MESSAGES, add_generation_prompt=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "has no message to answer"),
        ([{"role": "assistant", "content": ""}], "has no message to answer"),
        ([{"role": "user", "content": ["a"]}], "message 0 needs a text under role and under content"),
        ([{"role": "user", "content": "a", "images": ["b"]}], "has images, the model is a language model"),
        ([*MESSAGES, {"role": "assistant", "content": "x"}], "the last assistant's message must be empty"),
        ([{"role": "user", "content": "a" * 200}], "tokens, the context has 100"),
        ([{"role": "assistant", "content": "x"}, MESSAGES[-1]], "the first message must be a user's"),
    ],
)
def test_conversations_that_cannot_be_answered_are_refused(tmp_path, messages, message):
    processor = TextProcessor.load(write(tmp_path, TURNS), max_tokens=100)
    assert processor is not None
    with pytest.raises(ValueError, match=message):
        processor(conversations=messages)


@pytest.mark.slow
def test_a_published_language_model_answers_a_conversation(tmp_path):
    folder = tmp_path / "model"
    published(folder, np.dtype(np.float32), layers=1, width=64, vocabulary=300)
    conversation = [{"role": "user", "content": "What is 1 < 2?"}]
    with pytest.raises(ValueError, match="no processor"):
        vl_jax.from_pretrained(folder).generate(conversation)
    write(folder, TURNS, "chat_template.jinja")
    model = vl_jax.from_pretrained(folder)
    assert model.processor is not None
    prompt = model.processor(conversations=conversation).tokens[0].tolist()
    assert model.processor.tokenizer.decode(prompt) == "<s><|user|>What is 1 < 2?</s>\n<|assistant|>"
    answer = model.generate(conversation, max_new_tokens=3)
    assert answer.startswith("".join(model.stream(conversation, max_new_tokens=3)))


HOSTILE = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "number": "{{ 9 ** (9 ** 9) }}",
    "text": "{{ 'a' * 9999999999 }}",
    "format": "{{ '%09999999999d' % 1 }}",
    "doubled": "{% set n = namespace(x='a') %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "lipsum": "{{ lipsum(n=99999) }}",
    "output": "{% for a in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    "padding": "{{ 'a' | center(99999999999) }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "exit": "{{ cycler.__init__.__globals__.os._exit(1) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.slow
def test_a_hostile_template_ends_in_one_line(tmp_path, name):
    with pytest.raises(ValueError, match=r"chat_template.jinja: (line \d+ of )?the chat template: ") as error:
        load(write(tmp_path, HOSTILE[name], "chat_template.jinja")).text(MESSAGES, add_generation_prompt=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


# What a hostile template may do, and what may stand around it.
ACTS = (
    "{{ 'a' * 99999999 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "{{ 7 ** (7 ** 9) }}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages | attr('__class__') | attr('__base__') }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ namespace.__init__.__globals__['os'].system('true') }}",
    "{{ self.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends 'base.html' %}",
    "{% from 'x' import y %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% set x = [] %}{% for i in range(9) %}{% set x = x + x + [messages] * 999999 %}{% endfor %}{{ x }}",
    "{{ messages | tojson(indent=99999999) }}",
    "{{ 'a' | indent(99999999) }}",
    "{{ '%99999999d' | format(1) }}",
    "{{ ('a' ~ 'b') | replace('', 'x' * 9999) | replace('', 'y' * 9999) }}",
    "{{ range(99999) | map('string') | join('x' * 9999) }}",
    "{{ messages.append(1) }}",
    "{{ (range(99999) | list) | batch(1) | list | string | urlize }}",
    "{{ strftime_now('%Y' * 9999999) }}",
    "{{ messages | sort(attribute='nothing.at.all') }}",
    "{{ undefined_name.attribute }}",
)
AROUND = (
    "%s",
    "{%% for message in messages %%}%s{%% endfor %%}",
    "{%% if true %%}%s",
    "{%% raw %%}{%% endraw %%}%s",
)


@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_hostile_templates_end_in_one_line_within_their_bound(tmp_path, count, capsys):
    start, ends = time.monotonic(), Counter()
    chance = random.Random(0)
    for template in chance.sample([around % act for around in AROUND for act in ACTS], count):
        begun = time.monotonic()
        try:
            text = load(write(tmp_path, template, "chat_template.jinja")).text(
                MESSAGES, add_generation_prompt=True
            )
            assert len(text) <= rendering.OUTPUT
            ends["text"] += 1
            assert "root:" not in text and "subclasses" not in text and "globals" not in text
        except ValueError as error:
            assert str(error).isprintable() and len(str(error)) < 600, template
            ends["one line"] += 1
        # Time to start a process besides; others may have the processor.
        assert time.monotonic() - begun < chat_template.START_SECONDS + chat_template.WAIT_SECONDS, template
    assert ends["one line"] > ends["text"], ends
    with capsys.disabled():
        print(f"\n{dict(ends)} in {time.monotonic() - start:.0f} s")


@pytest.mark.slow
def test_after_a_template_that_was_ended_the_next_one_is_rendered(tmp_path):
    with pytest.raises(ValueError, match="the chat template: was ended: it took more than"):
        load(write(tmp_path / "a", HOSTILE["number"]))
    assert load(write(tmp_path / "b", "{{ 1 + 1 }}")).text(MESSAGES, add_generation_prompt=True) == "2"


@pytest.mark.parametrize("file", ["processor_config.json", "chat_template.json"])
@pytest.mark.parametrize("named", [[{"name": "only", "template": "own"}], {"default": "own", "rag": "other"}])
def test_templates_may_be_named_in_any_file(tmp_path, file, named):
    write(tmp_path, "tokenizer")
    (tmp_path / file).write_text(json.dumps({"chat_template": named}))
    assert load(tmp_path).text(MESSAGES, add_generation_prompt=True) == "own"


def test_of_templates_without_a_default_the_names_are_told(tmp_path):
    named = [{"name": "a", "template": ""}, {"name": "b", "template": ""}]
    with pytest.raises(ValueError, match="chat_template must be a text.*it names a, b"):
        load(write(tmp_path, named))


# As LLaVA's: contents are lists of parts, and the answers of a model are marked.
PARTS = """{% for message in messages %}{{ message.role.upper() }}: {% for part in message.content %}
{%- if part.type == 'image' %}<image>
{% else %}{% generation %}{{ part.text }} {% endgeneration %}{% endif %}
{%- endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""


def test_a_template_gets_contents_as_it_takes_them(tmp_path):
    parts = load(write(tmp_path / "parts", PARTS))
    assert (parts.takes_text, parts.takes_parts) == (False, True)
    picture, text = {"type": "image"}, {"type": "text", "text": "What?"}
    assert parts.content("<image>\nWhat?", parts=True) == [picture, text]
    assert parts.content("What?", parts=False) == [text]
    assert parts.content("", parts=True) == [{"type": "text", "text": ""}]
    assert parts.content("a\n<image> b<image>", parts=True) == [
        {"type": "text", "text": "a"},
        picture,
        {"type": "text", "text": " b"},
        picture,
    ]
    asked = [{"role": "user", "content": parts.content("<image>\nWhat?", parts=True)}]
    assert parts.text(asked, add_generation_prompt=True) == "USER: <image>\nWhat? ASSISTANT:"
    plain = load(write(tmp_path / "plain", TURNS))
    assert (plain.takes_text, plain.takes_parts) == (True, False)
    assert plain.content("<image>\nWhat?", parts=True) == "<image>\nWhat?"
