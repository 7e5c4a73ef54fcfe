"""Every implementation that is at hand equals the oracle: integers exactly, floats within stated bounds."""

import pytest
import torch
from cases import attention_case, draft_case, verify_case

import firp_kernels as kernels
from firp_kernels import ops, reference, registry

BUILT = [name for name in ops.SCHEMAS if registry.owner(name, "cpu") == "extension"]
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE)


def implementations(name):
    return ["reference"] + (["extension"] if name in BUILT else [])


@pytest.mark.parametrize("impl", implementations("tree_attention"))
@pytest.mark.parametrize("window", [None, 1, 3, 40, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tree_attention(impl, dtype, window):
    for seed in range(12):
        args = attention_case(seed, dtype, window)
        out = kernels.tree_attention(*args, impl=impl)
        exact = reference.tree_attention(*(a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args))
        assert out.dtype == dtype and out.is_contiguous()
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("impl", implementations("tree_attention"))
def test_a_branch_equals_a_plain_chain(impl):
    """Every root-to-node branch, rerun as causal attention over its own positions."""
    for seed in range(6):
        args = attention_case(seed, torch.float64, None)
        query, key, value, lens, depths, ancestors, lookahead, k, scale, _ = args
        num_nodes, group = depths.shape[1], query.shape[2] // key.shape[2]
        out = kernels.tree_attention(query[:, :num_nodes], key, value, lens, depths, ancestors, lookahead, k, scale, impl=impl)
        seen = reference.unpack_ancestors(ancestors, num_nodes)
        for b, length in enumerate(lens.tolist()):
            for node in range(num_nodes):
                slots = list(range(length)) + [length + a for a in range(num_nodes) if seen[b, node, a]]
                keys = key[b, slots].repeat_interleave(group, 1)
                values = value[b, slots].repeat_interleave(group, 1)
                weights = torch.softmax(torch.einsum("hd,shd->hs", query[b, node], keys) * scale, -1)
                torch.testing.assert_close(out[b, node], torch.einsum("hs,shd->hd", weights, values), rtol=0, atol=1e-12)


@pytest.mark.skipif("tree_attention" not in BUILT, reason="the C++ extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_any_tree(dtype):
    """A chain decoded as one tree equals the chain decoded token by token, bit for bit."""
    generator = torch.Generator().manual_seed(5)
    for length in (0, 3, 60, 64, 127):
        key, value = (torch.randn(1, length + 8, 2, 64, generator=generator).to(dtype) for _ in range(2))
        query = torch.randn(1, 8, 6, 64, generator=generator).to(dtype)
        chain = torch.arange(8, dtype=torch.int32)[None]
        mask = torch.tensor([[(2 << i) - 1 for i in range(8)]], dtype=torch.int32)[..., None]
        none = torch.empty(1, 0, dtype=torch.int32)
        lens = torch.tensor([length], dtype=torch.int32)
        tree = kernels.tree_attention(query, key, value, lens, chain, mask, none, 1, 0.125)
        for i in range(8):
            alone = kernels.tree_attention(query[:, i : i + 1], key, value, lens + i, chain[:, :1], mask[:, :1], none, 1, 0.125)
            assert torch.equal(alone[:, 0], tree[:, i]), (length, i)


@pytest.mark.parametrize("impl", implementations("write_cache"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_cache(impl, dtype):
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        batch, rows = 1 + seed % 3, seed % 7
        lens = torch.randint(0, 10, (batch,), generator=generator).to(torch.int32)
        key = torch.randn(batch, 3, rows, 4, generator=generator).to(dtype).transpose(1, 2)
        cache = torch.randn(2, batch, rows + 10, 3, 4, generator=generator).to(dtype)
        exact = cache.clone()
        kernels.write_cache(key, key.flip(1), cache[0], cache[1], lens, impl=impl)
        reference.write_cache(key, key.flip(1), exact[0], exact[1], lens)
        assert torch.equal(cache, exact)


@pytest.mark.parametrize("impl", implementations("linear"))
@pytest.mark.parametrize("width, outputs", [(5, 7), (64, 10), (576, 64), (577, 33), (1536, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear(impl, dtype, width, outputs):
    generator = torch.Generator().manual_seed(width)
    weight, bias, rows = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((outputs, width), (outputs,), (40, width)))
    out = kernels.linear(rows, weight, bias, impl=impl)
    exact = rows.double() @ weight.double().T + bias.double()
    bound = (2**-8 if dtype == torch.bfloat16 else 2**-21) * (rows.double().abs() @ weight.double().abs().T + 1)
    assert bool(((out.double() - exact).abs() <= bound).all())
    if impl == "extension":
        for count in range(41):
            assert torch.equal(kernels.linear(rows[:count], weight, bias), out[:count])
        strided = torch.stack([rows, rows], 1)[:, 0]
        assert torch.equal(kernels.linear(strided, weight, bias), out)


@pytest.mark.parametrize("seed", range(4))
def test_opcheck(seed):
    """Schema, fake implementation and tracing of each op agree with what it does."""
    attention, draft, verify = attention_case(seed, torch.float32, None), draft_case(seed), verify_case(seed, torch.float32, seed % 2 == 1)
    query, key = attention[0], attention[1].nan_to_num()
    path, accepted = reference.verify_tree(*verify)[:2]
    batch, rows = verify[2].shape
    hidden = torch.randn(2, 5, 8)
    calls = {
        "tree_attention": attention,
        "draft_tree": draft,
        "verify_tree": verify,
        "write_cache": (key[:, :2].contiguous(), key[:, :2].contiguous(), key.clone(), key.clone(), torch.zeros(query.shape[0], dtype=torch.int32)),
        "commit_cache": (torch.randn(2, 2, batch, rows + 4, 1, 4), torch.full((batch,), 2, dtype=torch.int32), path, accepted, torch.zeros(batch, dtype=torch.bool)),
        "predictor_projection": (hidden, torch.randn(3, 8, 8), torch.tensor([[0, 4], [2, -1]], dtype=torch.int32)),
        "linear": (hidden, torch.randn(6, 8), torch.randn(6)),
        "joint_linear": (hidden, [torch.randn(6, 8), torch.randn(3, 8)], [torch.randn(6), torch.randn(3)]),
        "gated_linear": (hidden, torch.randn(6, 8), torch.randn(6, 8)),
        "rms_norm": (hidden, torch.randn(8), 1e-5),
        "top_marginals": (hidden, torch.tensor([[0, 4], [2, 2]]), 3),
        "condition_marginals": (*reference.top_marginals(hidden, torch.tensor([[0, 4], [2, 2]]), 3), torch.tensor([0, 7]), hidden[0, :1].repeat(8, 1), torch.randn(8, 8), 2),
        "rotary": (torch.randn(2, 5, 3, 8), hidden.cos(), hidden.sin()),
    }  # fmt: skip
    if key.shape[1] < 2:
        calls.pop("write_cache")
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    assert calls.keys() | {"write_cache"} == ops.SCHEMAS.keys()
    for name, args in calls.items():
        torch.library.opcheck(getattr(torch.ops.firp, name).default, tuple(args), test_utils=checks)
