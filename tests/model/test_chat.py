import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from satchel.core.errors import ModelError
from satchel.model.chat import ChatTemplate

CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
MARKED = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}"""
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <there> & 'you'"},
    {"role": "assistant", "content": "Hello!\n"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": " So long. "},
]
ENDS = ["<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("generate", [False, True])
def test_text_equals_transformers(template, generate):
    expected = render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=generate)[0][0]
    assert ChatTemplate(template, {}).render(MESSAGES, generate) == expected


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_spans_are_the_assistants_words_and_the_end_of_turn(template):
    text, spans = ChatTemplate(template, {}).spans(MESSAGES, ENDS)
    assert text == ChatTemplate(template, {}).render(MESSAGES)
    assert [text[a:b] for a, b in spans] == ["Hello!\n<|im_end|>", " So long. <|im_end|>"]


def test_generation_blocks_equal_transformers_indices():
    expected = render_jinja_template([MESSAGES], chat_template=MARKED, return_assistant_tokens_mask=True)[1][0]
    assert ChatTemplate(MARKED, {}).spans(MESSAGES, ENDS)[1] == [tuple(pair) for pair in expected]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    last_only = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else 'gone' }};{% endfor %}"
    with pytest.raises(ModelError, match="rewrites earlier turns"):
        ChatTemplate(last_only, {}).spans(MESSAGES, ENDS)
    assert len(ChatTemplate(last_only, {}).spans(MESSAGES[:3], ENDS)[1]) == 1


def test_thinking_that_earlier_turns_lose_does_not_hide_their_answers():
    thinking = CHATML.replace(
        "message['content'] +",
        "('<think>\n\n</think>\n\n' if loop.last and message['role'] == 'assistant' else '') + message['content'] +",
    )
    kept = [MESSAGES[1], {"role": "assistant", "content": "Hello!"}, *MESSAGES[3:]]
    text, spans = ChatTemplate(thinking, {}).spans(kept, ENDS)
    assert text == ChatTemplate(thinking, {}).render(kept)
    said = [text[a:b] for a, b in spans]
    assert said == ["Hello!<|im_end|>", "<think>\n\n</think>\n\n So long. <|im_end|>"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].absent.absent }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox_and_its_refusal_is_ours(template):
    with pytest.raises(ModelError, match="refuses messages of the roles system, user"):
        ChatTemplate(template, {}).render(MESSAGES)


def test_a_broken_template_is_named():
    with pytest.raises(ModelError, match="cannot be read"):
        ChatTemplate("{% if %}", {})


def test_json_and_dates_are_there_as_transformers_has_them():
    template = "{{ messages[1] | tojson(indent=1) }}{{ strftime_now('%Y') | length }}{{ bos_token }}"
    expected = render_jinja_template([MESSAGES], chat_template=template, bos_token="<s>")[0][0]
    assert ChatTemplate(template, {"bos_token": "<s>"}).render(MESSAGES) == expected
