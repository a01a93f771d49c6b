"""Reading a script: what is wrong is named with its line, what is right is left alone."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from drivetrain.errors import BadInput
from drivetrain.training.static_check import Finding, findings

EXAMPLES = Path(__file__).parents[2] / "examples"
GOOD = sorted(path for path in EXAMPLES.glob("*.py") if "TrainingJob(" in path.read_text())
BROKEN = {
    "hard_coded_cuda": "hard-coded-device",
    "log_truncated": "truncates",
    "output_without_owner": "unguarded-output",
    "set_order": "set-order",
    "unseeded_split": "unseeded",
}
LOOP = """
run = drivetrain.TrainingJob(model, optimizer, loader)
for step in run:
    with step as (x, y):
        loss = train(x, y)
"""


@pytest.fixture
def found(tmp_path: Path):
    """Findings of a text, by line of the text and code."""

    def read(text: str) -> list[tuple[int, str]]:
        script = tmp_path / "script.py"
        script.write_text(text)
        return [(finding.line, finding.code) for finding in findings(script)]

    return read


def codes(text: str, found) -> list[str]:
    return [code for _, code in found(text)]


def before(line: str) -> str:
    return f"import drivetrain\n{line}\n{LOOP}"


def inside(lines: str) -> str:
    return f"import drivetrain\n{LOOP}{textwrap.indent(textwrap.dedent(lines), '    ')}\n"


def test_six_good_examples_and_one_more_are_there():
    assert len(GOOD) == 7


@pytest.mark.parametrize("script", GOOD, ids=lambda path: path.stem)
def test_a_good_example_has_no_finding(script: Path):
    assert findings(script) == []


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_example_has_exactly_its_marked_line(name: str):
    script = EXAMPLES / "broken" / f"{name}.py"
    lines = script.read_text().splitlines()
    marked = [number for number, line in enumerate(lines, 1) if "# broken:" in line]
    got = findings(script)
    assert [(f.line, f.code) for f in got] == [(marked[0], BROKEN[name])]
    assert all(f.message and f.remedy for f in got)


def test_a_loop_carried_number_is_left_to_the_rehearsal():
    assert findings(EXAMPLES / "broken" / "best_in_a_local.py") == []


@pytest.mark.parametrize(
    "line",
    [
        "model.cuda()",
        "model.to('cuda:1')",
        "x = torch.zeros(3, device='cuda')",
        "device = 'cuda' if torch.cuda.is_available() else 'cpu'",
        "d = torch.device('xpu')",
        "torch.cuda.set_device(0)",
        "state = torch.load('m.pt', map_location='cuda:0')",
        "def build(device='cuda'): return device",
        "parser.add_argument('--device', default='cuda')",
        "d = torch.device(f'cuda:{rank}')",
    ],
)
def test_a_hard_coded_device_is_named(line: str, found):
    assert found(before("import torch\n" + line)) == [(3, "hard-coded-device")]


@pytest.mark.parametrize(
    "line",
    [
        "device = drivetrain.device_for_this_job()",
        "half = torch.float16 if device.type == 'cuda' else torch.bfloat16",
        "model.to(device)",
        "x = torch.zeros(3, device='cpu')",
        "torch.cuda.synchronize()",
        "ok = torch.cuda.is_available()",
    ],
)
def test_asking_for_the_device_is_fine(line: str, found):
    assert codes(before("import torch\n" + line), found) == []


@pytest.mark.parametrize(
    "lines",
    [
        "classes = list(set(names))",
        "for name in {'a', 'b'}: use(name)",
        "known = set(names)\nindex = {name: i for i, name in enumerate(known)}",
        "first = set(names).pop()",
        "a, b = {'x', 'y'}",
        "text = ','.join(set(names))",
        "rows = [row for row in set(names) | set(others)]",
        "seen = set()\nseen.add(name)\nrest = list(seen)",
        "both = [*set(names)]",
        "shared = list(set(model.parameters()))",
    ],
)
def test_an_order_taken_from_a_set_is_named(lines: str, found):
    last = 1 + len(lines.splitlines())
    assert found(before(lines)) == [(last, "set-order")]


@pytest.mark.parametrize(
    "lines",
    [
        "classes = sorted(set(names))",
        "classes = sorted(list(set(names)))",
        "classes = list(set(names))\nclasses.sort()",
        "n = len(set(names))",
        "inside = 'a' in set(names)",
        "for i in {3, 1, 2}: use(i)",
        "for i in set(range(9)): use(i)",
        "ids = list({len(name) for name in names})",
        "ids = list(set(labels.tolist()))",
        "longest = max(len(name) for name in set(names))",
        "names = set(rows)\nnames = sorted(names)\nfor name in names: use(name)",
        "seen = set()\nseen.add(id(model))\nrest = list(seen)",
    ],
)
def test_a_set_whose_order_is_not_taken_or_certain_is_fine(lines: str, found):
    assert codes(before(lines), found) == []


@pytest.mark.parametrize(
    "line",
    [
        "order = np.random.default_rng().permutation(9)",
        "order = np.random.default_rng(None)",
        "r = random.Random()",
        "r = random.SystemRandom()",
        "torch.seed()",
        "g = torch.Generator(); g.seed()",
        "np.random.seed()",
        "key = secrets.token_hex(8)",
        "name = uuid.uuid4().hex",
        "salt = os.urandom(8)",
        "torch.manual_seed(int(time.time()))",
        "random.seed(os.getpid())",
        "g = torch.Generator().manual_seed(time.time_ns())",
    ],
)
def test_entropy_without_a_seed_is_named(line: str, found):
    imports = "import os, random, secrets, time, uuid; import numpy as np; import torch\n"
    assert found(before(imports + line)) == [(3, "unseeded")]


def test_entropy_in_a_data_set_that_only_the_loader_calls_is_named(found):
    text = """\
    import random
    import drivetrain
    class Noisy:
        def __getitem__(self, i):
            return random.Random().random()
    """
    assert found(textwrap.dedent(text) + LOOP) == [(5, "unseeded")]


@pytest.mark.parametrize(
    "line",
    [
        "order = np.random.default_rng(7).permutation(9)",
        "r = random.Random(3)",
        "torch.manual_seed(0)",
        "started = time.time()",
        "name = run.once(lambda: uuid.uuid4().hex)",
        "from uuid import uuid4\ndef fresh(): return uuid4().hex\nname = run.once(fresh)",
    ],
)
def test_seeds_and_once_are_fine(line: str, found):
    imports = "import os, random, time, uuid; import numpy as np; import torch\n"
    assert codes(before(imports + line), found) == []


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("log = open('train.log', 'w')", "truncates"),
        ("with open('a', mode='wb') as f: f.write(b'')", "truncates"),
        ("open('a', 'x')", "truncates"),
        ("Path('a').write_text('')", "truncates"),
        ("Path('a').open('w')", "truncates"),
        ("torch.save(model.state_dict(), 'first.pt')", "truncates"),
        ("logging.basicConfig(filename='a.log', filemode='w')", "truncates"),
        ("os.remove('old.log')", "deletes"),
        ("shutil.rmtree('runs')", "deletes"),
        ("Path('a').unlink(missing_ok=True)", "deletes"),
        ("s = socket.socket(); s.bind(('', 9000))", "binds"),
        ("s = socket.create_server(('', 9000))", "binds"),
    ],
)
def test_what_a_second_copy_would_spoil_before_the_loop_is_named(line: str, code: str, found):
    imports = "import logging, os, shutil, socket; from pathlib import Path; import torch\n"
    assert found(before(imports + line)) == [(3, code)]


@pytest.mark.parametrize(
    "line",
    [
        "log = open('train.log', 'a')",
        "data = open('data.bin', 'rb').read()",
        "open('/dev/null', 'w')",
        "Path('runs').mkdir(exist_ok=True)",
        "buffer = io.BytesIO(); torch.save(model, buffer)",
        "text = name.replace('a', 'b')",
        "bound = signature.bind(values)",
    ],
)
def test_what_two_copies_may_both_do_is_fine(line: str, found):
    assert codes(before("import io, torch; from pathlib import Path\n" + line), found) == []


@pytest.mark.parametrize(
    "lines",
    [
        "open('rows.csv', 'a').write('x')",
        "torch.save(model, 'latest.pt')",
        "Path('done').write_text('x')",
        "save(model)",
        "if step.ends_epoch: os.remove('old.pt')",
        "plt.savefig('loss.png')",
        "if not step.dry: torch.save(model, 'latest.pt')",
        "if run.owner or step.ends_epoch: torch.save(model, 'latest.pt')",
        "if run.owner: pass\nelse: torch.save(model, 'latest.pt')",
    ],
)
def test_output_in_the_loop_without_a_guard_is_named(lines: str, found):
    helper = "import torch, os\ndef save(m):\n    torch.save(m, 'latest.pt')\n"
    assert codes(helper + inside(lines), found) == ["unguarded-output"]


def test_a_write_to_a_log_that_was_opened_before_the_loop_is_named(found):
    text = "log = open('a.log', 'a')\n" + inside("print(loss, file=log)\nlog.write('x')")
    assert codes(text, found) == ["unguarded-output"] * 2


@pytest.mark.parametrize(
    "lines",
    [
        "if run.owner: torch.save(model, 'latest.pt')",
        "if step.ends_epoch and run.owner: save(model)",
        "run.owner and save(model)",
        "not run.owner or save(model)",
        "if not run.owner: continue\nsave(model)",
        "if not run.owner or step.dry:\n    continue\nsave(model)",
        "save(model) if run.owner else None",
        "if not run.owner: pass\nelse: save(model)",
        "run.once(save, model)",
        "run.once(lambda: torch.save(model, 'first.pt'))",
        "step.log(loss=loss)",
        "print(loss)",
        "print(loss, file=sys.stderr)",
        "if mine: save(model)",
    ],
)
def test_guarded_output_in_the_loop_is_fine(lines: str, found):
    helper = "import torch, sys\ndef save(m):\n    torch.save(m, 'latest.pt')\n"
    script = helper + inside(lines).replace("\nfor step", "\nmine = run.owner\nfor step")
    assert codes(script, found) == []


def test_output_after_the_loop_is_fine_because_only_the_owner_gets_there(found):
    text = f"import torch, drivetrain\n{LOOP}\ntorch.save(model, 'final.pt')\n"
    assert codes(text, found) == []


def test_the_walk_goes_into_main_and_methods(found):
    text = """\
    import torch, drivetrain
    class Trainer:
        def __init__(self):
            open('log', 'w')
            self.run = drivetrain.TrainingJob(model, optimizer, loader)
        def go(self):
            for step in self.run:
                with step as x:
                    self.save()
            torch.save(model, 'final.pt')
        def save(self):
            torch.save(model, 'latest.pt')
    def main():
        trainer = Trainer()
        trainer.go()
    if __name__ == '__main__':
        main()
    """
    got = found(textwrap.dedent(text))
    assert got == [(4, "truncates"), (12, "unguarded-output")]


@pytest.mark.parametrize(
    "loop",
    [
        "from tqdm import tqdm\nrun = drivetrain.TrainingJob(m, o, l)\nfor s in tqdm(run):",
        "from drivetrain import TrainingJob as Job\nfor s in Job(m, o, l):",
        "run = make_job()\nfor s in run:",
    ],
)
def test_the_loop_is_found_under_other_names(loop: str, found):
    text = f"import drivetrain\n{loop}\n    with s as x:\n        open('a', 'a')\n"
    assert codes(text, found) == ["unguarded-output"]


def test_a_script_without_a_loop_is_named(found):
    assert found("import torch\nprint(torch.ones(3))\n") == [(1, "no-loop")]


@pytest.mark.parametrize("text", ["for step in\n", "x = '\0'\n"])
def test_what_is_not_python_is_bad_input_with_its_line(text: str, tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(text)
    with pytest.raises(BadInput, match=r"script\.py, line 1: not valid Python"):
        findings(script)


def test_a_missing_script_is_bad_input(tmp_path: Path):
    with pytest.raises(BadInput, match=r"none\.py: No such file"):
        findings(tmp_path / "none.py")


def test_findings_come_by_line_once_a_code_and_recursion_ends(found):
    text = before("def a(): b()\ndef b(): a(); open('x', 'w'); open('y', 'w')\na()")
    assert found(text) == [(3, "truncates")]
    assert Finding(1, "a", "", "") < Finding(2, "a", "", "")
