"""A cache folder of a test's own, and a predictor with an acceptance profile."""

import firp
import pytest
from firp.drafting.profile import FILE_NAME, save_profile
from models import tiny_model
from profiles import made_profile


@pytest.fixture
def cache(tmp_path, monkeypatch):
    # Tests run beside others: the machine is never steady.
    monkeypatch.setattr("firp.engine.automatic.STEADY", 1e4)
    monkeypatch.setattr("firp.engine.automatic.PREEMPTIONS", 1e9)
    monkeypatch.setattr("firp.engine.automatic._measured", {})
    monkeypatch.setenv("FIRP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def predictor(tmp_path, cache):
    """One with a profile beside it, loaded from its folder."""
    folder = tmp_path / "predictor"
    firp.FirpPredictor.for_model(tiny_model(0), 3, 2, num_nodes=8, num_lookahead=2).save_pretrained(folder)
    predictor = firp.load_predictor(folder)
    save_profile(folder / FILE_NAME, made_profile(tiny_model(0), predictor))
    return predictor
