import pytest

from minideepseek.classroom.components import components, equations, page_of, pairs


def test_every_basic_component_is_found_once():
    names = [c.name for c in components()]
    assert len(set(names)) == len(names)
    assert {"add", "cross_entropy", "dropout", "embedding", "layernorm", "linear", "log_softmax", "rmsnorm", "silu_mul",
            "softmax", "swiglu"} <= set(names)


def test_pairs_needs_both_halves():
    assert pairs("def a_forward(): pass\ndef b_forward(): pass\ndef b_backward(): pass\ndef _c_forward(): pass\ndef _c_backward(): pass") == ["b"]


def test_page_and_equations():
    assert page_of('"""A.\n\nDerivation: whiteboard/a/b.md     Source: x\n"""') == "whiteboard/a/b.md"
    assert page_of("x = 1") is None
    assert equations(["a = 1   # (B, T)   # eq. 3", "b = 2  # see eq. 4 of the paper", "c  # eq. 12  "]) == [3, 12]


def test_broken_source_is_a_syntax_error():
    with pytest.raises(SyntaxError):
        pairs("def (")
