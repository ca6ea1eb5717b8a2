import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from samq.llamacpp.prefixes import common_length, trees

FEW_TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple)


@given(st.sets(FEW_TOKENS, min_size=1, max_size=40).map(sorted), st.data())
def test_cache_and_batch_together_hold_every_sequence_once(sequences, data):
    wanted_from = [data.draw(st.integers(0, len(sequence) - 1)) for sequence in sequences]
    limit, members = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6))
    arrays = [np.array(sequence, np.int32) for sequence in sequences]
    cached, seen = np.empty(0, np.int32), []
    for tree in trees(arrays, wanted_from, tokens=limit, members=members):
        assert 1 <= len(tree.members) <= members
        assert tree.kept[0] + len(tree.tokens) <= limit + max(map(len, sequences))
        for place, (index, kept, path) in enumerate(zip(tree.members, tree.kept, tree.paths, strict=True)):
            assert kept <= min(wanted_from[index], tree.kept[0])
            assert (path[:kept] == -1).all() and (np.diff(path[kept:]) > 0).all()
            rebuilt = np.concatenate([cached[:kept], tree.tokens[path[kept:]]])
            assert rebuilt.tolist() == list(sequences[index])
            assert tree.positions[path[kept:]].tolist() == list(range(kept, len(rebuilt)))
            assert ((tree.first[path[kept:]] <= place) & (place <= tree.last[path[kept:]])).all()
        shares = sum(len(path) - kept for path, kept in zip(tree.paths, tree.kept, strict=True))
        assert (tree.last - tree.first + 1).sum() == shares
        seen += tree.members
        cached = arrays[tree.members[-1]]
    assert sorted(seen) == list(range(len(sequences)))


@given(st.sets(FEW_TOKENS, min_size=1, max_size=40).map(sorted), st.integers(1, 20), st.integers(1, 6))
def test_what_sequences_begin_with_is_evaluated_once(sequences, limit, members):
    beginnings = {sequence[:length] for sequence in sequences for length in range(1, len(sequence) + 1)}
    arrays = [np.array(sequence, np.int32) for sequence in sequences]
    prefix_trees = trees(arrays, [len(sequence) - 1 for sequence in sequences], tokens=limit, members=members)
    assert sum(len(tree.tokens) for tree in prefix_trees) == len(beginnings)


def test_common_length_is_that_of_the_common_beginning():
    one = np.array([1, 2, 3])
    assert common_length(one, np.array([1, 2, 4, 3])) == 2
    assert common_length(one, np.array([1, 2])) == 2
    assert common_length(one, np.array([2, 2, 3])) == 0
    assert common_length(one, np.array([])) == 0
