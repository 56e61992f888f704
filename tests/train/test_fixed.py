from satchel.core.seams import Domain
from satchel.train.fixed import Fixed


def test_the_shares_are_the_jobs_at_every_step():
    domains = [Domain("a", 0.7, 10.0), Domain("b", 0.3, 99.0)]
    assert {Fixed().at(step, 50, domains) for step in range(50)} == {(0.7, 0.3)}
