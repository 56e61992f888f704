"""The bench of zeroth-order tuning: a task of two classes that nothing gives away, and rows that say what was found."""

import pytest
import torch

import satchel
from bench import zeroth
from bench._zeroth_run import CONTEXT, accuracy, batch_of
from docs.headlines import headline
from satchel.core import book
from satchel.model.batch import IGNORE
from satchel.model.source import find_source
from tests.run.toys import toy_decoder


@pytest.fixture(scope="module")
def task():
    return zeroth.task("demo", satchel.load_tokenizer(find_source("demo")), 64)


def test_the_classes_are_balanced_and_no_sentence_is_on_both_sides(task):
    train, test = ({tuple(prompt) for prompt, _ in task[part]} for part in ("train", "test"))
    assert len(train) == 64 and len(test) == zeroth.TEST and not train & test
    labels = [label for part in ("train", "test") for _, label in task[part]]
    assert labels.count(0) == labels.count(1)
    assert max(map(len, train | test)) <= CONTEXT


def test_sentences_are_whole_and_plain():
    text = "Return x.  This sentence has eight words and it is plain. `code` is not one of those words here at all."
    assert list(zeroth.sentences([text])) == ["This sentence has eight words and it is plain."]


def test_the_answers_are_two_tokens_that_the_model_may_say(task):
    tokenizer = satchel.load_tokenizer(find_source("demo"))
    assert len(set(task["answers"])) == 2
    for token, word in zip(task["answers"], zeroth.ANSWERS, strict=True):
        assert word.startswith(tokenizer.decode([token]))


def test_only_the_answer_is_learnt_and_right_is_who_finds_it_likelier():
    examples, answers = [([5, 6, 7], 0), ([8, 9], 1)], [20, 30]
    batch = batch_of(examples, answers)
    learnt = batch.targets_1N[0] != IGNORE
    assert learnt.nonzero().flatten().tolist() == [2, 4] and batch.targets_1N[0][learnt].tolist() == [20, 30]
    decoder = toy_decoder()
    with torch.no_grad():
        chosen = [int(decoder(torch.tensor([prompt]))[0, -1, answers].argmax()) for prompt, _ in examples]
    assert accuracy(decoder, [(p, c) for (p, _), c in zip(examples, chosen, strict=True)], answers) == 1
    assert accuracy(decoder, [(p, 1 - c) for (p, _), c in zip(examples, chosen, strict=True)], answers) == 0


def test_every_method_is_spelled_as_it_may_be_and_a_failure_is_a_row_too():
    for method in zeroth.METHODS:
        book.check("optimizer", method)
    assert zeroth.row("LoRA", "mezo", [{"error": "no memory"}], {})["accuracy"] == "failed: no memory"


def test_a_row_holds_the_medians_of_its_runs():
    run = {"lr": 1e-4, "before": 0.5, "losses": [2.0] * 10 + [1.0] * 10}
    peaks = {"inference_bytes": 100 << 20, "training_bytes": 103 << 20, "rehearsed_bytes": 102 << 20}
    line = zeroth.row("LoRA", "mezo", [run | {"after": after} for after in (0.6, 0.9, 0.7)], peaks)
    assert line["accuracy"] == 0.7 and line["range"] == "0.600-0.900" and line["peak over inference"] == 1.03
    assert line["first losses"] == 2 and line["last losses"] == 1 and line["rehearsed"] == "-1.0%"
    empty = zeroth.row("LoRA", "mezo", [], {})
    assert line.keys() == empty.keys() and empty["peak over inference"] == "-"
    said = headline("zeroth", [line, empty, line | {"optimizer": "adamw", "peak over inference": 3.8}])
    assert said == "peak over inference 1.03x to 1.03x; AdamW's 3.8x to 3.8x"
