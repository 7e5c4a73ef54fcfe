"""Bad arguments of the ops that do what a layer does with few rows: (what the error says first, arguments)."""

import torch
from cases import layers_case


def replaced(args, **changes):
    args = list(args)
    for index, value in changes.items():
        args[int(index[1:])] = value
    return args


def bad_linear():
    yield "input", [torch.zeros(2, 3), torch.zeros(4, 5), None]
    yield "weight", [torch.zeros(2, 5), torch.zeros(4, 5).double(), None]
    yield "bias", [torch.zeros(2, 5), torch.zeros(4, 5), torch.zeros(5)]


def bad_joint_linear():
    rows, weight, bias = torch.zeros(2, 5), torch.zeros(4, 5), torch.zeros(4)
    yield "weights: got none", [rows, [], []]
    yield "input", [rows[:, :3], [weight, weight], []]
    yield "input", [rows.int(), [weight], []]
    yield r"weights\[1\]", [rows, [weight, weight[:, :3]], []]
    yield r"weights\[1\]", [rows, [weight, weight.bfloat16()], []]
    yield r"weights\[0\]", [rows, [bias], []]
    yield "biases: got 1, expected none or 2", [rows, [weight, weight], [bias]]
    yield r"biases\[1\]", [rows, [weight, weight], [bias, torch.zeros(5)]]
    yield r"biases\[0\]", [rows, [weight], [bias.double()]]


def bad_gated_linear():
    yield "input", [torch.zeros(2, 3), torch.zeros(4, 5), torch.zeros(4, 5)]
    yield "gate", [torch.zeros(2, 5), torch.zeros(4, 5).double(), torch.zeros(4, 5)]
    yield "up", [torch.zeros(2, 5), torch.zeros(4, 5), torch.zeros(3, 5)]


def bad_update_states():
    states, inputs, outputs = torch.zeros(2, 3, 4), torch.zeros(3, 5, 8), torch.zeros(3, 4, 5)
    good = [states, states[:, 0], inputs, torch.zeros(3, 5), outputs]
    yield "states", replaced(good, _0=states[0])
    yield "states", replaced(good, _0=states.int())
    yield "first", replaced(good, _1=states[:, 0, :3])
    yield "inputs", replaced(good, _2=inputs[..., :7])
    yield "inputs", replaced(good, _2=inputs[:2])
    yield "bias", replaced(good, _3=torch.zeros(3, 4))
    yield "outputs", replaced(good, _4=outputs.double())
    yield "outputs", replaced(good, _4=outputs[:, :3])


def bad_rms_norm():
    yield "input", [torch.zeros(2, 3), torch.zeros(4), 1e-5]
    yield "weight", [torch.zeros(2, 4), torch.zeros(4, 4), 1e-5]
    yield "weight", [torch.zeros(2, 4), torch.zeros(4).bfloat16(), 1e-5]


def bad_norm_qkv_rotary():
    rows, norm, angles, weight = torch.zeros(1, 2, 5), torch.zeros(5), torch.zeros(1, 2, 4), torch.zeros(8, 5)
    good = [rows, norm, 1e-5, [weight] * 3, [], angles, angles]
    yield "weights: got 2, expected 3", replaced(good, _3=[weight, weight])
    yield "biases: got 1", replaced(good, _4=[weight[:, 0]])
    yield r"biases\[2\]", replaced(good, _4=[weight[:, 0], weight[:, 0], norm])
    yield "input", replaced(good, _0=rows[0])
    yield "input", replaced(good, _0=rows[..., :3])
    yield "input", replaced(good, _0=rows.int())
    yield "norm", replaced(good, _1=norm.double())
    yield "norm", replaced(good, _1=norm[None])
    yield r"weights\[1\]", replaced(good, _3=[weight, weight[:, :3], weight])
    yield r"weights\[2\]", replaced(good, _3=[weight, weight, weight.double()])
    yield r"weights\[0\]: got 6 outputs", replaced(good, _3=[weight[:6], weight, weight])
    yield "cos", replaced(good, _5=angles[:, :1])
    yield "sin", replaced(good, _6=angles.double())
    yield "cos: got head_dim 3", replaced(good, _5=angles[..., :3], _6=angles[..., :3])
    yield "cos: got head_dim 0", replaced(good, _5=angles[..., :0], _6=angles[..., :0])


