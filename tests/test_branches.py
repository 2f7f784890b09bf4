"""Branches of residual sums: which are found, removal against silencing, what is refused, costs, ranking and repair."""

import functools
import re

import numpy as np
import onnx
import onnx_ir as ir
import prune_zoo
import pytest
import zoo
from edgec.compiler import layers, pipeline
from edgec.compiler import model as model_io
from edgec.compiler.proof import Prover
from edgec.compiler.pruning import branch_ranking, repair
from edgec.compiler.pruning.structure import Structure
from edgec.passes import channel_cuts, pruning
from edgec.passes.branch_rewrites import removed, silenced
from edgec.passes.branches import branches, name_of
from edgec.passes.cut_moves import JoinMoves
from equivalence import assert_equivalent
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning_compiler import error, feeds

#: A layer with weight 0 gives its bias exactly; where it is added elsewhere, or a chain of 0 + b + c is summed up in
#: another order, float32 rounds otherwise, and a dozen layers pass that on.
RTOL = 1e-5

ANIMALS = {**prune_zoo.BUILDERS, "bottleneck": prune_zoo.bottleneck}

#: The layer that each branch ends with, by the sum it goes into, by hand.
FOUND = {
    "resnet-a": ["Add Conv_3", "Add_2 Conv_5", "Add_3 Conv_7"],
    "resnet-b": ["Add Conv_3", "Add_2 Conv_5", "Add_2 Conv_6", "Add_3 Conv_8"],
    "bottleneck": ["Add Conv_4", "Add_2 Conv_7", "Add_2 Conv_8"],
    "shufflenet-v1": ["Add Conv_4"],
    "mobilenet-v2": ["Add Conv_4"],
    "mobilenet-v3": ["Add Conv_6"],
    "yolo": ["Add Conv_5"],
    "convnext": ["Add_3 MatMul_2"],
    "vit": ["Add_7 MatMul_6", "Add_10 MatMul_8"],
    "vit-joined": ["Add_5 MatMul_4", "Add_8 MatMul_6"],
}


def prepared(model):
    """The model as prune() has it: named, folded, its shuffles joined."""
    return pipeline.run(model, [*pipeline.exact_passes(), JoinMoves()], None)[0]


@functools.cache
def animal(name):
    model = prepared(ANIMALS[name]())
    return model, branches(model)


def check(model, chosen, rtol=RTOL):
    """Removal is silencing, leaves the model as it was, and takes away at least the nodes it said."""
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    quiet, result = silenced(model, chosen), removed(model, chosen)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before, "the model is the caller's"
    onnx.checker.check_model(model_io.serialize(result), full_check=True)
    assert_equivalent(quiet, result, rtol=rtol)
    left = {name_of(node) for node in result.graph}
    assert not left & {name for branch in chosen for name in branch.nodes}
    read = {value for node in result.graph for value in node.inputs}
    assert all(value in read for value in result.graph.initializers.values())
    return result


def macs(model):
    return sum(layers.macs(node) for node in model.graph if node.op_type in layers.LINEAR)


# ------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("name", ANIMALS)
def test_the_branches_of_the_zoo(name):
    _, found = animal(name)
    assert [f"{b.add} {b.layer}".replace("node_", "") for b in found] == FOUND.get(name, [])
    assert found.refusals == ()
    assert [branch.name for branch in found] == [f"branch:{branch.layer}" for branch in found]


def test_the_nodes_of_a_branch_are_those_that_compute_for_it_alone():
    _, found = animal("resnet-b")
    names = [" ".join(branch.nodes).replace("node_", "") for branch in found]
    assert names == ["Conv_2 Relu_2 Conv_3", "Conv_4 Relu_4 Conv_5", "Conv_6", "Conv_7 Relu_6 Conv_8"]
    _, found = animal("mobilenet-v3")  # its gate is inside
    assert {"node_GlobalAveragePool", "node_HardSigmoid", "node_Mul"} <= set(found[0].nodes)
    model, found = animal("vit")
    assert len(found[0].nodes) == 21 and found[0].nodes[0] == "node_LayerNormalization"
    assert found[1].nodes[0] == "node_LayerNormalization_2"


# ------------------------------------------------------------------------------------------- removal


@pytest.mark.parametrize("name", FOUND)
def test_each_branch_and_all_of_them_are_removed_as_if_silenced(name):
    model, found = animal(name)
    for branch in found:
        assert macs(check(model, [branch])) < macs(model)
    check(model, found.feasible([branch.name for branch in found]))


