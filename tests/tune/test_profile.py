"""A profile tells of every tree what decoding with it does, answer by answer, and comes back from its file alone."""

import itertools
import random
from functools import partial

import firp
import numpy as np
import pytest
from firp.drafting.profile import NODES, load_profile, save_profile
from models import PAD, tiny_model, tiny_predictor, update_predictor
from profiles import made_profile, some_prompts
from torch.nn.utils.rnn import pad_sequence


def setup(seed, make=tiny_predictor, kind="random", vocab=11, max_new_tokens=40):
    model = tiny_model(seed, vocab=vocab)
    predictor, prompts = make(model, seed, kind), some_prompts(seed, vocab)
    return model, predictor, prompts, made_profile(model, predictor, prompts, max_new_tokens)


def decoded(model, predictor, prompts, tree, max_new_tokens=40):
    """Steps of each prompt, and tokens; the prompts are decoded in one batch."""
    ids = pad_sequence(prompts, batch_first=True, padding_value=PAD, padding_side="left")
    events = []
    firp.generate(
        model, ids, attention_mask=(ids != PAD).long(), engine=firp.Engine(model, predictor, tree),
        max_new_tokens=max_new_tokens, do_sample=False, on_step=events.append,
    )  # fmt: skip
    counts = [[len(event.tokens[b]) for event in events if b in event.tokens] for b in range(len(prompts))]
    return [len(one) for one in counts], [sum(one) for one in counts]


def some_tree(rng):
    if rng.random() < 0.5:
        return firp.TreeConfig(*some_size(rng, (1, *NODES)))
    return firp.TreeConfig(*some_size(rng, (2, 5, 9, 16)), "static")


def some_size(rng, sizes):
    """A few nodes have all tokens of a small vocabulary below them: no mass is left, and rounding would order them."""
    num_nodes = rng.choice(sizes)
    return num_nodes, num_nodes if rng.random() < 0.3 else rng.randint(1, (3 * num_nodes + 3) // 4)


KINDS = [
    (tiny_predictor, "random"), (tiny_predictor, "identity"), (tiny_predictor, "inverted"),
    (update_predictor, "random"), (partial(update_predictor, listed=5), "random"),
]  # fmt: skip


@pytest.mark.parametrize("make, kind", KINDS)
def test_a_profile_counts_the_steps_that_decoding_takes(make, kind):
    rng = random.Random(1)
    model, predictor, prompts, profile = setup(0, make, kind)
    for k in (1, 2, 3):
        for _ in range(5):
            tree = some_tree(rng)
            steps, tokens = decoded(model, predictor.first_offsets(k), prompts, tree)
            assert profile.replay(tree, k).tolist() == steps, (k, tree)
            assert profile.lengths.tolist() == tokens
            assert profile.tau(tree, k) == sum(tokens) / sum(steps)


def test_a_batch_lasts_as_long_as_its_slowest_answer():
    profile, tree = setup(0)[3], firp.TreeConfig(4, 2)
    steps = (profile.replay(tree, 2) / profile.lengths).tolist()
    for batch_size in (1, 2, 3):
        slowest = [max(batch) for batch in itertools.product(steps, repeat=batch_size)]
        assert profile.batch_tau(tree, 2, batch_size) == pytest.approx(len(slowest) / sum(slowest), rel=1e-12)
    assert profile.batch_tau(tree, 2, 1) > profile.batch_tau(tree, 2, 8) > 1


def test_paths_of_a_static_tree_and_answers_of_one_token():
    model, predictor, prompts, profile = setup(4, max_new_tokens=1)
    assert profile.replay(firp.TreeConfig(4, 2), 3).tolist() == [1] * len(prompts)
    model, predictor, prompts, profile = setup(4)
    tree = firp.TreeConfig(4, 2, "static", ((0,), (2,), (2, 1)))
    assert profile.replay(tree, 3).tolist() == decoded(model, predictor, prompts, tree)[0]


def test_what_a_profile_does_not_know_is_refused():
    profile = setup(5)[3]
    for tree, k in ((firp.TreeConfig(5, 1), 3), (firp.TreeConfig(4, 1), 4), (firp.TreeConfig(20, 1, "static"), 1)):
        assert not profile.knows(tree, k)
        with pytest.raises(ValueError, match="tree: got"):
            profile.replay(tree, k)


def test_the_file_holds_all_of_it(tmp_path):
    profile = setup(6)[3]
    save_profile(tmp_path / "acceptance.npz", profile)
    read = load_profile(tmp_path / "acceptance.npz")
    for name, value in vars(profile).items():
        np.testing.assert_array_equal(getattr(read, name), value)


DAMAGE = {
    "num_offsets": np.int64(0),
    "lengths": np.array([1, 0]),
    "category": np.array([7] * 5),
    "categories": np.array([1.0]),
    "fingerprint": np.array(3),
    "places": np.zeros((2, 2), np.uint8),
    "ranks": np.zeros((3, 10), np.int64),
    "nodes": np.arange(11),
}


@pytest.mark.parametrize("field", DAMAGE)
def test_a_damaged_field_is_named(tmp_path, field):
    path = tmp_path / "acceptance.npz"
    save_profile(path, setup(7, max_new_tokens=4)[3])
    named = dict(np.load(path))
    np.savez(path, **named | {field: DAMAGE[field]})
    with pytest.raises(ValueError, match=f"acceptance.npz: .*{field}"):
        load_profile(path)
    np.savez(path, **{name: value for name, value in named.items() if name != field})
    with pytest.raises(ValueError, match="got the fields"):
        load_profile(path)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"\x00" * 99])
def test_another_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "acceptance.npz"
    path.write_bytes(damage)
    with pytest.raises(ValueError, match="acceptance"):
        load_profile(path)
    save_profile(path, setup(8, max_new_tokens=4)[3])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="acceptance"):
        load_profile(path)
