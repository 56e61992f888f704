import pytest

from satchel.core.errors import ModelError
from satchel.model.config import ModelConfig
from tests.model.families import LONG, SHAPE


@pytest.mark.parametrize("absent", ["short_factor", "long_factor"])
def test_longrope_without_either_of_its_factors_is_refused(absent):
    scaling = {name: value for name, value in LONG.items() if name != absent}
    with pytest.raises(ModelError, match="'longrope' needs 'short_factor' and 'long_factor'"):
        ModelConfig.from_hf(SHAPE | {"model_type": "llama", "rope_scaling": scaling})
