"""JSON with one value exchanged for any other: what a reader must refuse in one line, or read.

ANYTHING              values of every type, size and spelling
places, mutated       every place in a JSON value; a copy with another value there
is_read_or_refused    runs a reader
"""

import copy
import math

from hypothesis import strategies as st

from megatron_prune.errors import UserError

ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from([0, 1, -1, 2, 3, 7, 1 << 31, 1 << 63, 10**30, 10**400]),
        st.sampled_from([0.0, 0.5, -1.5, 1e308, math.inf, -math.inf, math.nan]),
        st.sampled_from(["", "4", "llama", "\x1b[2J\x07", "a\nb", "x" * 5000, "../..", "\ud800"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("ab"), inner, max_size=2)),
    max_leaves=4,
)


def places(value, where=()):
    """Every place in a JSON value, from the outside in."""
    yield where
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*where, key))


def mutated(value, where, new):
    value = copy.deepcopy(value)
    if not where:
        return new
    inner = value
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = new
    return value


def is_read_or_refused(read):
    """Either is fine; any other exception is the test's failure."""
    try:
        read()
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 2000, error
