"""FIRP speculative decoding for LLaMA-family models: the model's own output, in fewer forwards.

Source: "Faster LLM inference via future intermediate representation prediction", arXiv 2410.20488.
"""

from firp.engine import Engine
from firp.generate import decode, generate
from firp.metrics import StepEvent, TimeSplit
from firp.models import load_model
from firp.output import FirpOutput
from firp.penalties import FrequencyPenalty
from firp.predictor import FirpPredictor, PredictorMismatch, default_predictor, load_predictor
from firp.state import DecodeState, DecodeStats, StepRecord
from firp.trees import DraftTree, TreeConfig
from firp.typical import TypicalAcceptance

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
