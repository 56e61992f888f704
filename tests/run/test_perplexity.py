"""What the engine's own pass makes of a real model is what transformers makes of the same weights, however stored."""

import pytest

from bench._company_run import main

WITHIN = 0.005  # of the perplexity: the bound that the server's users are told


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "storage"), [("fp32", "none"), ("bf16", "none"), ("bf16", "int8"), ("bf16", "int4")])
def test_perplexity_is_that_of_transformers_on_the_dequantised_model(dtype, storage):
    found = main({"model": "demo", "dtype": dtype, "format": storage, "texts": 8, "tokens": 96})
    assert found["perplexity"] == pytest.approx(found["theirs"]["fp32"], rel=WITHIN)
    worst = max(kind["changed"] for kind in found["compositions"].values())
    assert worst == 0 if dtype == "fp32" else worst < 0.03
