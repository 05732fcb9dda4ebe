"""The rules of the house, each enforced by machine."""
import ast
import contextlib
import io
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.house import COMPONENTS, FILES, NAMES, PAGES, ROOT, bind, fits, lies, read, shape_comments

FLOORS = {
    "autograd": 0, "tokenizer": 0, "corpus": 0, "plots": 0,
    "basics": 1, "precision": 1,
    "attention": 2, "moe": 2,
    "model": 3,
    "interop": 4,
    "training": 5, "evaluation": 5,
    "rl": 6,
    "classroom": 7, "debug": 7,
}
EXTRAS = {"tokenizers", "mpi4py"}          # of setup.cfg: imported inside the function that wants them
CORE = {"numpy", "scipy", "matplotlib", "ml_dtypes", "minideepseek"}
HEADER = '''if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]
'''
FOOTER = '''if __name__ == "__main__":
    from {module} import demo  # the imported copy, so that every name exists once
    demo()
'''
ids = [str(path.relative_to("minideepseek")) for path in FILES]
page_ids = [str(path.relative_to("whiteboard")) for path in PAGES]


def imports(path):
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module


def code_lines(source):
    """Lines that hold code: not blank, not comment, not docstring."""
    tree = ast.parse(source)
    prose = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose.update(range(node.lineno, node.end_lineno + 1))
    return sum(1 for n, line in enumerate(source.splitlines(), 1)
               if line.strip() and not line.strip().startswith("#") and n not in prose)


def test_package_whiteboard_and_tests_mirror_each_other():
    files = {path.relative_to("minideepseek").with_suffix("") for path in FILES}
    pages = {path.relative_to("whiteboard").with_suffix("") for path in PAGES}
    tests = {p.relative_to(ROOT / "tests").parent / p.stem.removeprefix("test_") for p in ROOT.glob("tests/*/test_*.py")}
    assert {p.as_posix() for p in files - pages} == set(), "files without a whiteboard page"
    assert {p.as_posix() for p in pages - files if len(p.parts) > 1} == set(), "whiteboard pages without a file"
    assert {p.as_posix() for p in files ^ tests} == set(), "files without tests, or tests without a file"


def test_two_levels_and_empty_init_files():
    assert not list(ROOT.glob("minideepseek/*/*/*.py"))
    folders = {path.parts[1] for path in FILES}
    for folder in folders | {""}:
        assert (ROOT / "minideepseek" / folder / "__init__.py").read_bytes() == b""
    assert folders <= FLOORS.keys()


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_a_folder_imports_only_itself_and_lower_floors(path):
    own = path.parts[1]
    for module in imports(path):
        top, *rest = module.split(".")
        assert top in CORE | EXTRAS or top in sys.stdlib_module_names, f"{path} imports {module}, which the core install lacks"
        if top == "minideepseek" and rest:
            assert rest[0] == own or FLOORS[rest[0]] < FLOORS[own], f"{path} imports {module} from its own floor or above"


