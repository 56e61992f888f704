from satchel.core.request import Request
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits
from satchel.serve.priority import Priority
from tests.run.toys import toy_decoder
from tests.serve.common import Slip, order


def test_the_urgent_are_served_first_and_equals_as_they_came():
    assert order("priority", [{"priority": p} for p in (0, 0, 5, 1, 5, 0)])[:3] == [2, 4, 3]


def test_an_urgent_request_stops_a_lesser_one_and_both_get_their_answers():
    model = toy_decoder()

    def answers(*requests):
        engine = Engine(model, Limits(blocks=6, batch=2, context=96), admission="priority")
        ids, events = [], []
        for request in requests:
            ids.append(engine.submit(request))
            events += engine.step() + engine.step()
        events += engine.run()
        engine.check_integrity()
        said = {id: [t for e in events if e.id == id for t in e.tokens] for id in ids}
        return [said[id] for id in ids], [e.id for e in events if e.usage], engine

    lesser = [Request(prompt=(5, 6 + i), max_tokens=40) for i in range(2)]
    urgent = Request(prompt=(9,) * 30, max_tokens=40, priority=1)
    said, ended, engine = answers(*lesser, urgent)
    assert ended[0] == 2 and engine.stats()["preemptions"] >= 1
    assert said == [answers(request)[0][0] for request in (*lesser, urgent)]


def test_only_a_higher_priority_displaces():
    policy = Priority()
    assert policy.displaces(Slip(priority=2), Slip(priority=1))
    assert not policy.displaces(Slip(priority=1), Slip(priority=1))
