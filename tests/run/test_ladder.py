"""The ladder on jobs whose rehearsal is a formula: which rung it takes, and why."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from satchel.core import book
from satchel.core.errors import UserError
from satchel.core.job import TuneJob
from satchel.run.ladder import LIGHT, TURNS, Ladder, bisect
from satchel.run.measured import Measured
from satchel.run.rung import Extent, Pricing, Rung

MB = 10**6
FORMATS = {"none": 100, "int8": 50, "nf4": 30, "int4": 28}  # MB of weights
KEPT = {"none": 1.0, "full": 0.0}  # share of the activations


class Formula(Pricing):
    """Rehearses by arithmetic: gradients 10 MB, moments 100 MB or the method's share, activations 20 MB a row."""

    refused = ""

    def rung(self, job):
        if self.refused and self.refused in job.optimizer:
            raise UserError("no matrix of this model is larger than the rank")
        if job.activations.partition(":")[0] not in (*KEPT, "selective"):
            raise UserError("the formula knows no such policy")
        if job.format not in FORMATS:
            raise UserError("the formula knows no such format")
        kept = KEPT.get(job.activations)
        kept = book.make("activations", job.activations).keep if kept is None else kept
        state = {"adamw": 100, "adamw8bit": 50}.get(job.optimizer.partition(":")[0])
        if state is None and job.optimizer.startswith("galore"):
            state = book.make("optimizer", job.optimizer).rank * 0.1
        state = 200 if state is None else state
        accounts = {"weights": FORMATS[job.format], "gradients": 10, "optimizer": state}
        accounts["gradients"] *= "layerwise" not in job.optimizer or job.micro_batch < job.batch
        accounts["activations"] = 20 * job.micro_batch * max(kept, 0.05)
        sizes = {name: int(size * MB) for name, size in accounts.items()}
        peak = SimpleNamespace(peak_bytes=sum(sizes.values()), accounts=sizes)
        facts = {"loss_ratio": self.loss_ratio(job), "costs": ", ".join(self._costs(job)), "seconds": {}}
        rung = Rung(
            changes=(),
            job=job,
            rehearsal=SimpleNamespace(peak=peak),
            peak_bytes=peak.peak_bytes,
            accounts=sizes,
            seconds_per_step=2 - kept,
            fits=False,
            **facts,
        )
        return SimpleNamespace(**vars(rung) | {"fits": rung.peak_bytes <= self.budget})


def climb(budget_mb, measured=(), refused="", **fields):
    found = {key: Measured(loss, 1.0) for key, loss in dict(measured).items()}
    job = TuneJob(**({"model": "demo", "data": "demo", "batch": 4, "adapter": "none"} | fields))
    ladder = Ladder(job, Formula(job, None, None, budget_mb * MB, Extent(), found))
    ladder.pricing.__dict__["refused"] = refused
    return ladder.climb(), ladder


def test_a_job_that_fits_is_rehearsed_once():
    chosen, ladder = climb(400)
    assert chosen.job.micro_batch == 4 and len(ladder.known) == 1


def test_fewer_rows_at_once_come_before_any_method_and_are_as_many_as_fit():
    chosen, _ = climb(280)
    assert (chosen.job.micro_batch, chosen.job.activations, chosen.job.optimizer) == (3, "none", "adamw")


def test_an_exact_method_comes_before_an_approximate_one_and_keeps_as_much_as_fits():
    chosen, _ = climb(224, micro_batch=1)  # plain: 230 MB
    assert chosen.job.optimizer == "adamw" and chosen.job.activations.startswith("selective:keep=")
    assert 0.6 < book.make("activations", chosen.job.activations).keep < 0.75


MEASURED = {("optimizer", "adamw8bit"): 1.001, ("optimizer", "galore"): 1.02}


@pytest.mark.parametrize(("better", "worse"), [("adamw8bit", "galore"), ("galore", "adamw8bit")])
def test_of_two_methods_that_fit_the_one_with_the_better_measured_loss_is_taken(better, worse):
    chosen, ladder = climb(205, {("optimizer", better): 1.001, ("optimizer", worse): 1.02})
    assert chosen.job.optimizer.partition(":")[0] == better
    assert chosen.loss_ratio == 1.001 and "(loss +0.1%)" in chosen.costs


def test_a_method_without_a_measurement_comes_after_those_that_have_one_and_says_so():
    chosen, _ = climb(205, {("optimizer", "galore"): 1.5})
    assert chosen.job.optimizer.partition(":")[0] == "galore"
    chosen, _ = climb(205)
    assert chosen.loss_ratio is None and "not measured" in chosen.costs


def test_what_is_not_needed_after_all_is_taken_back():
    chosen, ladder = climb(208, MEASURED)  # recomputation was tried first and was not enough
    assert any(rung.job.activations == "full" for rung in ladder.rungs)
    assert (chosen.job.optimizer, chosen.job.activations) == ("adamw8bit", "none")


def test_a_dial_is_turned_towards_neutral_as_far_as_the_budget_allows():
    chosen, ladder = climb(205, {("optimizer", "galore"): 1.0, ("optimizer", "adamw8bit"): 2.0})
    rank = book.make("optimizer", chosen.job.optimizer).rank
    assert 128 < rank < 1024 and chosen.fits
    assert chosen.loss_ratio == 1.0  # of a lower rank: this one is nearer to the plain job


def test_a_dial_is_turned_down_when_nothing_else_fits_and_counts_as_not_measured():
    chosen, _ = climb(118, {("optimizer", "galore"): 1.0})
    assert book.make("optimizer", chosen.job.optimizer).rank < 128
    assert chosen.loss_ratio is None and "not measured" in chosen.costs