def test_matplotlib_and_extras_are_imported_inside_functions_only():
    for path in FILES:
        top_level = [n for n in ast.parse(read(path)).body if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert not any(name in ast.unparse(n) for n in top_level for name in EXTRAS | {"matplotlib"}), path
    assert all(re.search(rf"^\w+ = {name}$", read("setup.cfg"), re.M) for name in EXTRAS)


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_file_carries_the_name_of_a_standard_module(path):
    assert path.stem not in sys.stdlib_module_names
    assert path.stem not in CORE


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_every_file_starts_and_ends_in_the_same_way(path):
    source = read(path)
    docstring = ast.get_docstring(ast.parse(source), clean=False)
    assert source.startswith(f'"""{docstring}"""\n{HEADER}'), f"{path}: docstring, then the run header, exactly"
    assert source.endswith("\n\n" + FOOTER.format(module=".".join(path.with_suffix("").parts))), f"{path}: the run footer, exactly"
    assert re.search(r"^Derivation: whiteboard/\S+\.md", docstring, re.M), f"{path}: names its whiteboard page"
    assert code_lines(source) <= 250, f"{path}: {code_lines(source)} lines of code"


RUN_ALL = """
import os, runpy, sys, traceback
import matplotlib.backends.backend_agg, matplotlib.figure, ml_dtypes, numpy, scipy.sparse, scipy.special      # once; each file then runs in a fork
for path in sys.argv[2:]:
    if not (child := os.fork()):
        code, out = 1, os.open(f"{sys.argv[1]}/{path.replace('/', '-')}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.argv, sys.path[0] = [path], os.path.dirname(path)                 # as `python path` has them
        try:
            found = runpy.run_path(path, run_name="__main__")
            import minideepseek
            print("FROM", minideepseek.__file__)
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), path, flush=True)
"""


def test_every_file_runs_from_any_folder_uninstalled(tmp_path):
    """A copy of the package alone, run by path from elsewhere: nothing but its own folder can serve its imports."""
    copy = tmp_path / "elsewhere"
    shutil.copytree(ROOT / "minideepseek", copy / "minideepseek", ignore=shutil.ignore_patterns("__pycache__"))
    halves = [[str(copy / path) for path in FILES[half::2]] for half in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda paths: subprocess.run([sys.executable, "-c", RUN_ALL, str(tmp_path), *paths], cwd=tmp_path, capture_output=True, text=True), halves))
    codes = dict(line.split(" ", 1)[::-1] for run in runs for line in run.stdout.splitlines())
    for path in sum(halves, []):
        written = (tmp_path / f"{path.replace('/', '-')}.txt").read_text(errors="replace")
        assert codes.get(path) == "0", f"{path}:\n{written}"
        assert "claim" in written, f"{path}: its demo makes no claim"
        assert f"FROM {copy}" in written


@pytest.mark.parametrize("folder", sorted({path.parts[1] for path in FILES}))
def test_a_file_of_each_folder_runs_as_python_runs_it(folder, tmp_path):
    path = next(path for path in FILES if path.parts[1] == folder)
    run = subprocess.run([sys.executable, str(ROOT / path)], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "claim" in run.stdout, run.stdout + run.stderr


def test_a_file_runs_as_a_module_and_under_pdb(tmp_path):
    module = subprocess.run([sys.executable, "-m", "minideepseek.basics.rmsnorm"], cwd=ROOT, capture_output=True, text=True)
    assert module.returncode == 0 and "claim" in module.stdout
    pdb = subprocess.run([sys.executable, "-m", "pdb", str(ROOT / "minideepseek/basics/rmsnorm.py")], cwd=tmp_path,
                         input="b rmsnorm_backward\nc\nw\np dy.shape\nq\n", capture_output=True, text=True)
    assert "Breakpoint 1 at" in pdb.stdout and "rmsnorm_backward()" in pdb.stdout and "(3, 4)" in pdb.stdout, pdb.stdout


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_every_equation_tag_has_its_equation_and_the_reverse(path):
    in_code = re.findall(r"# eq\. (\d+)[ \t]*$", read(path), re.M)
    page = ROOT / "whiteboard" / path.relative_to("minideepseek").with_suffix(".md")
    on_page = re.findall(r"\\tag\{(\d+)\}", page.read_text(encoding="utf-8"))
    assert sorted(in_code, key=int) == sorted(on_page, key=int), "tags in code and equations on the page differ"
    assert len(set(in_code)) == len(in_code), "a number is used twice"


def test_every_component_tags_its_equations():
    for component in COMPONENTS:
        for function in (component.forward, component.backward):
            first = function.__code__.co_firstlineno
            body = component.path.read_text(encoding="utf-8").splitlines()[first - 1:]
            end = next((n for n, line in enumerate(body[1:], 1) if line and not line[0].isspace()), len(body))
            assert any(re.search(r"# eq\. \d+\s*$", line) for line in body[:end]), f"{function.__name__} has no equation"


@pytest.mark.parametrize("path", PAGES, ids=page_ids)
def test_the_math_of_a_page_uses_only_what_github_renders(path):
    text = read(path)
    fences = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.M | re.S)
    assert text.count("\n```") == 2 * len(fences), "a fence is not closed"
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    inline = re.findall(r"\$`([^`]*)`\$", outside)
    rest = re.sub(r"`[^`\n]*`", "", re.sub(r"\$`[^`]*`\$", "", outside))
    assert "$" not in rest, "a bare $: use ```math fences and $`...`$"
    for math in [body for language, body in fences if language == "math"] + inline:
        forbidden = re.search(r"\\(operatorname|newcommand|renewcommand|label|DeclareMathOperator|def|require)\b|\$", math)
        assert not forbidden, f"{forbidden[0]} does not render"
        assert math.count("{") == math.count("}"), math
    assert not any("\\tag" in body for body in inline)


