"""The ops alone, in an engine of your own: no model, no Hugging Face, only tensors.

One attention layer with random keys and values takes the place of a model. A step drafts a tree, attends over it,
verifies it and commits the accepted rows. Shapes and padding: `help(firp_kernels.tree_attention)`.

    python examples/ops_alone.py
"""

import torch

import firp_kernels as ops

BATCH, NODES, LOOKAHEAD, OFFSETS = 2, 6, 2, 2
HEADS, KV_HEADS, HEAD_DIM, SLOTS, VOCAB = 4, 2, 16, 64, 50


def main() -> None:
    """One decode step of two sequences."""
    torch.manual_seed(0)
    cache = torch.zeros(1, 2, BATCH, SLOTS, KV_HEADS, HEAD_DIM)  # [layers, keys and values, B, S, Hkv, D]
    keys, values = cache[0]
    keys[:, :10], values[:, :10] = torch.randn(2, BATCH, 10, KV_HEADS, HEAD_DIM)
    context_lens = torch.tensor([10, 7], dtype=torch.int32)

    # 1. A tree from marginals over the next tokens; yours may come from any drafter.
    marginals = torch.rand(BATCH, OFFSETS, VOCAB).softmax(-1)
    probabilities, candidates = marginals.topk(4)
    roots, depth = torch.tensor([11, 12]), torch.full((BATCH,), OFFSETS, dtype=torch.int32)
    tokens, parents, depths, ancestors, lookahead = ops.draft_tree(
        probabilities, candidates, roots, depth, NODES, LOOKAHEAD
    )
    print("tokens", tokens.tolist())
    print("parents", parents.tolist())

    # 2. One layer's attention: node rows only, so num_offsets adds no pseudo rows here.
    query = torch.randn(BATCH, NODES, HEADS, HEAD_DIM)
    ops.write_cache(*torch.randn(2, BATCH, NODES, KV_HEADS, HEAD_DIM), keys, values, context_lens)
    attended = ops.tree_attention(
        query, keys, values, context_lens, depths, ancestors, lookahead, OFFSETS, scale=HEAD_DIM**-0.5
    )  # [B, N, H, D]

    # 3. Scores that like the first drafted child of the root, so that something is accepted.
    scores = attended.flatten(2) @ torch.randn(HEADS * HEAD_DIM, VOCAB)
    scores[torch.arange(BATCH), 0, tokens[:, 1]] = 100.0
    path, num_accepted, bonus, *_ = ops.verify_tree(scores, None, tokens, parents, lookahead, max_depth=OFFSETS)
    print("accepted", num_accepted.tolist(), "bonus", bonus.tolist())

    # 4. Keys and values of the accepted path move to the end of the context.
    ops.commit_cache(cache, context_lens, path, num_accepted, finished=torch.zeros(BATCH, dtype=torch.bool))
    print("context", context_lens.tolist())


if __name__ == "__main__":
    main()
