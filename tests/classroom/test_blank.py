import ast
import re

import pytest

from minideepseek.__main__ import main
from minideepseek.classroom.blank import ExerciseError, blank, blank_source, find, functions, hollow, read, to_write
from tests.house import COMPONENTS, NAMES


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("component", COMPONENTS, ids=NAMES)
def test_no_line_of_the_solution_is_left(component):
    source, _ = read(component.path)
    function = next(n for n in ast.parse(source).body if getattr(n, "name", "") == component.backward.__name__)
    text = blank_source(source, [function.name])
    left = next(n for n in ast.parse(text).body if getattr(n, "name", "") == function.name)
    assert ast.get_docstring(left) == ast.get_docstring(function)
    assert len(left.body) == 2 and "NotImplementedError" in ast.unparse(left.body[1])
    lines = source.splitlines()[function.lineno - 1:function.end_lineno]
    tagged = [line.split("  #")[0].strip() for line in lines if "# eq." in line]
    assert tagged and not [line for line in tagged if line in text]


CLASS = '''"""A file.

Derivation: whiteboard/a/b.md
"""


class Cache:
    """It remembers."""

    def append(self, x):
        """Keep x."""
        self.x = x       # eq. 3
        return (x
                + 1)     # eq. 4

    @property
    def size(self):
        return 1


def words():
    """Only words."""
'''


def test_a_method_is_emptied_and_the_rest_stays():
    assert list(functions(CLASS)) == ["Cache.append", "Cache.size", "words"]
    messages = to_write(CLASS, ["Cache.append"])
    assert messages == {"Cache.append": "write Cache.append: whiteboard/a/b.md, eq. 3, 4"}
    text = hollow(CLASS, messages)
    before, after = CLASS.split("        self.x = x")[0], CLASS.split("# eq. 4\n")[1]
    assert text == f'{before}        raise NotImplementedError("write Cache.append: whiteboard/a/b.md, eq. 3, 4")\n{after}'
    assert hollow(CLASS, {}) == CLASS


def test_it_names_page_and_equations_and_keeps_the_forward():
    out, functions = blank("rmsnorm")
    text = out.read_text()
    assert (out.name, functions) == ("rmsnorm_exercise.py", ["rmsnorm_backward"])
    assert 'NotImplementedError("write rmsnorm_backward: whiteboard/basics/rmsnorm.md, eq. 4, 5, 6")' in text
    assert "# eq. 1" in text and "# eq. 4" not in text
    assert "__package__" not in text and text.count('__name__ == "__main__"') == 1


def test_one_function_or_every_backward():
    assert blank("softmax")[1] == ["softmax_backward", "log_softmax_backward"]
    out, functions = blank("softmax", "log_softmax_forward", "mine.py")
    assert functions == ["log_softmax_forward"] and len(re.findall("NotImplementedError", out.read_text())) == 1


def test_work_is_never_overwritten():
    out, _ = blank("rmsnorm")
    out.write_text("my work")
    with pytest.raises(ExerciseError, match="exists already"):
        blank("rmsnorm")
    assert out.read_text() == "my work"


def test_a_component_is_found_by_name_place_or_path():
    assert find("rmsnorm") == find("basics/rmsnorm") == find("basics/rmsnorm.py") == find(str(find("rmsnorm")))


@pytest.mark.parametrize("file, message", [
    ("nothing_here", "no such file or component"),
    ("params", "no component: it defines no function"),
    ("broken.py", "not a Python file"),
    ("binary.py", "not a Python file"),
])
def test_a_file_that_is_no_component(tmp_path, capsys, file, message):
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    for command in ("blank", "check"):
        assert main([command, file]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*exercise*"))


def test_an_unknown_function(capsys):
    assert main(["blank", "rmsnorm", "layernorm_backward"]) == 2
    assert "it has rmsnorm_forward, rmsnorm_backward" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to(capsys):
    assert main(["blank", "rmsnorm", "--out", "no/such/folder.py"]) == 2
    assert "error:" in capsys.readouterr().err