def test_a_method_that_suits_no_matrix_of_the_job_is_no_rung():
    chosen, ladder = climb(205, MEASURED | {("optimizer", "galore"): 0.9}, refused="galore")
    assert chosen.job.optimizer == "adamw8bit"
    assert not any("galore" in rung.job.optimizer for rung in ladder.rungs)


FORM = "galore:layerwise=true"


def test_a_form_that_was_measured_is_tried_for_all_that_it_saves_and_keeps_its_knobs_when_the_dial_is_turned():
    """Without its moments the job takes 111 MB: only what updates within the backward pass may fit 108, with all rows
    at once, since the gradients of micro-batches are summed up."""
    measured = {("optimizer", name): 1.001 for name in ("galore", "adamw8bit")} | {("optimizer", FORM): 1.01}
    chosen, ladder = climb(108, measured)
    method = book.make("optimizer", chosen.job.optimizer)
    assert method.name == "galore" and method.layerwise and 4 < method.rank <= 40 and chosen.job.micro_batch == 4
    assert all("layerwise" in rung.job.optimizer for rung in ladder.rungs if "galore" in rung.job.optimizer)


def test_a_form_of_the_plain_method_is_tried_where_it_was_measured():
    """Of 139 MB, 100 are moments and 10 gradients."""
    given = {"adapter": "lora", "format": "int4", "activations": "full", "batch": 1}
    assert climb(139, **given)[0].job.optimizer == "adamw"
    assert climb(130, **given)[0].job.optimizer != "adamw:layerwise=true"
    chosen, _ = climb(130, {("optimizer", "adamw:layerwise=true"): 1.0}, **given)
    assert chosen.job.optimizer == "adamw:layerwise=true" and chosen.loss_ratio == 1


def test_an_exact_form_that_does_not_do_makes_room_for_an_approximate_method():
    """The lightest exact job, 129 MB, has filled the optimizer's slot; 8-bit moments, at 89, come in its place."""
    given = {"adapter": "lora", "format": "int4", "activations": "full", "batch": 1}
    measured = {("optimizer", "adamw:layerwise=true"): 1.0, ("optimizer", "adamw8bit"): 1.01}
    chosen, ladder = climb(100, measured, **given)
    assert chosen.job.optimizer == "adamw8bit"
    assert "adamw:layerwise=true" in [rung.job.optimizer for rung in ladder.rungs]
    assert ladder.smallest().job.optimizer != "adamw:layerwise=true"


@pytest.mark.parametrize(
    ("spelling", "ratio"),
    [
        (FORM, 1.01),
        ("galore:rank=256,layerwise=true", 1.01),  # nearer to the plain job
        ("galore:rank=64,layerwise=true", None),
        ("galore:rank=256", None),
        ("galore:rank=256,moments=8bit,layerwise=true", None),
    ],
)
def test_a_measurement_is_one_of_a_form_and_of_what_stands_nearer_to_the_plain_job(spelling, ratio):
    _, ladder = climb(400, {("optimizer", FORM): 1.01})
    assert ladder.pricing.ratio("optimizer", spelling) == ratio


def test_a_slot_that_the_user_filled_is_left_alone():
    chosen, _ = climb(205, optimizer="adamw:rounding=fp32")
    assert chosen is None


def test_two_approximate_methods_are_combined_when_one_is_not_enough():
    measured = MEASURED | {("format", "int8"): 1.01, ("format", "nf4"): 1.03, ("format", "int4"): 1.05}
    chosen, _ = climb(120, measured, adapter="lora")
    assert (chosen.job.format, chosen.job.optimizer) == ("int8", "adamw8bit")
    assert chosen.loss_ratio == pytest.approx(1.01 * 1.001)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_smallest_budget_is_one_that_fits_and_no_rung_needs_less(adapter):
    chosen, ladder = climb(400, adapter=adapter)
    smallest = ladder.smallest()
    assert chosen.fits and smallest.peak_bytes <= min(rung.peak_bytes for rung in ladder.known.values() if rung)
    again, _ = climb(-(-smallest.peak_bytes // MB), adapter=adapter)
    assert again is not None and again.fits


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_a_dial_ends_on_a_value_that_was_seen_to_fit(start, limit, ranks):
    low, high = (4, 1024) if ranks else (0.0, 1.0)
    start, limit = (low + share * (high - low) for share in (min(start, limit), limit))
    seen = {start: True}

    def fits(value):
        seen[value] = value <= limit
        return seen[value]

    assert seen[bisect(fits, start, high)] and len(seen) <= TURNS + 1
    assert bisect(lambda _: True, start, high) == high


OPTIMIZERS = {("optimizer", entry.name): 1.01 for entry in book.entries() if entry.slot == "optimizer"}


def test_what_could_not_fit_if_it_saved_all_it_can_is_not_tried():
    """110 MB of weights and gradients: no optimizer fits 90 MB. Three are rehearsed all the same, for the smallest."""
    chosen, ladder = climb(90, OPTIMIZERS)
    tried = {job.optimizer for job in ladder.known} - {"adamw"}
    assert chosen is None and len(tried) <= LIGHT
    assert all(rung.job.optimizer == "adamw" for rung in ladder.rungs)


def test_the_lightest_is_looked_for_among_those_that_measured_light():
    job = TuneJob(model="demo", data="demo", batch=4, adapter="none")
    found = {key: Measured(1.01, 0.3 if key[1] == "adamw8bit" else 0.9) for key in OPTIMIZERS}
    ladder = Ladder(job, Formula(job, None, None, 90 * MB, Extent(), found))
    assert ladder.smallest().job.optimizer == "adamw8bit"
    assert len({job.optimizer for job in ladder.known} - {"adamw"}) <= LIGHT