@pytest.mark.parametrize("name", ["resnet-a", "resnet-b", "bottleneck"])
@pytest.mark.parametrize("opset", [11, 17])
def test_opsets(name, opset):
    build = {"bottleneck": prune_zoo.bottleneck, "resnet-a": lambda **o: prune_zoo.resnet("A", **o)}
    model = prepared(build.get(name, lambda **o: prune_zoo.resnet("B", **o))(opset=opset))
    found = branches(model)
    assert [f"{b.add} {b.layer}".replace("node_", "") for b in found] == FOUND[name]
    check(model, found.feasible([branch.name for branch in found]))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(FOUND)), st.data())
def test_any_feasible_set(name, data):
    """In any order, and of channels that were cut before as well."""
    model, found = animal(name)
    names = data.draw(st.lists(st.sampled_from([branch.name for branch in found]), unique=True))
    chosen = found.feasible(names)
    assert len({branch.add for branch in chosen}) == len(chosen)
    check(model, data.draw(st.permutations(chosen)))
    groups, rng = channel_cuts.groups(model), np.random.default_rng(data.draw(st.integers(0, 1000)))
    gone = groups.feasible({g.name: rng.permutation(g.units)[: rng.integers(0, g.units)].tolist() for g in groups})
    assert_equivalent(
        channel_cuts.mask(silenced(model, chosen), gone), removed(channel_cuts.cut(model, gone), chosen), rtol=2e-5
    )


def test_the_comparison_can_fail():
    model, found = animal("resnet-b")
    with pytest.raises(AssertionError):
        assert_equivalent(silenced(model, [found[0]]), removed(model, [found[1]]), rtol=RTOL)
    with pytest.raises(AssertionError):
        assert_equivalent(model, removed(model, [found[0]]), rtol=RTOL)
    assert Prover(silenced(model, [found[0]])).prove(removed(model, [found[0]]), RTOL).error <= RTOL
    assert Prover(model).prove(removed(model, [found[0]]), RTOL).error > 1e-2


def test_batches_stay_dynamic():
    model, found = animal("vit")
    result = check(model, list(found))
    assert [str(d) for d in result.graph.inputs[0].shape] == ["N", "3", "8", "8"]
    assert all(str(node.outputs[0].shape[0]) == "N" for node in result.graph)


def test_half_floats_behind_which_batch_norm_is_left():
    """A half has 11 bits, and a dozen layers pass on what is rounded at each."""
    model = prepared(prune_zoo.resnet("B", dtype="float16"))
    assert "BatchNormalization" in {node.op_type for node in model.graph}
    found = branches(model)
    assert [f"{b.add} {b.layer}".replace("node_", "") for b in found] == FOUND["resnet-b"]
    check(model, found.feasible(["branch:node_Conv_3", "branch:node_Conv_6"]), rtol=5e-3)


def residual(f, *, bias="", declared="", out="y = Relu (t)", more="", add="t = Add (x, f)", y="float[N,4,6,6] y"):
    text = f"""g (float[N,4,6,6] x) => ({y}) <float[4,4,3,3] w, float[4,4,3,3] v, float[4] b{declared}> {{
        h = Conv <pads = [1,1,1,1]> (x, w)
        r = Relu (h)
        {f or f"f = Conv <pads = [1,1,1,1]> (r, v{bias})"}
        {add}
        {out}
        {more}
    }}"""
    return prepared(zoo.model(text))


def test_a_sum_of_which_nothing_is_left_is_bypassed():
    model = residual("")
    (branch,) = branches(model)
    assert [node.op_type for node in check(model, [branch]).graph] == ["Relu"]
    model = residual("", bias=", b")
    assert [node.op_type for node in check(model, list(branches(model))).graph] == ["Add", "Relu"]


@pytest.mark.parametrize("bias", ["", ", b"])
def test_a_sum_that_is_the_graphs_output_keeps_its_name(bias):
    direct = residual("", bias=bias, add="y = Add (f, x)", out="")
    assert [node.op_type for node in check(direct, list(branches(direct))).graph] == ["Add" if bias else "Identity"]
    text = f"""g (float[N,4,6,6] x) => (float[N,4,6,6] y) <float[4,4,3,3] w, float[4,4,1,1] v, float[4] b> {{
        s = Conv <pads = [1,1,1,1]> (x, w)
        r = Relu (s)
        f = Conv (r, v{bias})
        y = Add (s, f)
    }}"""
    model = prepared(zoo.model(text))
    result = check(model, list(branches(model)))
    assert [node.op_type for node in result.graph] == (["Conv", "Add"] if bias else ["Conv"])
    assert [value.name for value in result.graph.outputs] == ["y"]
    both = residual("", bias=bias, y="float[N,4,6,6] y, float[N,4,6,6] r", add="y = Add (f, r)", out="")
    assert [node.op_type for node in check(both, list(branches(both))).graph][:2] == ["Conv", "Relu"]


