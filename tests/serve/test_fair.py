from satchel.core.request import Request
from satchel.run.engine import Engine
from satchel.run.ledger import Ledger
from satchel.run.scheduler import Limits
from satchel.serve.fair import Fair
from tests.run.toys import toy_decoder
from tests.serve.common import Slip


def served(admission, steps):
    """Tokens of two tenants after some steps; one sends 30 requests before the other sends 10."""
    engine = Engine(toy_decoder(), Limits(blocks=64, batch=4, step_tokens=16, context=128), admission=admission)
    for tenant, count in (("loud", 30), ("quiet", 10)):
        for _ in range(count):
            engine.submit(Request(prompt=(5, 6, 7, 8), max_tokens=12, tenant=tenant))
    for _ in range(steps):
        engine.step()
    counts = dict(engine.scheduler.ledger.counts)
    engine.run()
    engine.check_integrity()
    return counts["loud"], counts.get("quiet", 0.0)


def test_a_tenant_that_sends_more_gets_no_more():
    loud, quiet = served("fair", 24)
    assert quiet > 100 and abs(loud - quiet) <= 2 * 4 * (4 + 2 * 12)  # the paper's bound: twice what a batch holds
    loud, quiet = served("fcfs", 24)
    assert quiet == 0


def test_rest_is_no_credit():
    ledger = Ledger()
    ledger.arrive("a", [])
    ledger.charge("a", 100, answering=True)
    ledger.arrive("b", ["a"])
    assert ledger.served("b") == ledger.served("a") == 200
    ledger.charge("b", 10, answering=False)
    ledger.arrive("a", ["a", "b"])
    assert ledger.served("a") == 200 and ledger.served("b") == 210
    ledger.arrive("a", ["b"])
    assert ledger.served("a") == 210


def test_the_least_served_comes_first():
    policy = Fair()
    assert policy.rank(Slip(arrival_s=9.0), 5, 0) < policy.rank(Slip(arrival_s=1.0), 6, 0)
