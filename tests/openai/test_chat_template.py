"""Chat templates in their child process: Hugging Face's conventions, the order of files, and hostile templates."""

from __future__ import annotations

import json

import pytest

from xllm_py.base.errors import InvalidValue, ModelLoadError
from xllm_py.openai.chat_template import ChatTemplate, load_chat_template

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def make_template():
    made = []

    def make(source, **special_tokens):
        made.append(ChatTemplate(source, special_tokens=special_tokens, origin="here"))
        return made[-1]

    yield make
    for template in made:
        template.close()


def test_templates_see_what_hugging_face_gives_them(make_template):
    template = make_template(
        "{{ bos_token }}{% for m in messages %}{% if loop.first %}{% generation %}"
        "{{ m | tojson }}{% endgeneration %}{% continue %}{% endif %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ mood }}{{ add_generation_prompt }}{{ tools is none }}",
        bos_token="<s>",
    )
    said = template.render([{"role": "user", "content": "<é>"}], {"mood": "!"})
    assert said == '<s>{"role": "user", "content": "<é>"}4!TrueTrue'


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ 10 ** (10 ** 10) }}", "{{ x | nofilter }}", "{{ nothing.at.all }}"]
)
def test_a_broken_template_is_found_when_it_is_loaded(source):
    with pytest.raises(ModelLoadError, match="here"):
        ChatTemplate(source, special_tokens={}, origin="here")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_the_sandbox_refuses_tricks(attack):
    with pytest.raises(ModelLoadError):
        ChatTemplate(attack, special_tokens={}, origin="here")


def test_a_refusal_of_the_template_reaches_the_client(make_template):
    template = make_template(
        "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}ok"
    )
    assert template.render(USER, {}) == "ok"
    with pytest.raises(InvalidValue, match="one turn only"):
        template.render(USER * 2, {})


@pytest.mark.parametrize(
    "bomb",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% set n = 10 %}{{ n ** (n ** n) }}",
    ],
)
def test_a_template_that_eats_time_or_memory_ends_alone(make_template, bomb):
    template = make_template("{% if boom %}" + bomb + "{% endif %}ok")
    with pytest.raises(InvalidValue):
        template.render(USER, {"boom": True})
    assert template.render(USER, {}) == "ok"


def test_the_order_of_the_files(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "default", "template": "third"}]})
    )

    def said():
        template = load_chat_template(tmp_path, special_tokens={})
        text = template.render(USER, {})
        template.close()
        return text

    assert said() == "third"
    (tmp_path / "chat_template.jinja").write_text("second")
    assert said() == "second"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "first"}))
    assert said() == "first"


def test_a_folder_without_template_has_none(tmp_path):
    assert load_chat_template(tmp_path, special_tokens={}) is None