@pytest.mark.parametrize(
    "tail",
    [
        "f = Sigmoid (c)",
        "q = Sigmoid (c)\n f = Mul (c, q)",
        "q = Mul (c, gamma)\n f = Add (q, gamma)",
        "q = Transpose <perm = [0,2,3,1]> (c)\n p = Mul (q, last)\n f = Transpose <perm = [0,3,1,2]> (p)",
    ],
)
def test_what_stands_between_the_layer_and_the_sum(tail):
    declared = ", float[4,1,1] gamma, float[4] last"
    model = residual(f"c = Conv <pads = [1,1,1,1]> (r, v, b)\n {tail}", declared=declared)
    (branch,) = branches(model)
    assert [node.op_type for node in check(model, [branch]).graph] == ["Add", "Relu"]


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("bias", ["", ", b", ", b2"])
def test_gemm(trans, bias):
    text = f"""g (float[N,5] x) => (float[N,5] y) <float[5,5] w, float[5,5] v, float[5] b, float[1,5] b2> {{
        h = Gemm (x, w)
        r = Relu (h)
        f = Gemm <transB = {trans}, beta = 0.5> (r, v{bias})
        t = Add (x, f)
        y = Relu (t)
    }}"""
    model = prepared(zoo.model(text))
    check(model, list(branches(model)))


def test_a_weight_that_another_layer_reads_stays_the_others():
    model = residual("f = Conv <pads = [1,1,1,1]> (r, w)")
    quiet = silenced(model, list(branches(model)))
    weights = [node.inputs[1].const_value.numpy() for node in quiet.graph if node.op_type == "Conv"]
    assert weights[0].any() and not weights[1].any()
    check(model, list(branches(model)))


def test_a_branch_inside_another_goes_with_it():
    body = """f0 = Conv <pads = [1,1,1,1]> (r, v)
        t0 = Add (r, f0)
        f = Conv <pads = [1,1,1,1]> (t0, w2)"""
    model = residual(body, declared=", float[4,4,3,3] w2")
    inner, outer = branches(model)
    assert set(inner.nodes) < set(outer.nodes)
    for order in ([inner, outer], [outer, inner]):
        assert [node.op_type for node in check(model, order).graph] == ["Relu"]


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"y": "float[N,4,6,6] y, float[N,4,6,6] f"}, "f is a graph output"),
        ({"y": "float[N,4,6,6] y, float[N,4,6,6] z", "more": "z = Exp (f)"}, "f is read by .* as well"),
        ({"f": "f = GlobalAveragePool (r)"}, "made by .* no layer with a stored weight"),
        ({"f": "f = MatMul (r, r)"}, "has no stored weight"),
        (
            {"f": "c = Conv <pads = [1,1,1,1]> (r, v)\n d = Conv (r, u)\n f = Mul (c, d)"},
            "made by 2 layers: .*Conv.*, .*Conv",
        ),
        ({"add": "p = GlobalAveragePool (x)\n t = Add (p, f)"}, "may spread out p of shape"),
        ({"f": "p = GlobalAveragePool (r)\n z = Flatten (p)\n k = ReduceMean <axes = [0], keepdims = 0> (z)\n"
               "f = Conv <pads = [1,1,1,1]> (r, v, k)"}, "the bias of .* is computed"),
    ],
)  # fmt: skip
def test_refusals_have_a_node_and_a_reason(options, why):
    model = residual(**{"f": "", "declared": ", float[4,4,1,1] u", **options})
    found = branches(model)
    assert len(found) == 0
    assert any(re.search(why, refusal.why) for refusal in found.refusals), found.refusals
    assert {(refusal.rule, refusal.node) for refusal in found.refusals} == {("branches", "node_Add")}


def test_the_only_way_of_an_input_stays():
    text = """g (float[N,4,6,6] x, float[N,4,6,6] z) => (float[N,4,6,6] y) <float[4,4,1,1] v> {
        m = Mul (x, z)
        f = Conv (m, v)
        y = Add (x, f)
    }"""
    found = branches(prepared(zoo.model(text)))
    assert not len(found) and "would not depend on all graph inputs" in found.refusals[0].why
    text = text.replace("m = Mul (x, z)", "m = Identity (z)")
    found = branches(prepared(zoo.model(text)))
    assert not len(found) and "nothing in common" in found.refusals[1].why


def test_of_a_sum_one_operand_stays():
    _, found = animal("resnet-b")
    names = [branch.name for branch in found]
    assert [b.name for b in found.feasible(names)] == [names[0], names[1], names[3]]
    assert [b.name for b in found.feasible(names[::-1])] == [names[0], names[2], names[3]]
    assert found.feasible([]) == ()


