from satchel.core.request import Request
from satchel.core.serve_seams import Draft
from satchel.decode.plain import Plain
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits
from tests.run.toys import toy_decoder


def test_nothing_is_guessed():
    model = toy_decoder()
    assert Plain().start(model).propose([None, None], [3, 4], [1, 1]) == [Draft(), Draft()]
    engine = Engine(model, Limits(blocks=8, context=64), decoding="plain")
    engine.submit(Request(prompt=(5, 6), max_tokens=10))
    engine.run()
    assert engine.stats()["guessed"] == 0 and engine.stats()["steps"] == engine.stats()["answered"] == 10
