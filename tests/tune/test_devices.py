"""`firp tune` on a GPU: what is replayed is on the host, the recordings as well as the transition's tables."""

import pytest
import torch
from firp.drafting import transition
from firp.tune import tuner
from models import tiny_model, tiny_predictor


class OnGpu:
    """Stands for a table on a GPU: it can be copied to the host, and nothing else."""

    def __init__(self, table):
        self.table = table

    def cpu(self):
        return self.table


class Replayed(Exception):
    """The tuner has got as far as its first replay."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_replay_takes_tables_and_recordings_of_one_device(dtype, monkeypatch):
    model = tiny_model(3, dtype=dtype)
    predictor = tiny_predictor(model, 3)

    def replay(recordings, tree, num_offsets, tables):
        steps.append(tuner_replay(recordings, tree, num_offsets, tables))
        held = [value for recording in recordings for value in vars(recording).values() if torch.is_tensor(value)]
        assert all(tensor.device.type == "cpu" for tensor in [*tables, *held])
        raise Replayed

    steps, tuner_replay = [], tuner.replay
    monkeypatch.setattr(
        tuner, "token_tables", lambda *arguments: tuple(map(OnGpu, transition.token_tables(*arguments)))
    )
    monkeypatch.setattr(tuner, "replay", replay)
    config = tuner.TuneConfig(
        nodes=(4,), lookahead=(2,), kinds=("dynamic",), max_new_tokens=6, context=8, steps=1, repeats=1
    )
    prompts = [torch.tensor([4, 5, 6]), torch.tensor([5, 4])]
    with pytest.raises(Replayed):
        tuner.Tuner(model, predictor, prompts, config, progress=False).run()
    assert steps[0].stats.steps > 0
