import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from satchel.core.errors import UnknownName, UserError
from satchel.core.job import METHOD_FIELDS, PretrainJob, TrainJob, TuneJob, weighted

JOB = TuneJob(model="demo", data="demo")


def test_a_job_goes_through_a_dict_and_comes_back():
    job = JOB.replace(batch=4, lr=1e-3, packing=False, memory="1.5GiB")
    assert TuneJob.from_dict(job.to_dict()) == job


@given(st.fixed_dictionaries({}, optional={"batch": st.integers(1, 64), "lr": st.floats(0, 1), "merge": st.booleans()}))
def test_toml_makes_the_job_that_python_makes(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("job") / "job.toml"
    lines = [f"{name} = {str(value).lower()}" for name, value in values.items()]
    path.write_text("\n".join(['model = "demo"', 'data = "demo"', *lines]))
    assert TuneJob.from_toml(path) == JOB.replace(**values)


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "job.toml").write_text('model = "demo"\ndata = "demo"\nbatch = 2\n')
    assert TuneJob.from_toml(tmp_path / "job.toml", batch=16).batch == 16


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('model="demo"\ndata="demo"\nbtach=2', "job.toml: no key 'btach'; did you mean 'batch'"),
        ('model="demo"', "job.toml: 'data' is missing; it is .jsonl"),
        ('model="demo"\ndata="demo"\nbatch="8"', "job.toml: batch='8' is not of type int"),
        ("model=", "is not TOML"),
    ],
)
def test_a_bad_file_is_refused_with_the_cure(tmp_path, text, complaint):
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(UserError, match=complaint):
        TuneJob.from_toml(tmp_path / "job.toml")


def test_a_missing_file_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        TuneJob.from_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_share": 0.6},
        {"device": "tpu"},
        {"dtype": "fp16"},
        {"context": 1},
        {"batch": 0},
        {"batch": 4, "micro_batch": 8},
        {"epochs": 0.0},
        {"epochs": float("nan")},
        {"lr": -1e-3},
        {"lr": float("inf")},
        {"seed": -1},
        {"memory": "plenty"},
        {"model": ""},
    ],
)
def test_a_value_out_of_its_range_is_refused(changes):
    with pytest.raises(UserError):
        JOB.replace(**changes)


def test_an_unknown_method_is_refused_when_the_job_is_made():
    with pytest.raises(UnknownName, match="no optimizer 'adamww'"):
        JOB.replace(optimizer="adamww")


def test_packed_weights_without_an_adapter_are_refused():
    with pytest.raises(UserError, match="add an adapter"):
        JOB.replace(adapter="none", format="int8")


@pytest.mark.parametrize("kind", TrainJob.__subclasses__())
def test_every_field_has_a_comment_that_serves_as_help(kind):
    knobs = {knob.name: knob for knob in kind.knobs()}
    assert list(knobs) == [f.name for f in dataclasses.fields(kind)]
    assert all(knob.comment for knob in knobs.values())
    assert set(METHOD_FIELDS) <= set(kind.slots) < set(knobs)


def test_a_file_saved_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "job.toml").write_bytes(b'\xef\xbb\xbfmodel = "demo"\ndata = "demo"\n')
    assert TuneJob.from_toml(tmp_path / "job.toml") == TuneJob(model="demo", data="demo")


TEXT = PretrainJob(model="demo", data=("a.jsonl:0.7", "b:0.3"))


def test_a_pretraining_job_goes_through_a_dict_json_and_toml_and_comes_back(tmp_path):
    job = TEXT.replace(scratch=True, tokenizer="demo", eval_data=("c.txt",))
    assert PretrainJob.from_dict(job.to_dict()) == PretrainJob.from_dict(json.loads(json.dumps(job.to_dict()))) == job
    lines = ['model = "demo"', 'data = ["a.jsonl:0.7", "b:0.3"]', "scratch = true", 'tokenizer = "demo"']
    (tmp_path / "job.toml").write_text("\n".join([*lines, 'eval_data = ["c.txt"]']))
    assert PretrainJob.from_toml(tmp_path / "job.toml") == job


@pytest.mark.parametrize(
    ("spelled", "source"),
    [
        ("a.jsonl:0.7", ("a.jsonl", 0.7)),
        ("a.jsonl", ("a.jsonl", None)),
        ("some folder/b:3", ("some folder/b", 3.0)),
        (r"C:\texts", (r"C:\texts", None)),
        ("odd:2:1", ("odd:2", 1.0)),
        (":1", (":1", None)),
    ],
)
def test_a_source_is_a_path_and_perhaps_a_weight(spelled, source):
    assert weighted(spelled) == source


@pytest.mark.parametrize(
    ("changes", "cure"),
    [
        ({"data": ("a:0.7", "b")}, "to every source, or to none"),
        ({"data": ("a:0", "b:0")}, "one of them is above 0"),
        ({"data": ("a:-1", "b:2")}, "0 or above"),
        ({"data": ("a:inf", "b:2")}, "0 or above"),
        ({"data": ("a:1", "a:2")}, "name each source once"),
        ({"eval_data": ("a.jsonl",)}, "name each source once"),
        ({"data": ()}, "name a file or folder"),
        ({"data": ("",)}, "name files or folders"),
        ({"scratch": True, "adapter": "lora"}, "leave the adapter out"),
        ({"mixture": "fixd"}, "did you mean 'fixed'"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(changes, cure):
    with pytest.raises(UserError, match=cure):
        TEXT.replace(**changes)


def test_one_source_may_stand_without_brackets_as_a_text_does():
    assert PretrainJob.from_dict({"model": "demo", "data": "demo"}).data == ("demo",)


def test_random_weights_learn_at_a_higher_rate_than_those_that_were_trained():
    rates = [job.peak_lr for job in (TEXT.replace(scratch=True), TEXT, TEXT.replace(adapter="lora"))]
    assert rates == [1e-3, 1e-4, 1e-3] and TEXT.replace(lr=3e-4, scratch=True).peak_lr == 3e-4
