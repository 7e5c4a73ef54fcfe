"""Triton kernels, one op a file; a file is imported on its op's first call.

House dialect:
    i_x             an index: of the program or of a loop (i_b sequence, i_h head, i_s split)
    o_x             offsets along an axis, a range (o_d)
    p_x, b_x, m_x   pointers; a block of values; a mask. A name without prefix is one number, the same for the program
    s_tensor_axis   a stride in elements (s_key_cache_b)
    UPPER_CASE      a constexpr; BLOCK_X is the tile along axis x, HEAD_DIM is D, WIDTH that of a row
    # [BLOCK_M, BLOCK_D] stands at each load: the shape of what it loads; # [] for one number
    docstring       of each kernel: the formula, and what one program computes
    launch_config   a `LaunchConfig` from shapes and architecture; no trial runs, which would write into caches
    aot_calls       arguments of launches that `aot` compiles without a GPU; only shapes, strides and dtypes count
"""