# ------------------------------------------------------------------------------------------- costs, ranking, repair


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_the_cost_without_branches_is_that_of_the_model_without_them(name, kind):
    model, found = animal(name)
    groups = channel_cuts.groups(model)
    costs = Structure(groups, found).counted(model, kind)
    rng = np.random.default_rng(0)
    cut = groups.feasible({g.name: rng.permutation(g.units)[: g.units // 2].tolist() for g in groups})
    for gone in ({}, cut):
        for branch in found:
            result = removed(channel_cuts.cut(model, gone), [branch])
            nodes = [n for n in result.graph if n.op_type in layers.LINEAR and n.inputs[1].const_value is not None]
            want = sum(n.inputs[1].const_value.size if kind == "params" else layers.macs(n) for n in nodes)
            assert costs.of({**gone, branch.name: [0]}) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("name", ["resnet-a", "resnet-b", "bottleneck", "mobilenet-v2", "yolo", "convnext", "vit"])
def test_the_rest_is_repaired(name):
    model, found = animal(name)
    data, others = feeds(model), feeds(model, seed=9)
    for branch in found:
        mended = repair.repaired(model, {}, data, pruning.RIDGE, branches=[branch], threads=1)
        assert {name_of(n) for n in mended.graph} == {name_of(n) for n in removed(model, [branch]).graph}
        assert error(model, mended, data) < error(model, removed(model, [branch]), data)
        assert error(model, mended, others) < error(model, removed(model, [branch]), others)


def test_repair_with_channels_and_branches():
    model, found = animal("bottleneck")
    data, groups = feeds(model), channel_cuts.groups(model)
    gone = groups.feasible({group.name: [0] for group in groups})
    mended = repair.repaired(model, gone, data, pruning.RIDGE, branches=[found[0]], threads=1)
    onnx.checker.check_model(model_io.serialize(mended), full_check=True)
    bare = removed(channel_cuts.cut(model, gone), [found[0]])
    assert error(model, mended, data) < error(model, bare, data)
    assert {n.name: tuple(n.inputs[1].shape) for n in mended.graph if n.op_type == "Conv"} == {
        n.name: tuple(n.inputs[1].shape) for n in bare.graph if n.op_type == "Conv"
    }


def test_the_ranking_is_the_error_with_the_best_constant_where_nothing_stands_behind():
    """By hand: with the mean of f in its place the outputs' error is the variance of f over their energy."""
    text = """g (float[N,1,2,2] x) => (float[N,1,2,2] y) <float[1,1,1,1] w, float[1] b> {
        h = Relu (x)
        f = Conv (h, w, b)
        y = Add (x, f)
    }"""
    model = prepared(zoo.model(text, {"w": np.full((1, 1, 1, 1), 0.5), "b": np.array([3.0])}))
    found = branches(model)
    (data,) = feeds(model, batches=1)
    f = 3 + 0.5 * np.maximum(data["x"], 0)
    ranking = branch_ranking.rank_branches(model, list(found), [data], threads=1)[found[0].name]
    want = np.square(f - f.mean()).sum() / np.square(data["x"] + f).sum()
    assert ranking.order == (0,) and ranking.curve[0] == 0
    assert ranking.curve[1] == pytest.approx(want / (1.4 * 0.4), rel=1e-4)


def test_a_branch_that_adds_nothing_goes_first_and_one_that_others_make_up_for_is_cheap():
    """Both blocks are read by the last layer; what the second adds is what it could take from the first by itself."""
    text = """g (float[N,4,4,4] x) => (float[N,2,4,4] y)
    <float[4,4,1,1] w1, float[4,4,1,1] v1, float[4,4,1,1] w2, float[4,4,1,1] v2, float[2,4,1,1] u> {
        h1 = Conv (x, w1)
        r1 = Relu (h1)
        f1 = Conv (r1, v1)
        s1 = Add (x, f1)
        f2 = Conv (s1, w2)
        s2 = Add (s1, f2)
        h3 = Relu (s2)
        f3 = Conv (h3, v2)
        s3 = Add (s2, f3)
        y = Conv (s3, u)
    }"""
    model = prepared(zoo.model(text, {"v2": np.full((4, 4, 1, 1), 1e-6)}))
    found, data = branches(model), feeds(model)
    costs = [r.curve[1] for r in branch_ranking.rank_branches(model, list(found), data, threads=1).values()]
    assert [branch.layer for branch in found] == ["node_Conv_2", "node_Conv_3", "node_Conv_4"]
    assert costs[2] < 1e-3 < 1e-2 < costs[0]
    gone = removed(model, [found[1]])
    assert costs[1] < error(model, gone, data) / 10, "what is linear in the skip is taken over by what reads the sum"


def test_nothing_to_rank():
    model, found = animal("unet")
    assert branch_ranking.rank_branches(model, list(found), feeds(model, batches=1), threads=1) == {}
    assert branch_ranking.branch_axes(list(found)) == {}
