"""FIRP speculative decoding for LLaMA-family models: the model's own output, in fewer forwards.

Source: "Faster LLM inference via future intermediate representation prediction", arXiv 2410.20488.
"""

from firp.drafting.predictor import FirpPredictor, PredictorMismatch, default_predictor, load_predictor
from firp.drafting.trees import DraftTree, TreeConfig
from firp.engine.engine import Engine
from firp.engine.state import DecodeState, DecodeStats, StepRecord
from firp.generation.generate import decode, generate
from firp.generation.metrics import StepEvent, TimeSplit
from firp.generation.output import FirpOutput
from firp.sampling.penalties import FrequencyPenalty
from firp.sampling.typical import TypicalAcceptance
from firp.tools.models import load_model

__all__ = [
    "DecodeState",
    "DecodeStats",
    "DraftTree",
    "Engine",
    "FirpOutput",
    "FirpPredictor",
    "FrequencyPenalty",
    "PredictorMismatch",
    "StepEvent",
    "StepRecord",
    "TimeSplit",
    "TreeConfig",
    "TypicalAcceptance",
    "decode",
    "default_predictor",
    "generate",
    "load_model",
    "load_predictor",
]
