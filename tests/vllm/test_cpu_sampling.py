"""What the plug-in mends in vLLM's rejection sampler on a CPU."""

import fake_vllm
import torch


def test_values_of_requests_are_repeated_for_their_drafts(monkeypatch):
    fake_vllm.installed(monkeypatch)
    from firp_vllm.cpu_sampling import expand_batch_to_tokens

    sums = torch.tensor([2, 2, 5], dtype=torch.int32)
    temperatures = torch.tensor([0.7, 0.0, 0.0])
    assert torch.equal(expand_batch_to_tokens(temperatures, sums, 5, 0, 1), torch.tensor([0.7, 0.7, 1.0, 1.0, 1.0]))
    top_k = torch.tensor([3, 4, 5], dtype=torch.int32)
    assert torch.equal(expand_batch_to_tokens(top_k, sums, 5), torch.tensor([3, 3, 5, 5, 5], dtype=torch.int32))
    assert expand_batch_to_tokens(top_k, torch.zeros(3, dtype=torch.int32), 0).shape == (0,)


def test_a_step_without_drafts_has_nothing_to_constrain(monkeypatch):
    sampler = fake_vllm.installed(monkeypatch)["vllm.v1.sample.rejection_sampler"]
    from firp_vllm.cpu_sampling import expand_batch_to_tokens, mend

    for _ in range(2):
        mend()
    assert sampler.expand_batch_to_tokens is expand_batch_to_tokens
    assert sampler.apply_sampling_constraints(torch.ones(0, 6)).shape == (0, 6)
    assert torch.equal(sampler.apply_sampling_constraints(torch.ones(2, 6)), torch.full((2, 6), 0.5))