@pytest.mark.parametrize("path", PAGES, ids=page_ids)
def test_the_links_of_a_page_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#\s]+)\)", re.sub(r"^```.*?^```$", "", read(path), flags=re.M | re.S)):
        if not link.startswith("http"):
            assert (ROOT / path).parent.joinpath(link).exists(), f"{path}: {link}"


@pytest.mark.parametrize("path", PAGES, ids=page_ids)
def test_every_python_fence_runs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```$", read(path), re.M | re.S)):
        assert "assert" in code, f"{path}, fence {number}: it checks nothing"
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, f"{path} fence {number}", "exec"), {"__name__": "fence"})


@pytest.mark.parametrize("component", COMPONENTS, ids=NAMES)
def test_every_shape_comment_is_true(component):
    comments = {f: {last for _, last in shape_comments(f)} for f in (component.forward, component.backward)}
    assert all(comments.values()), f"{component.name}: no shape comments to check"
    compared = {f: set() for f in comments}
    for args, config in component.examples(np.random.default_rng(0)).values():
        letters = bind(component, args, config)
        (output, cache), wrong, seen = lies(component.forward, lambda: component.forward(*args, **config), letters)
        assert not wrong, "\n".join(wrong)
        compared[component.forward] |= seen
        outputs = output if isinstance(output, tuple) else (output,)
        for item, y in zip(getattr(component.module, component.name).shapes.outputs, outputs, strict=True):
            text = ", ".join(("...",) * item.leading + item.dims)
            assert fits(np.shape(y), text, letters), f"{item.name} has shape {np.shape(y)}, the shape line says ({text})"
        floats = [np.ones_like(np.asarray(y)) for y in outputs if np.asarray(y).dtype.kind == "f"]
        dy = floats[0] if len(floats) == 1 else tuple(floats)
        _, wrong, seen = lies(component.backward, lambda: component.backward(dy, cache), letters)
        assert not wrong, "\n".join(wrong)
        compared[component.backward] |= seen
    assert compared == comments, "a shape comment that no example reaches"


def test_a_shape_comment_that_lies_is_found():
    def halve(x):
        y = x[:2]     # (T, D)
        return y

    letters = {"T": 4, "D": 3}
    _, wrong, seen = lies(halve, lambda: halve(np.zeros((4, 3))), letters)
    assert seen and len(wrong) == 1 and "y has shape (2, 3), the comment says (T, D)" in wrong[0]


def test_prose_is_about_half_as_much_as_code():
    """About one comment or docstring line for every two lines of code: neither bare nor buried."""
    code = prose = 0
    for path in FILES:
        lines = [line for line in read(path).splitlines() if line.strip()]
        code += code_lines(read(path))
        prose += len(lines) - code_lines(read(path)) + sum("  # " in line for line in lines)
    assert 0.25 < prose / code < 0.75, f"{prose} lines of prose for {code} of code"


def test_the_readme_tree_names_every_file():
    readme = read("README.md")
    for path in FILES:
        assert re.search(rf"^[ │├└─]*{re.escape(path.name)}\s", readme, re.M), f"README.md: the tree has no line for {path}"


def test_the_python_of_the_readme_runs():
    fences = re.findall(r"^```python\n(.*?)^```$", read("README.md"), re.M | re.S)
    assert fences
    for code in fences:
        exec(compile(code, "README.md", "exec"), {"__name__": "fence"})


def test_the_links_of_the_readme_lead_somewhere():
    for link in re.findall(r"\]\(([^)#\s]+)\)", read("README.md")):
        assert (ROOT / link).exists(), link
