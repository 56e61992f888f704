import pytest

from satchel.core.errors import UnknownName, UserError
from satchel.core.serve import ServeJob


def test_a_job_comes_back_from_its_values_and_from_toml(tmp_path):
    job = ServeJob(model="demo", memory="1GiB", batch=4)
    assert ServeJob.from_dict(job.to_dict()) == job
    (tmp_path / "job.toml").write_text('model = "demo"\nbatch = 8\nmemory = "1GiB"\n')
    assert ServeJob.from_toml(tmp_path / "job.toml", batch=4) == job


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"model": ""}, "model"),
        ({"batch": 0}, "batch=0"),
        ({"batch": 40, "step_tokens": 32}, "step_tokens=32"),
        ({"context": 1}, "context=1"),
        ({"dtype": "fp8"}, "dtype='fp8'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"memory": "lots"}, "lots"),
        ({"admission": "fcsf"}, "did you mean 'fcfs'"),
        ({"format": "int3"}, "no format 'int3'"),
    ],
)
def test_a_bad_value_is_refused_when_the_job_is_made(fields, complaint):
    with pytest.raises(UserError, match=complaint):
        ServeJob(**({"model": "demo"} | fields))


def test_an_unknown_or_missing_key_is_named():
    with pytest.raises(UnknownName, match="did you mean 'memory'"):
        ServeJob.from_dict({"model": "demo", "memoy": "1GiB"})
    with pytest.raises(UserError, match="'model' is missing"):
        ServeJob.from_dict({"batch": 3})


def test_every_key_explains_itself():
    assert all(knob.comment for knob in ServeJob.knobs())
