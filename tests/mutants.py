"""A small mutator: every way in which one edit of a `_backward` could make it wrong."""
import ast
import copy
import inspect
import textwrap
from typing import Callable, NamedTuple

import numpy as np

from minideepseek.autograd.finite_differences import GradcheckError, finite_differences
from minideepseek.autograd.gradcheck import gradcheck

PLAIN_SCALINGS = {"scale"}


class Mutant(NamedTuple):
    component: str
    operator: str
    edit: str            # "dy * g -> dy / g  in  dx_hat = dy * g"
    backward: Callable


def mutants(component):
    """Every mutant of one component's backward that still compiles and differs from the source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(component.backward)))
    function = tree.body[0]
    original, seen = ast.unparse(function), set()
    for operator, index, replacement in _sites(function):
        mutated = copy.deepcopy(function)
        nodes = list(ast.walk(mutated))
        old = nodes[index]
        replacement = ast.fix_missing_locations(ast.copy_location(copy.deepcopy(replacement), old))
        mutated = ast.fix_missing_locations(_Replace(old, replacement).visit(mutated))
        text = ast.unparse(mutated)
        if text == original or text in seen:
            continue
        seen.add(text)
        namespace = dict(vars(component.module))
        exec(compile(ast.Module([mutated], []), f"<mutant of {function.name}>", "exec"), namespace)
        statement = next(s for s in function.body if s.lineno <= old.lineno <= s.end_lineno)
        edit = f"{ast.unparse(old)} -> {ast.unparse(replacement)}  in  {ast.unparse(statement)}"
        yield Mutant(component.name, operator, edit, namespace[function.name])


def cases(component, seed=0):
    """The component's examples, each with its finite differences: computed once, used for every mutant."""
    return [(args, config, finite_differences(component.forward, args, config, seed=seed))
            for args, config in component.examples(np.random.default_rng(seed)).values()]


def killed_by(component, mutant, checked_cases):
    """The gradcheck stage (an int) or the exception (its name) that stops a mutant; None when it survives."""
    for args, config, slopes in checked_cases:
        try:
            with np.errstate(all="ignore"):
                gradcheck(component.forward, mutant.backward, args, config, slopes=slopes)
        except GradcheckError as error:
            return error.stage
        except Exception as error:               # a mutant that crashes is dead
            return type(error).__name__
    return None


class _Replace(ast.NodeTransformer):
    def __init__(self, old, new):
        self.old, self.new = old, new

    def visit(self, node):
        return self.new if node is self.old else super().visit(node)


