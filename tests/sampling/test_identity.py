"""What a loss, a model and a restriction are known by: code, numbers, and which elements move."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basinscope.sampling.identity import describe_function, describe_masks, describe_model

# the text of losses.py and of helpers.py beside it; VALUE is 1.0 in one, 2.0 in the other
KNOWN_BY: dict[str, tuple[str, str]] = {
    "a global": ("scale = VALUE\ndef loss_fn(m, i): return scale * m(i)", ""),
    "the default of a keyword": ("def loss_fn(m, i, *, scale=VALUE): return scale * m(i)", ""),
    "in a comprehension": (
        "scale = VALUE\ndef loss_fn(m, i): return [scale * x for x in m(i)]",
        "",
    ),
    "in a generator": ("scale = VALUE\ndef loss_fn(m, i): return sum(scale * x for x in m(i))", ""),
    "in a lambda": ("scale = VALUE\ndef loss_fn(m, i): return map(lambda x: scale * x, m(i))", ""),
    "in a function inside": (
        "def half(x): return x / VALUE\n"
        "def loss_fn(m, i):\n"
        "    def inner(x):\n"
        "        return [half(y) for y in x]\n"
        "    return inner(m(i))",
        "",
    ),
    "a tensor": (
        "import torch\nscale = torch.tensor(VALUE)\ndef loss_fn(m, i): return scale * m(i)",
        "",
    ),
    "an array": (
        "import numpy\nscale = numpy.full(3, VALUE)\ndef loss_fn(m, i): return scale * m(i)",
        "",
    ),
    "a numpy number": (
        "import numpy\nscale = numpy.float32(VALUE)\ndef loss_fn(m, i): return scale * m(i)",
        "",
    ),
    "a type of numbers": (
        "import torch\n"
        "kind = torch.float32 if VALUE == 1.0 else torch.float64\n"
        "def loss_fn(m, i): return m(i).to(kind)",
        "",
    ),
    "a tuple": ("scales = (VALUE, 3)\ndef loss_fn(m, i): return scales[0] * m(i)", ""),
    "a model": (
        "from torch import nn\n"
        "reference = nn.Linear(2, 2)\n"
        "nn.init.constant_(reference.weight, VALUE)\n"
        "nn.init.zeros_(reference.bias)\n"
        "def loss_fn(m, i): return reference(m(i))",
        "",
    ),
    "a partial": (
        "from functools import partial\n"
        "def scaled(x, by): return by * x\n"
        "scale = partial(scaled, by=VALUE)\n"
        "def loss_fn(m, i): return scale(m(i))",
        "",
    ),
    "a function of another file": (
        "from helpers import scaled\ndef loss_fn(m, i): return scaled(m(i))",
        "def scaled(x): return VALUE * x",
    ),
    "a global of another file": (
        "from helpers import scaled\ndef loss_fn(m, i): return scaled(m(i))",
        "scale = VALUE\ndef scaled(x): return scale * x",
    ),
    "a function through its module": (
        "import helpers as h\ndef loss_fn(m, i): return h.scaled(m(i))",
        "def scaled(x): return further(x)\ndef further(x): return VALUE * x",
    ),
    "a number through its module": (
        "import helpers\ndef loss_fn(m, i): return helpers.scale * m(i)",
        "scale = VALUE",
    ),
    "a decorated function of another file": (
        "from helpers import scaled\ndef loss_fn(m, i): return scaled(m(i))",
        "import torch\n@torch.no_grad()\ndef scaled(x): return VALUE * x",
    ),
    "functions that call each other": (
        "import helpers\n"
        "def loss_fn(m, i): return helpers.even(m(i), 4)\n"
        "def step(n): return n - 1",
        "import losses\n"
        "def even(x, n): return odd(x, losses.step(n)) if n else VALUE * x\n"
        "def odd(x, n): return even(x, losses.step(n)) if n else x",
    ),
    "the second of two helpers": (
        "def one(x): return x\ndef two(x): return VALUE * x\n"
        "def loss_fn(m, i): return one(m(i)) + two(m(i))",
        "",
    ),
    "which of two helpers": (
        "def one(x): return x\ndef two(x): return -x\nfirst, second = one, two\n"
        "third = one if VALUE == 1.0 else two\n"
        "def loss_fn(m, i): return first(m(i)) + second(m(i)) + third(m(i))",
        "",
    ),
    "a constant set": ("def loss_fn(m, i): return m(i) if i in {VALUE, 3} else 0", ""),
    "a function of a library by another name": (
        "import torch.nn.functional as F\n"
        "loss = F.mse_loss if VALUE == 1.0 else F.l1_loss\n"
        "def loss_fn(m, i): return loss(m(i), i)",
        "",
    ),
}


@pytest.mark.parametrize("kind", KNOWN_BY)
def test_what_a_loss_reads_makes_it_another(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, same, other = (
        described(KNOWN_BY[kind], value, tmp_path / folder, monkeypatch)
        for folder, value in [("a", "1.0"), ("b", "1.0"), ("c", "2.0")]
    )
    assert one == same
    assert one != other


# what may differ without making the loss another
NOT_KNOWN_BY: dict[str, tuple[str, str]] = {
    "a list": ("notes = [VALUE]\ndef loss_fn(m, i): notes.append(1); return m(i)", ""),
    "a dict": ("notes = {'n': VALUE}\ndef loss_fn(m, i): notes['n'] += 1; return m(i)", ""),
    "an attribute": (
        "class Notes: n = VALUE\nnotes = Notes()\ndef loss_fn(m, i): notes.n += 1; return m(i)",
        "",
    ),
    "a global that it counts in": (
        "calls = VALUE\ndef loss_fn(m, i):\n    global calls\n    calls += 1\n    return m(i)",
        "",
    ),
    "a model that it loads once": (
        "from torch import nn\n"
        "loaded = None if VALUE == 1.0 else nn.Linear(2, 2)\n"
        "def reference():\n"
        "    global loaded\n"
        "    loaded = loaded or nn.Linear(2, 2)\n"
        "    return loaded\n"
        "def loss_fn(m, i): return reference()(m(i))",
        "",
    ),
    "an attribute named as a global": (
        "logits = VALUE\ndef loss_fn(m, i): return m(i).logits",
        "",
    ),
}


@pytest.mark.parametrize("kind", NOT_KNOWN_BY)
def test_where_a_loss_may_keep_notes_is_not_looked_at(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (
        described(NOT_KNOWN_BY[kind], value, tmp_path / value, monkeypatch)
        for value in ("1.0", "2.0")
    )
    assert one == other


def test_a_library_is_known_by_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed may change without making a loss another."""
    texts = (
        "from helpers import scaled\ndef loss_fn(m, i): return scaled(m(i))",
        "def scaled(x): return VALUE * x",
    )
    one, other = (
        described(texts, value, tmp_path / value, monkeypatch, installed="site-packages")
        for value in ("1.0", "2.0")
    )
    assert one == other