def bad_output_norm_mlp():
    attended, residual, wide = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 5), torch.zeros(7, 5)
    good = [attended, residual, torch.zeros(5, 8), None, residual[0, 0], 1e-5, wide, wide, wide.T]
    yield "residual", replaced(good, _1=residual[0])
    yield "attended", replaced(good, _0=attended[:, :1])
    yield "output", replaced(good, _2=torch.zeros(5, 7))
    yield "bias", replaced(good, _3=torch.zeros(4))
    yield "norm", replaced(good, _4=torch.zeros(4))
    yield "gate", replaced(good, _6=wide[:, :4])
    yield "up", replaced(good, _7=wide[:6])
    yield "down", replaced(good, _8=wide)
    names = ("attended", "residual", "output", "bias", "norm", "eps", "gate", "up", "down")
    for index in (1, 2, 4, 6, 7, 8):
        yield f"{names[index]}: got dtype", replaced(good, **{f"_{index}": good[index].double()})
    yield "bias: got dtype", replaced(good, _3=torch.zeros(5).double())
    yield "attended: got dtype", [part.int() if isinstance(part, torch.Tensor) else part for part in good]


def bad_decoder_layers():
    good = layers_case(0, torch.float32, True)
    weights = "norms", "projections", "biases", "outputs", "output_biases", "mlps"
    for place, name in enumerate(weights, 4):
        given = good[place]
        yield f"{name}: got {len(given) - 1}, expected {len(given)}", replaced(good, **{f"_{place}": given[1:]})
    yield "norms: got 4, expected 2", replaced(good, _10=good[10][:1])
    yield "cache: got shape", replaced(good, _10=good[10][0])
    yield "cos: got shape", replaced(good, _1=good[1][0])
    yield "input: got shape", replaced(good, _0=good[0][0])
    yield "query: got", replaced(good, _0=good[0][:, 1:], _1=good[1][:, 1:], _2=good[2][:, 1:])
    yield "cos: got shape", replaced(good, _1=good[1][:, 1:])
    yield "cache: got dtype", replaced(good, _10=good[10].double())
    yield "input: got dtype", replaced(good, _0=good[0].int())
    empty = replaced(good, _1=good[1][..., :0], _2=good[2][..., :0], _10=good[10][..., :0])
    yield "cos: got head_dim 0", empty
    yield "context_lens", replaced(good, _11=good[11] + 10_000)
    query = good[5][0]  # of 24 outputs, as three heads of keys have
    yield (
        r"projections\[0\]: got 16 outputs, expected a multiple of 24",
        replaced(good, _5=[query[:16], *[query] * 5], _10=good[10].repeat(1, 1, 1, 1, 3, 1)),
    )
    # Every tensor of every list is named where it is narrower than it should be, and where its dtype is another.
    for place, name in enumerate(weights, 4):
        for i, tensor in enumerate(good[place]):
            for wrong in (tensor[..., 1:], tensor.double()):
                changed = [*good[place][:i], wrong, *good[place][i + 1 :]]
                yield rf"{name}\[{i}\]: got", replaced(good, **{f"_{place}": changed})


def bad_rotary():
    angles = torch.zeros(1, 2, 4)
    yield "rows", [torch.zeros(1, 2, 4), angles, angles]
    yield "cos", [torch.zeros(1, 3, 1, 4), angles, angles]
    yield "sin", [torch.zeros(1, 2, 1, 4), angles, angles.bfloat16()]
    yield "rows", [torch.zeros(1, 2, 1, 3), angles[..., :3], angles[..., :3]]
    yield "rows", [torch.zeros(1, 2, 1, 8)[..., ::2], angles, angles]