def _sites(function):
    """(operator, index of the node in ast.walk order, what to put there)."""
    local = [arg.arg for arg in function.args.args] + [
        node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    local = [name for name in dict.fromkeys(local) if name != "cache"]
    first_line = {name: min(n.lineno for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == name) for name in local[1:]}
    returned = next(node for node in ast.walk(function) if isinstance(node, ast.Return)).value
    gradients = returned.elts if isinstance(returned, ast.Tuple) else [returned]
    gradients = [g for g in gradients if not (isinstance(g, ast.Constant) and g.value is None)]
    dy = function.args.args[0].arg
    body = function.body[1:] if ast.get_docstring(function) else function.body

    parent = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}

    for index, node in enumerate(ast.walk(function)):
        if _only_shape_or_dtype(node, parent):
            continue
        if any(node is g for g in gradients):
            yield from (("scale", index, _expr(f"{t} * ({ast.unparse(node)})")) for t in ("2.0", "0.5"))
            yield "sign", index, _expr(f"-({ast.unparse(node)})")
            yield "nan", index, _expr(f"({ast.unparse(node)}) * np.nan")
            yield "none", index, _expr("None")
            yield "float32", index, _expr(f"({ast.unparse(node)}).astype(np.float32)")
            yield "float64", index, _expr(f"({ast.unparse(node)}).astype(np.float64)")
            yield "aliased", index, _expr(dy)
            yield "aliased", index, _expr(f"np.broadcast_to({ast.unparse(node)}, np.shape({ast.unparse(node)}))")
            yield "zero", index, _expr(f"np.zeros_like({ast.unparse(node)})")
            yield "transpose", index, _expr(f"({ast.unparse(node)}).T")
            yield "offset", index, _expr(f"{ast.unparse(node)} + 1e-3")
            yield from (("wrong gradient", index, other) for other in gradients if other is not node)
        elif node is returned and isinstance(node, ast.Tuple):
            yield "count", index, ast.Tuple(node.elts[:-1], ast.Load())
            if len(node.elts) > 1:
                yield "swap", index, ast.Tuple([node.elts[1], node.elts[0], *node.elts[2:]], ast.Load())
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in local:
            yield from (("wrong variable", index, _expr(name)) for name in local
                        if name != node.id and first_line.get(name, 0) < node.lineno)
            if node.id == dy:
                yield from (("nonlinear dy", index, _expr(form)) for form in
                            (f"np.ones_like({dy})", f"np.abs({dy})", f"({dy} * {dy})", f"np.sign({dy})"))
        if isinstance(node, ast.BinOp):
            yield from _binary(node, index)
        elif isinstance(node, ast.AugAssign):
            yield "drop term", index, ast.Pass()
            flipped = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}[type(node.op)]()
            yield "sign", index, ast.AugAssign(node.target, flipped, node.value)
            yield "overwrite", index, ast.Assign([_load_to_store(node.target)], node.value)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            yield "sign", index, node.operand
        elif isinstance(node, ast.Attribute):
            other = {"sum": "mean", "mean": "sum", "exp": "expm1", "zeros_like": "ones_like", "ones": "zeros"}.get(node.attr)
            if other:
                yield "sum/mean" if "mean" in (other, node.attr) else "wrong function", index, ast.Attribute(node.value, other, ast.Load())
            if node.attr == "T":
                yield "transpose", index, node.value
        elif isinstance(node, ast.Call):
            if len(node.args) == 1 and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "np":
                yield "drop call", index, node.args[0]
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("sum", "mean", "copy"):
                inner = node.args[0] if ast.unparse(node.func.value) == "np" else node.func.value
                yield "drop call", index, inner
        elif isinstance(node, ast.keyword) and node.arg in ("axis", "keepdims"):
            new = {"axis": 0 if ast.unparse(node.value) != "0" else -1, "keepdims": False}[node.arg]
            yield "axis", index, ast.keyword(node.arg, ast.Constant(new))
        elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
            yield "constant", index, ast.Constant(node.value + 1)
            yield "constant", index, ast.Constant(0 if node.value else 2)
        if any(node is statement for statement in body) and isinstance(node, ast.Assign) and _computes(node):
            yield "in place", index, ast.If(ast.Constant(True), [ast.parse(f"{dy} *= 1.0").body[0], node], [])


def _only_shape_or_dtype(node, parent):
    """An operand of which only shape or dtype is read, or the -1 of a reshape: an edit here changes no number."""
    above = parent.get(node)
    if isinstance(above, ast.Attribute) and above.attr in ("shape", "dtype", "size"):
        return True
    if "np.empty_like" in (ast.unparse(getattr(n, "func", n)) for n in (above, node) if isinstance(n, ast.Call)):
        return True
    return isinstance(above, ast.UnaryOp) and ast.unparse(getattr(parent[above], "func", above)).endswith(".reshape")


def _computes(node):
    """Not the line that unpacks the cache."""
    return ast.unparse(node.value) != "cache"


def _binary(node, index):
    left, right = node.left, node.right
    if isinstance(node.op, (ast.Add, ast.Sub)):
        yield "sign", index, ast.BinOp(left, ast.Sub() if isinstance(node.op, ast.Add) else ast.Add(), right)
        yield "drop term", index, left
        yield "drop term", index, right if isinstance(node.op, ast.Add) else ast.UnaryOp(ast.USub(), right)
    elif isinstance(node.op, (ast.Mult, ast.Div)):
        yield "drop factor", index, left
        yield "mul/div", index, ast.BinOp(left, ast.Div() if isinstance(node.op, ast.Mult) else ast.Mult(), right)
        if isinstance(node.op, ast.Mult):
            yield "drop factor", index, right
            yield "square factor", index, ast.BinOp(node, ast.Mult(), right)
    elif isinstance(node.op, ast.MatMult):
        yield "transpose", index, ast.BinOp(ast.Attribute(left, "T", ast.Load()), node.op, right)
        yield "transpose", index, ast.BinOp(left, node.op, ast.Attribute(right, "T", ast.Load()))
        yield "swap operands", index, ast.BinOp(right, node.op, left)


def _expr(text):
    return ast.parse(text, mode="eval").body


def _load_to_store(target):
    target = copy.deepcopy(target)
    target.ctx = ast.Store()
    return target
