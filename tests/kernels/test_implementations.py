"""Every op's schema, fake implementation and tracing agree with what it does."""

import pytest
import torch
from cases import attention_case, draft_case, verify_case

from firp_kernels import ops
from firp_kernels.ops import top_marginals, verify_tree


@pytest.mark.parametrize("seed", range(4))
def test_opcheck(seed):
    attention, draft = attention_case(seed, torch.float32, None), draft_case(seed)
    verify = verify_case(seed, torch.float32, seed % 2 == 1)
    query, key = attention[0], attention[1].nan_to_num()
    verified = verify_tree.reference(*verify)
    path, accepted = verified[:2]
    batch, rows = verify[2].shape
    hidden, which = torch.randn(2, 5, 8), torch.tensor([[0, 4], [2, 2]])
    marginals = top_marginals.reference(hidden, which, 3)
    written = key[:, :2].contiguous(), key[:, :2].contiguous(), key.clone(), key.clone()
    lens, done = torch.full((batch,), 2, dtype=torch.int32), torch.zeros(batch, dtype=torch.bool)
    step = key[:, : query.shape[1]].contiguous()
    calls = {
        "tree_attention": attention,
        "write_and_attend": (query, step, step.clone(), torch.stack([key, key]), *attention[3:]),
        "draft_tree": draft,
        "verify_tree": verify,
        "emit_tokens": (*verified, verify[2], path[0].long(), lens, done, lens.long(), 3, 40, 50),
        "write_cache": (*written, torch.zeros(query.shape[0], dtype=torch.int32)),
        "commit_cache": (torch.randn(2, 2, batch, rows + 4, 1, 4), lens, path, accepted, done),
        "predictor_projection": (hidden, torch.randn(3, 8, 8), torch.tensor([[0, 4], [2, -1]], dtype=torch.int32)),
        "linear": (hidden, torch.randn(6, 8), torch.randn(6)),
        "joint_linear": (hidden, [torch.randn(6, 8), torch.randn(3, 8)], [torch.randn(6), torch.randn(3)]),
        "gated_linear": (hidden, torch.randn(6, 8), torch.randn(6, 8)),
        "rms_norm": (hidden, torch.randn(8), 1e-5),
        "top_marginals": (hidden, which, 3),
        "condition_marginals": (*marginals, torch.tensor([0, 7]), hidden[0, :1].repeat(8, 1), torch.randn(8, 8), 2),
        "rotary": (torch.randn(2, 5, 3, 8), hidden.cos(), hidden.sin()),
    }
    if key.shape[1] < 2:
        calls.pop("write_cache")
    assert calls.keys() | {"write_cache"} == ops.SCHEMAS.keys()
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for name, args in calls.items():
        torch.library.opcheck(getattr(torch.ops.firp, name).default, tuple(args), test_utils=checks)
