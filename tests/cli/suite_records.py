"""Made-up questions in the forms of three suites, in words of the tiny model."""

import json

SPEC = [
    {"question_id": 81, "category": "writing", "turns": ["w1 w2", "w3 w4"]},
    {"question_id": 91, "category": "roleplay", "turns": ["w5", "w6"], "reference": ["a", "b"]},
    {"question_id": 161, "category": "translation", "turns": ["w7 w8"]},
    {"question_id": 481, "category": "rag", "turns": ["w12 w13 w12"]},
]
MT = [{"question_id": 80 + i, "category": c, "turns": [f"w{i}", "w9 w8"]} for i, c in enumerate(["math", "stem"])]
SPEED = [
    {"question_id": "0f" * 16, "category": "rag", "sub_category": None, "turns": ["w1 w2", "w3", "w4"], "source": "x"},
    {"question_id": "1e" * 16, "category": "coding", "turns": ["w5 w6"], "multiturn": False},
]
FILES = {"spec-bench": SPEC, "mt-bench": MT, "speed-bench": SPEED}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
