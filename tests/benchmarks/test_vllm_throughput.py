"""What is counted of vLLM's engines, without vLLM."""

import pytest
from typer.testing import CliRunner

from benchmarks import vllm_throughput


def test_steps_and_answers_of_each_method_are_counted():
    asked: list[tuple[str, int]] = []

    def method(name, steps):
        def decode(prompts):
            asked.append((name, len(prompts)))
            return 0.5, [steps] * len(prompts)

        return decode

    found = vllm_throughput.compare(
        {
            "plain": method("plain", [[1], [2], [3], [4]]),
            "n-gram": method("n-gram", [[1], [2], [3], [5]]),
            "FIRP": method("FIRP", [[1], [2, 3, 4]]),
        },
        [[7, 8], [9], [7]], batch=2, repeats=2,
    )  # fmt: skip
    assert [figures["tau"] for figures in found.values()] == [1, 1, 3]
    assert [figures["answers_equal_to_plain"] for figures in found.values()] == [3, 0, 3]
    assert found["FIRP"]["tokens"] == 12 and found["FIRP"]["tokens_per_second"] == [12.0, 12.0]
    assert found["FIRP"]["over_plain"] == [1.0, 1.0]
    warm, *timed = [asked[first : first + 6] for first in range(0, len(asked), 6)]
    assert [name for name, _ in warm] == ["plain", "plain", "n-gram", "n-gram", "FIRP", "FIRP"]
    assert [[name for name, _ in run] for run in timed] == [
        ["plain", "n-gram", "FIRP", "n-gram", "FIRP", "plain"], ["n-gram", "FIRP", "plain", "FIRP", "plain", "n-gram"],
    ]  # fmt: skip
    assert all([size for _, size in run] == [2, 2, 2, 1, 1, 1] for run in timed)


@pytest.mark.parametrize("option", [["--dtype", "int8"], ["--batch", "0"], ["--batch", "1,x"], ["--batch", ""]])
def test_a_bad_option_is_named(option):
    done = CliRunner().invoke(vllm_throughput.app, option)
    assert done.exit_code == 2 and f"{option[0][2:]}: got" in done.output
