"""The model `firp` of lm-evaluation-harness: generations are those of the harness's own Hugging Face model."""

import sys

import firp
import pytest
from firp.cli.lm_eval import run


def test_without_the_harness_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: lm_eval is not installed, run: pip install 'firp_kernels[lm-eval]'\n"


def harness():
    pytest.importorskip("lm_eval", reason="the extra is missing: pip install 'firp_kernels[lm-eval]'")
    import firp.integrations.lm_eval_model  # noqa: F401 (registers the model)
    from lm_eval.api.registry import get_model

    return get_model("hf"), get_model("firp")


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("until", [[], ["w5"], ["w9 w9", "w1"]])
def test_generations_equal_the_harness_own(tiny, batch_size, until):
    from_hf, from_firp = harness()
    from lm_eval.api.instance import Instance

    options = {"pretrained": str(tiny / "model"), "dtype": "float32", "device": "cpu", "batch_size": batch_size}
    prompts = ["w1 w2 w3", "w4", "w9 w8 w7 w6", "w11", "w2 w2"]
    requests = [
        Instance("generate_until", {}, (prompt, {"until": until, "max_gen_toks": 12, "do_sample": False}), i)
        for i, prompt in enumerate(prompts)
    ]
    model = from_firp(**options, predictor=str(tiny / "predictor"))
    plain = from_hf(**options).generate_until(requests)
    assert model.generate_until(requests) == plain and any(plain)
    assert model._engine.predictor is not None


def test_a_predictor_of_another_model_is_refused(tiny):
    _, from_firp = harness()
    with pytest.raises(firp.PredictorMismatch, match="differs"):
        from_firp(pretrained=str(tiny / "model"), predictor="smollm2-135m", device="cpu")
    with pytest.raises(ValueError, match="predictor: got none for the model"):
        from_firp(pretrained=str(tiny / "model"), device="cpu")