@pytest.mark.parametrize(
    "function",
    [
        torch.exp,
        Tensor.exp,
        partial(F.cross_entropy, reduction="none"),
        (lambda f: lambda m, i: f(m(i)))(torch.stack),
        nn.CrossEntropyLoss(),
    ],
)
def test_what_is_no_function_of_python_has_a_description(function: Callable[..., Any]) -> None:
    assert describe_function(function) == describe_function(function)


def test_numbers_side_by_side_are_told_apart() -> None:
    def loss_fn(m: nn.Module, i: Tensor, *scales: float) -> Tensor: ...

    assert describe_function(partial(loss_fn, 1, 23)) != describe_function(partial(loss_fn, 12, 3))


def test_a_long_chain_of_functions_needs_no_deep_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = 2000
    text = "".join(f"def f{n}(x): return f{n + 1}(x)\n" for n in range(many))
    text += f"def f{many}(x): return VALUE * x\ndef loss_fn(m, i): return f0(m(i))"
    one = described((text, ""), "1.0", tmp_path / "a", monkeypatch)
    assert one != described((text, ""), "2.0", tmp_path / "b", monkeypatch)


def test_a_loss_that_was_sent_to_another_process_is_the_same(tmp_path: Path) -> None:
    """A worker of a cluster writes the store, and the caller asks for it."""
    (tmp_path / "helpers.py").write_text("scale = 2.0\ndef scaled(x): return scale * x")
    script = tmp_path / "script.py"
    script.write_text(
        """
import sys
from pathlib import Path
import cloudpickle
import helpers
import torch
from basinscope.sampling.identity import describe_function, describe_masks, describe_model
scale = torch.tensor(3.0)
reference = torch.nn.Linear(2, 2)
@torch.no_grad()
def doubled(x): return [scale * y for y in x]
def loss_fn(m, i): return helpers.scaled(m(i)) + reference(i) + (lambda: doubled(i))()
Path(sys.argv[1]).write_bytes(cloudpickle.dumps(loss_fn))
print(describe_function(loss_fn))
"""
    )
    sent = tmp_path / "loss.pkl"
    code = f"""
import sys, cloudpickle
from pathlib import Path
sys.path.insert(0, {str(tmp_path)!r})
from basinscope.sampling.identity import describe_function, describe_masks, describe_model
print(describe_function(cloudpickle.loads(Path({str(sent)!r}).read_bytes())))
"""
    here = subprocess.run(
        [sys.executable, script, sent], check=True, capture_output=True, text=True
    ).stdout
    there = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert here == there


def described(
    texts: tuple[str, str],
    value: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    installed: str = ".",
) -> str:
    """What the loss in these files is described as, in a folder of its own."""
    loss, helpers = (text.replace("VALUE", value) for text in texts)
    (folder / installed).mkdir(parents=True)
    (folder / "losses.py").write_text(loss)
    (folder / installed / "helpers.py").write_text(helpers)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.syspath_prepend(folder / installed)
        for name in ("losses", "helpers"):
            sys.modules.pop(name, None)
        try:
            return describe_function(importlib.import_module("losses").loss_fn)
        finally:
            for name in ("losses", "helpers"):
                sys.modules.pop(name, None)


def test_a_model_is_known_by_its_weights_and_buffers() -> None:
    model = nn.BatchNorm1d(3)
    found = [describe_model(model)["sha256"]]
    for tensor in (model.weight, model.running_mean, model.num_batches_tracked):
        assert tensor is not None
        with torch.no_grad():
            tensor += 1
        found.append(describe_model(model)["sha256"])
    assert len(set(found)) == 4


def test_a_restriction_is_known_by_the_elements_that_move() -> None:
    model = nn.Linear(4, 3)
    first, last = torch.zeros(2, 3, 4, dtype=torch.bool)
    first[0], last[2] = True, True
    restrictions: list[dict[str, Tensor | None]] = [
        {"weight": first}, {"weight": last}, {"weight": None}, {"bias": None},
        {"weight": first, "bias": None},
    ]  # fmt: skip
    assert len({describe_masks(model, masks)["sha256"] for masks in restrictions}) == 5
    either: list[dict[str, Tensor | None]] = [{"weight": last, "bias": None}]
    either.append(dict(reversed(either[0].items())))
    assert describe_masks(model, either[0]) == describe_masks(model, either[1])
