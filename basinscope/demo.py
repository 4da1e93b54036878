"""The main job on real text in a few minutes: train a small model, sample its basin, read it.

The text is the running Python's own standard library, so that nothing is downloaded: its source
("code") and the docstrings in it ("prose"). The model reads bytes.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import os
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets
    import tokenizers
    import torch
    import xarray as xr
    from rich.console import Console

    Corpus = dict[str, datasets.Dataset]

SEED = 0
VOCAB = 256
NUM_CHAINS = 4
OBSERVED_BATCHES = 1  # per held-out set and draw
BETWEEN_TEXTS = b"\0"
HELD_OUT_EVERY = 10  # one text in ten is kept from training
MIN_PROSE = 200  # characters; shorter docstrings are labels, not prose
NOT_READ = {  # tests and installed packages; the last two are generated tables
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"),
    *("encodings", "pydoc_data"),
}


@dataclass(frozen=True)
class Scale:
    """How large the demo is: the model, its training, the sampling."""

    row_length: int
    hidden_size: int
    num_layers: int
    train_steps: int
    train_batch_size: int
    train_lr: float
    lr: float
    n_beta: float
    localization: float
    num_draws: int
    num_burnin_steps: int
    batch_size: int


FULL = Scale(
    row_length=65,
    hidden_size=128,
    num_layers=3,
    train_steps=1100,
    train_batch_size=16,
    train_lr=3e-3,
    lr=3e-4,
    n_beta=300.0,
    localization=1000.0,
    num_draws=100,
    num_burnin_steps=50,
    batch_size=32,
)
QUICK = Scale(
    row_length=65,
    hidden_size=64,
    num_layers=2,
    train_steps=600,
    train_batch_size=16,
    train_lr=5e-3,
    lr=3e-4,
    n_beta=300.0,
    localization=1000.0,
    num_draws=50,
    num_burnin_steps=30,
    batch_size=16,
)


def run_demo(out: Path, quick: bool) -> None:
    """Train a byte-level model, sample its loss basin, print and draw what was found.

    Parameters
    ----------
    out
        Folder for the results, made when missing: ``model/`` (used again by the next run),
        ``samples.zarr``, ``figures/``.
    quick
        A smaller model and shorter chains: under 45 seconds rather than under three minutes.

    Raises
    ------
    ValueError
        If `out` holds a demo that was made with other settings.
    """
    from rich.console import Console

    from basinscope.report.figures import save_figures

    # before torch loads: waiting threads sleep, so that other work on the machine costs little
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console, started = Console(), time.perf_counter()
    scale, out = QUICK if quick else FULL, Path(out)
    console.print("\n[bold]Basinscope demo[/]: how sharp is the basin that training found?")

    _stage(console, "1  Text")
    train, held_out = corpus(standard_library_texts(), scale.row_length)
    _describe_corpus(console, train, held_out, scale)

    _stage(console, "2  Model")
    _claim(out, scale, train)
    model = _trained_or_loaded(console, out / "model", train, held_out, scale)

    _stage(console, "3  Samples near the trained weights")
    tree = _sample(console, model, train, held_out, scale, out / "samples.zarr")

    _stage(console, "4  What they say")
    _report(console, tree, scale)

    _stage(console, "5  Figures")
    for path in save_figures(tree, out / "figures", burn_in=scale.num_burnin_steps):
        console.print(f"  [cyan]{path}[/]", soft_wrap=True)
    _point_onwards(console, out, scale, time.perf_counter() - started)


def _stage(console: Console, title: str) -> None:
    console.print()
    console.rule(f"[bold cyan]{title}", align="left", style="dim")


def _describe_corpus(console: Console, train: Corpus, held_out: Corpus, scale: Scale) -> None:
    console.print(
        f"Python {platform.python_version()}'s own standard library, as bytes in rows of "
        f"{scale.row_length}. Every tenth text is held out."
    )
    for name, what in (("code", "source without docstrings"), ("prose", "docstrings")):
        console.print(
            f"  [bold]{name:6}[/] {what:26} {len(train[name]):>7,} rows to train on, "
            f"{len(held_out[name]):>6,} held out"
        )


def _claim(out: Path, scale: Scale, train: Corpus) -> None:
    """Mark the folder with these settings, or refuse one that was made with others."""
    settings: dict[str, Any] = {
        **asdict(scale),
        "python": platform.python_version(),
        "train_rows": {name: len(dataset) for name, dataset in train.items()},
    }
    record = out / "demo.json"
    found = json.loads(record.read_text()) if record.exists() else settings
    if found != settings:
        differences = "; ".join(
            f"{name} is {found.get(name)} there, {value} here"
            for name, value in settings.items()
            if found.get(name) != value
        )
        raise ValueError(
            f"{out} holds a demo made with other settings ({differences}). "
            "Choose another folder, or remove this one."
        )
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings, indent=2) + "\n")


def _trained_or_loaded(
    console: Console, folder: Path, train: Corpus, held_out: Corpus, scale: Scale
) -> torch.nn.Module:
    if (folder / "config.json").exists():
        model = _load_model(folder)
        console.print(f"Trained by an earlier run; loaded from [cyan]{folder}[/].")
    else:
        model = build_model(scale)
        _train_with_progress(console, model, _as_array(balanced(train)), scale)
        _save_model(model, folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    losses = {name: evaluate(model, _as_array(dataset)) for name, dataset in held_out.items()}
    shown = ", ".join(f"{name} [bold]{loss:.2f}[/]" for name, loss in losses.items())
    console.print(f"Held-out loss: {shown} nats per byte (guessing: {math.log(VOCAB):.2f}).")
    return model


def _train_with_progress(
    console: Console, model: torch.nn.Module, rows: np.ndarray, scale: Scale
) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from basinscope.sampling.layers import quick_linears

    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"GPT-NeoX over bytes, {scale.num_layers} layers of width {scale.hidden_size}, "
        f"{size:,} parameters: {scale.train_steps:,} steps of AdamW."
    )
    columns = TextColumn("  loss {task.fields[loss]:.2f}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress, quick_linears(model):
        task = progress.add_task("", total=scale.train_steps, loss=math.log(VOCAB))
        losses = train_model(
            model, rows, scale, lambda loss: progress.update(task, advance=1, loss=loss)
        )
    console.print(
        f"Training loss: {losses[0]:.2f} at the start, "
        f"[bold]{np.mean(losses[-20:]):.2f}[/] nats per byte at the end."
    )


def _save_model(model: Any, folder: Path) -> None:
    with _quiet_transformers():
        model.save_pretrained(folder)


def _load_model(folder: Path) -> torch.nn.Module:
    from transformers import GPTNeoXForCausalLM

    with _quiet_transformers():
        return GPTNeoXForCausalLM.from_pretrained(folder).eval()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bars, which flash by for a model this small."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    yield
    if was_on:
        logging.enable_progress_bar()


def _sample(
    console: Console,
    model: torch.nn.Module,
    train: Corpus,
    held_out: Corpus,
    scale: Scale,
    store: Path,
) -> xr.DataTree:
    import basinscope

    console.print(
        f"SGLD, {NUM_CHAINS} chains: {scale.num_burnin_steps} steps of burn-in, then "
        f"{scale.num_draws} draws, each with the loss of every held-out byte observed.\n"
        f"[dim]lr={scale.lr:g}  n_beta={scale.n_beta:g}  localization={scale.localization:g}  "
        f"batch_size={scale.batch_size}[/]"
    )
    started = time.perf_counter()
    tree = basinscope.sample(
        model,
        balanced(train),
        dict(held_out),
        lr=scale.lr,
        n_beta=scale.n_beta,
        localization=scale.localization,
        num_chains=NUM_CHAINS,
        num_draws=scale.num_draws,
        num_burnin_steps=scale.num_burnin_steps,
        batch_size=scale.batch_size,
        num_init_loss_batches=scale.num_burnin_steps + scale.num_draws,  # the chains' own batches
        batches_per_draw=OBSERVED_BATCHES,
        save_metrics=True,
        output_path=store,
    )
    console.print(f"Stored in [cyan]{store}[/] ({time.perf_counter() - started:.0f} s).")
    return tree


def _report(console: Console, tree: xr.DataTree, scale: Scale) -> None:
    import basinscope
    from basinscope.report.figures import observables_of
    from basinscope.report.tables import llc_notes, llc_table

    burn_in = scale.num_burnin_steps
    llc = basinscope.compute_llc(tree, burn_in=burn_in, observables=[]).compute()
    console.print(llc_table(llc))
    console.print(
        "\nIt is n_beta times the mean rise of the loss where the chains walk: the sharper the "
        "basin, the higher. The burn-in, in which they get there, is left out.\n"
    )
    for note in llc_notes(llc):
        console.print(note)
    console.print()
    for name in observables_of(tree):
        before, after = (float(tree[f"{losses}_{name}"].mean()) for losses in ("init_loss", "loss"))
        console.print(
            f"  held-out [bold]{name:6}[/] {before:.2f} nats per byte at the checkpoint, "
            f"{after:.2f} around it ([bold]{after - before:+.2f}[/])"
        )


def _point_onwards(console: Console, out: Path, scale: Scale, seconds: float) -> None:
    store = out / "samples.zarr"
    console.print(f"\nAll in [cyan]{out}[/], after {seconds:.0f} s. Next, you could try")
    for command in (
        f"basinscope info {store}",
        f"basinscope llc {store} --burn-in {scale.num_burnin_steps}",
        f"basinscope bif {store} --top-k 50 --query {OBSERVED_BATCHES * scale.batch_size + 4}:30 "
        f"--tokenizer {out / 'model'} --page {out / 'influence.html'}",
        f"python -c \"import basinscope; print(basinscope.open_store('{store}'))\"",
    ):
        console.print(f"  {command}", style="bold", markup=False, soft_wrap=True)


def standard_library_texts() -> dict[str, list[str]]:
    """Return the running Python's standard library as text.

    Returns
    -------
    dict
        ``"code"``: each module's source without its docstrings; ``"prose"``: each docstring of
        200 characters or more, once, without its indentation. In the order of the file paths;
        tests, installed packages and generated tables are left out.
    """
    code, prose = [], []
    for path in _source_files(Path(sysconfig.get_path("stdlib"))):
        source = path.read_text(encoding="utf-8", errors="replace")
        try:
            docstrings = list(_docstrings(ast.parse(source)))
        except (SyntaxError, ValueError):
            continue  # templates and samples of broken code
        code.append(_without_lines(source, docstrings))
        prose += [inspect.cleandoc(str(node.value)) for node in docstrings]
    return {
        "code": [text for text in code if text.strip()],
        "prose": [text for text in dict.fromkeys(prose) if len(text) >= MIN_PROSE],
    }


def _source_files(root: Path) -> list[Path]:
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (path for path in paths if not NOT_READ.intersection(path.parts))
    return [root / path for path in sorted(kept, key=lambda path: path.as_posix())]


def _docstrings(module: ast.Module) -> Iterator[ast.Constant]:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(module):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            assert isinstance(first, ast.Expr)
            assert isinstance(first.value, ast.Constant)
            yield first.value


def _without_lines(source: str, nodes: list[ast.Constant]) -> str:
    dropped = {line for node in nodes for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    lines = source.split("\n")
    return "\n".join(line for number, line in enumerate(lines, 1) if number not in dropped)


def corpus(texts: dict[str, list[str]], row_length: int) -> tuple[Corpus, Corpus]:
    """Cut texts into rows of bytes, for training and held out.

    Parameters
    ----------
    texts
        Texts by name, as `standard_library_texts` returns them.
    row_length
        Bytes per row.

    Returns
    -------
    train, held_out
        By name, a data set with one column ``input_ids (row, row_length)``, uint8. Every tenth text
        is held out; no text is in both.
    """
    train, held_out = {}, {}
    for name, parts in texts.items():
        kept = [text for number, text in enumerate(parts) if number % HELD_OUT_EVERY]
        train[name] = _rows(kept, row_length)
        held_out[name] = _rows(parts[::HELD_OUT_EVERY], row_length)
    return train, held_out


def _rows(texts: list[str], row_length: int) -> datasets.Dataset:
    from datasets import Dataset, Features, List, Value

    stream = BETWEEN_TEXTS.join(text.encode() for text in texts)
    count = len(stream) // row_length
    if not count:
        raise ValueError(f"{len(stream)} bytes of text fill no row of {row_length}; give more text")
    rows = np.frombuffer(stream, dtype=np.uint8)[: count * row_length].reshape(count, row_length)
    features = Features({"input_ids": List(Value("uint8"), length=row_length)})
    return Dataset.from_dict({"input_ids": rows}, features=features)


def balanced(corpus: Corpus) -> datasets.Dataset:
    """Take the same number of rows of each part, evenly spaced, and join them."""
    from datasets import concatenate_datasets

    count = min(len(part) for part in corpus.values())
    return concatenate_datasets(
        [part.select(np.arange(count) * len(part) // count) for part in corpus.values()]
    )


def build_model(scale: Scale) -> torch.nn.Module:
    """Return an untrained GPT-NeoX over bytes, the same for every call with one `scale`."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=scale.hidden_size,
        intermediate_size=4 * scale.hidden_size,
        num_hidden_layers=scale.num_layers,
        num_attention_heads=4,
        max_position_embeddings=scale.row_length,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return GPTNeoXForCausalLM(config)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Make a tokenizer of which ids are bytes, for tools that show tokens as text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # byte-level tokenizers write a byte that is no printable character as one above all bytes
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(VOCAB, 2 * VOCAB))
    names = [chr(byte if byte in printable else next(others)) for byte in range(VOCAB)]
    tokenizer = Tokenizer(models.BPE({name: byte for byte, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_model(
    model: torch.nn.Module,
    rows: np.ndarray,
    scale: Scale,
    on_step: Callable[[float], None] = lambda loss: None,
) -> list[float]:
    """Train a model in place on next-byte prediction with AdamW.

    Parameters
    ----------
    model
        A causal language model over bytes.
    rows
        Bytes to learn from, ``(row, row_length)``.
    scale
        Gives the steps, the batch size and the largest learning rate.
    on_step
        Called after each step with its loss.

    Returns
    -------
    list of float
        The loss of each step in nats per byte.
    """
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=scale.train_lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=scale.train_lr, total_steps=scale.train_steps, pct_start=0.1
    )
    order = np.random.default_rng(SEED)
    losses = []
    model.train()
    for _ in range(scale.train_steps):
        batch = rows[order.integers(len(rows), size=scale.train_batch_size)]
        loss = _losses(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        on_step(losses[-1])
    model.eval()
    return losses


def evaluate(model: torch.nn.Module, rows: np.ndarray) -> float:
    """Return the mean loss on at most 512 rows ``(row, row_length)``, in nats per byte."""
    return float(byte_losses(model, rows[:: max(1, len(rows) // 512)][:512]).mean())


def byte_losses(model: torch.nn.Module, rows: np.ndarray) -> np.ndarray:
    """Return the loss of each byte after the first, ``(row, row_length - 1)``, in nats."""
    import torch

    with torch.no_grad():
        return _losses(model, rows).numpy()


def _losses(model: torch.nn.Module, rows: np.ndarray) -> torch.Tensor:
    import torch

    ids = torch.from_numpy(rows.astype(np.int64))
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")


def _as_array(dataset: datasets.Dataset) -> np.ndarray:
    return np.asarray(dataset.with_format("numpy")[:]["input_ids"], dtype=np.uint8)
