"""A release: the package as the students of an assignment get it, without its solution and without whatever gives that away.

Derivation: whiteboard/classroom/release.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import ast
import re

from minideepseek.classroom.assignments import ASSIGNMENTS, assignment
from minideepseek.classroom.blank import ExerciseError, body, functions, hollow, to_write
from minideepseek.classroom.components import PACKAGE

LEFT_OUT = "left out of this release: it comes back with the solution of an assignment"
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)


class AssignmentError(ExerciseError):
    """This assignment cannot be given out; the message says what is wrong with it."""


def sources():
    """{path relative to the repository: text} of the package."""
    return {path.relative_to(PACKAGE.parent).as_posix(): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.glob("**/*.py"))}


def release(one):
    """-> (files, cut): {path: text} of package and pages, and the names of what had to go besides the solution.

    Gone are the bodies of this assignment and of the later ones, of the files they hide, the demos beside them, and every
    function or fence that repeats a line of them. Earlier assignments are there, solved.
    """
    texts, weeks = sources(), list(ASSIGNMENTS.values())
    coming = weeks[weeks.index(one):]
    hidden = {f"minideepseek/{file}" for week in coming for file in week.hides}
    solved = {(f"minideepseek/{task.file}", name) for week in weeks[:-len(coming)] for task in week.tasks for name in task.written}
    written, cut = {}, []                            # written: {file: names}
    for task in (task for week in coming for task in week.tasks):
        written.setdefault(f"minideepseek/{task.file}", []).extend(task.written)
    secrets = statements({file: texts[file] for file in written}, written)
    for file, source in texts.items():
        names = written.get(file, [])
        if names or file in hidden or holds(source, secrets):
            messages, lines = to_write(source, names), source.splitlines()
            for name, node in functions(source).items():
                if name not in names and (file, name) not in solved and not name.endswith("_examples") and (
                        file in hidden or (names and name == "demo") or holds("\n".join(lines[node.lineno - 1:node.end_lineno]), secrets)):
                    messages[name] = LEFT_OUT
                    cut.append(f"{file}: {name}")
            texts[file] = hollow(source, messages)
    for path in sorted(PACKAGE.parent.glob("whiteboard/**/*.md")):
        file, page = path.relative_to(PACKAGE.parent).as_posix(), path.read_text(encoding="utf-8")
        texts[file] = page
        if holds(page, secrets):
            page = FENCE.sub(lambda fence: f"```\n{LEFT_OUT}\n```" if holds(fence[1], secrets) else fence[0], page)
            texts[file] = "\n".join(f"({LEFT_OUT})" if holds(line, secrets) else line for line in page.split("\n"))
            cut.append(file)
    return texts, cut


def statements(texts, written):
    """The statements that would give some functions away, squeezed: those that calculate, compare, or call with several arguments.

    texts: {file: source}   written: {file: names of functions}
    """
    found = set()
    for node in (node for file, source in texts.items() for name, node in functions(source).items() if name in written[file]):
        for part in (part for statement in body(node) for part in ast.walk(statement)):
            if isinstance(part, (ast.Assign, ast.AugAssign, ast.Return, ast.Expr)) and (
                    any(isinstance(n, (ast.BinOp, ast.Compare)) for n in ast.walk(part))
                    or sum(len(n.args) + len(n.keywords) for n in ast.walk(part) if isinstance(n, ast.Call)) > 1):
                found.add(squeeze(ast.unparse(part)))
    return sorted(found)


def squeeze(text):
    """Text without comments, spaces and brackets, and with one kind of quotes: what is left of a line however it is written."""
    return re.sub(r"[\s()\\]+", "", re.sub(r"#.*", "", text)).replace("'", '"')


def holds(text, secrets):
    """The first secret that stands in a text, be it in a comment, or None."""
    squeezed = squeeze(text) + squeeze(text.replace("#", ""))
    return next((secret for secret in secrets if secret in squeezed), None)


def leaks(one, texts):
    """['file: line'] of the solution that still stand in the files {path: text} of a release."""
    whole = sources()
    written = {file: [name for task in one.tasks if file.endswith(task.file) for name in task.written] for file in one.files}
    secrets = statements({file: whole[file] for file in written}, written)
    return [f"{file}: {secret}" for file, text in texts.items() for secret in [holds(text, secrets)] if secret]


def demo():
    """What the release of the first week leaves out, and what would be found if a line of it stood elsewhere."""
    one = assignment("1-tape")
    files, cut = release(one)
    elsewhere = "minideepseek/basics/residual.py"
    spoilt = {elsewhere: files[elsewhere] + "\n    dys = [grads.pop(y, None)   # here\n           for y in (record.outputs)]\n"}
    print(f"{one.name}: {len(files)} files; besides the solutions {len(cut)} functions and pages cut, for example {', '.join(cut[:3])}")
    print(f"claim     lines of the solution that are left: {len(leaks(one, files))}; with one of them put elsewhere: {leaks(one, spoilt)}")
    assert not leaks(one, files) and len(leaks(one, spoilt)) == 1


if __name__ == "__main__":
    from minideepseek.classroom.release import demo  # the imported copy, so that every name exists once
    demo()
