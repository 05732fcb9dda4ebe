"""Mutants: a function with one small mistake in it, for every place and every mistake of a list. A grader must notice each.

Derivation: whiteboard/classroom/mutate.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import ast
import itertools

from minideepseek.classroom.blank import functions

OTHER = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "+", ast.Pow: "*", ast.BitAnd: "|", ast.BitOr: "&",
         ast.Lt: ">=", ast.LtE: ">", ast.Gt: "<=", ast.GtE: "<", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not", ast.IsNot: "is", ast.In: "not in",
         ast.NotIn: "in", ast.And: "or", ast.Or: "and"}
NAMES = {"sum": "mean", "mean": "sum", "max": "min", "min": "max", "maximum": "minimum", "minimum": "maximum", "sin": "cos", "cos": "sin", "exp": "expm1",
         "repeat": "tile", "zeros_like": "ones_like", "zeros": "ones", "isfinite": "isnan", "any": "all", "all": "any"}

COMMUTE = ("min", "max", "minimum", "maximum", "multiply", "bitwise_and", "swapaxes", "vecdot")
WITHOUT_EFFECT = ("gemm", "out", "copy")      # keywords that choose how, not what


def mutants(source, name):
    """{what was changed: the whole source with that change} for one function of a file."""
    whole, function, found = source.encode(), functions(source)[name], {}
    starts = [0, *itertools.accumulate(map(len, whole.splitlines(keepends=True)))]
    names = [node for node in ast.walk(function) if isinstance(node, ast.arg) or isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    local = list(dict.fromkeys(getattr(node, "arg", None) or node.id for node in sorted(names, key=lambda node: (node.lineno, node.col_offset))))
    for statement in (node for node in ast.walk(function) if isinstance(node, ast.stmt) and node is not function):
        for node in (node for node in _inside(statement) if hasattr(node, "lineno")):
            start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            for new in edits(node, local):
                if new == "pass" or ast.dump(ast.parse(new, mode="eval").body) != ast.dump(node):
                    what = f"{name}, line {node.lineno}:{node.col_offset}: {ast.unparse(node)} -> {new}  in  {ast.unparse(statement).splitlines()[0]}"
                    found[what] = (whole[:start] + new.encode() + whole[end:]).decode()
    return found


def _inside(node):
    """A statement and the expressions of its own; what is raised is no matter."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.stmt) and not isinstance(node, ast.Raise):
            if not isinstance(node, ast.UnaryOp) or not isinstance(child, ast.Constant):
                yield from _inside(child)


def edits(node, local):
    """What to write in place of a node: another operator, one operand, another name, number or order, nothing."""
    parts = [f"({ast.unparse(part)})" for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
    if isinstance(node, ast.BinOp):
        return [f"({parts[1]} @ {parts[0]})" if isinstance(node.op, ast.MatMult) else f"({parts[0]} {OTHER[type(node.op)]} {parts[1]})", *parts]
    if isinstance(node, ast.BoolOp):
        return [f"({f' {OTHER[type(node.op)]} '.join(parts)})", *parts]
    if isinstance(node, ast.Compare):
        return [f"({parts[0]} {OTHER[type(node.ops[0])]} {parts[1]})"] if len(parts) == 2 else []
    if isinstance(node, ast.Constant) or isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
        number = ast.literal_eval(node)
        return [repr(number + 1)] if type(number) in (int, float) else []
    if isinstance(node, (ast.UnaryOp, ast.IfExp)):
        return parts[-2:]                                # the operand; what stands on either side of the condition
    if isinstance(node, ast.Attribute):
        return [f"{parts[0]}.{NAMES[node.attr]}"] if node.attr in NAMES else parts if node.attr == "T" else []
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in local[1:]:
        return [local[local.index(node.id) - 1]]
    if isinstance(node, ast.Call):
        a, k = node.args, node.keywords
        turned = [([a[1], a[0], *a[2:]], k)] if len(a) > 1 and ast.unparse(node.func).split(".")[-1] not in COMMUTE else []
        less = [(a, [other for other in k if other is not one]) for one in k if one.arg not in WITHOUT_EFFECT]
        return [ast.unparse(ast.Call(node.func, *call)) for call in turned + less]
    if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load) and len(node.elts) > 1 and not any(isinstance(e, ast.Slice) for e in node.elts):
        return [f"({', '.join(map(ast.unparse, [node.elts[1], node.elts[0], *node.elts[2:]]))})"]
    if isinstance(node, (ast.Raise, ast.AugAssign)) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) or (
            isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Subscript, ast.Attribute))):
        return ["pass"]
    return []


def demo():
    """All mutants of one small function."""
    source = 'def mean_square(x, n):\n    """Half of it."""\n    y = x * x\n    return y / (2 * n)\n'
    found, lost = mutants(source, "mean_square"), 0
    for what, text in found.items():
        values = {}
        exec(text, values)
        lost += values["mean_square"](3.0, 5) != 0.9
        print(what)
    print(f"claim     {len(found)} mutants, {lost} of which give another value than 9 / 10 for 3 and 5")
    assert len(found) == lost


if __name__ == "__main__":
    from minideepseek.classroom.mutate import demo  # the imported copy, so that every name exists once
    demo()
