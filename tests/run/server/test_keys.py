"""Keys open the door, quotas fill evenly, and a file that says something else is refused by its line."""

import asyncio

import pytest

from satchel.core.errors import UserError
from satchel.run.server.faults import Fault
from satchel.run.server.keys import Keys, read_keys
from tests.run.server.toy import client_of, toy_house

FILE = '[alice]\nkey = "sk-a"\nrequests_per_minute = 2\n[bob]\nkey = "sk-b"\ntokens_per_minute = 60\n'


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(FILE)
    return path


def test_a_quota_of_requests_is_spent_and_fills_again(file):
    clock = Clock()
    alice = read_keys(file, clock).client("Bearer sk-a")
    alice.begin()
    alice.begin()
    with pytest.raises(Fault, match="2 requests a minute") as refused:
        alice.begin()
    assert refused.value.status == 429 and refused.value.headers == {"retry-after": "30"}
    clock.now_s = 30.1
    alice.begin()


def test_tokens_are_taken_at_the_end_and_a_debt_is_waited_for(file):
    clock = Clock()
    bob = read_keys(file, clock).client("bearer  sk-b")
    bob.begin()
    bob.end(90)
    with pytest.raises(Fault, match="60 tokens a minute") as refused:
        bob.begin()
    assert refused.value.headers == {"retry-after": "31"}
    clock.now_s = 31.1
    bob.begin()


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer sk-c", "Basic sk-a", "sk-a"])
def test_nobody_else_comes_in(file, header):
    with pytest.raises(Fault, match="Authorization: Bearer KEY") as refused:
        read_keys(file).client(header)
    assert refused.value.status == 401


def test_without_keys_everybody_is_welcome():
    client = Keys().client("")
    for _ in range(1000):
        client.begin()
        client.end(10**6)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "holds no client"),
        ("[a", "is not TOML"),
        ("[a]\n", "needs a line key"),
        ("a = 1\n", "needs a line key"),
        ('[a]\nkey = "x"\nrequests_per_minut = 3\n', "did you mean 'requests_per_minute'"),
        ('[a]\nkey = "x"\nrequests_per_minute = -3\n', "0 or above"),
        ('[a]\nkey = "x"\ntokens_per_minute = true\n', "0 or above"),
        ("[a]\nkey = 5\n", "it is a text"),
        ('[a]\nkey = "x"\n[b]\nkey = "x"\n', "every client has its own"),
    ],
)
def test_a_wrong_file_says_where(tmp_path, text, said):
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_keys(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "none.toml")


def test_the_routes_need_a_key_and_the_health_does_not(file):
    body = {"prompt": "hello", "max_tokens": 3}

    async def run():
        async with client_of(toy_house(), read_keys(file)) as client:
            bare = await client.post("/v1/completions", json=body)
            statuses = []
            for _ in range(3):
                answer = await client.post("/v1/completions", json=body, headers={"Authorization": "Bearer sk-a"})
                statuses.append(answer.status_code)
            health = await client.get("/health")
            return bare, statuses, answer, health

    bare, statuses, last, health = asyncio.run(run())
    assert bare.status_code == 401 and bare.json()["error"]["code"] == "invalid_api_key"
    assert statuses == [200, 200, 429] and 25 <= int(last.headers["retry-after"]) <= 30
    assert health.status_code == 200
