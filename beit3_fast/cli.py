"""The command ``beit3-fast``.

Commands import what they need when they run, so that ``--help`` and a misspelt option answer at once. A mistake in the
input is one line on standard error and exit code 2; exit code 1 means that something ran and its result was not right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_INPUT_ERRORS = (ValueError, TypeError, OSError, ModuleNotFoundError)


class _OneLineErrors(click.Group):
    """Prints input errors as one readable line; ``--debug`` lets the traceback through."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except _INPUT_ERRORS as error:
            if ctx.params.get("debug"):
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            click.echo(f"beit3-fast: {message}", err=True)
            ctx.exit(2)


def _version(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from beit3_fast import __version__

    click.echo(f"beit3-fast {__version__}")
    ctx.exit()


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """BEiT-3 with the released checkpoints and the released outputs, as fast as the machine allows."""


@main.command()
def info() -> None:
    """Show versions, and what serves each operation on this machine."""
    import beit3_fast

    beit3_fast.info()


def _together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator; ``--help`` shows them in this order."""

    def decorate(function: Any) -> Any:
        return functools.reduce(lambda decorated, option: option(decorated), reversed(options), function)

    return decorate


_rounds = click.option("--rounds", type=int, default=None, help="Interleaved timing rounds (at least 6).")
_threads = click.option("--threads", type=int, default=None, help="CPU threads; PyTorch's choice when left out.")
_json = click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the results to this file.")
_where = _together(
    _threads, click.option("--device", default=None, help="cpu or cuda. [default: cuda when there is one]")
)
_base = click.option(
    "--base", default=None, metavar="REVISION", help="Ours against ours of this git revision, interleaved; CPU."
)
_files = _together(
    _json,
    click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Write the results as a table."),
    click.option("--html", "html_file", type=click.Path(path_type=Path), help="Write a page with plots."),
)


def _exit(right: bool) -> None:
    """Exit code 1 where something ran and was not right."""
    if not right:
        raise SystemExit(1)


@main.command()
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="An image file; repeatable.")
@click.option("--text", "texts", multiple=True, help="A text; repeatable.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="A released retrieval checkpoint. [default: none]")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="beit3.spm; required with --checkpoint.")
@click.option(
    "--model", default=None, help="Which model, without --checkpoint. [default: beit3_base_patch16_224_retrieval]"
)
@click.option("--output", type=click.Path(path_type=Path), default="demo.png", help="The picture to write.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the results as JSON.")
@_rounds
@_threads
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", help="Of weights and images.")
@click.option("--seed", type=int, default=0, help="Of the random weights, without --checkpoint.")
def demo(**options: Any) -> None:
    """Match images with texts, ours against reference PyTorch.

    Runs the drop-in model and reference PyTorch on the same weights, prints the image-text scores, the parity and both
    times, and saves a picture of it. Photos and captions that come with the package are the default.
    """
    from beit3_fast.demo import run

    _exit(run(**options))


@main.group()
def bench() -> None:
    """Measure speed, after parity."""


@bench.command("model")
@click.option("--case", "cases", multiple=True, help="Run this case only; repeatable.")
@click.option("--peers", is_flag=True, help="Also the public code, torch.compile and the inference engines.")
@click.option(
    "--provider", "providers", multiple=True, help="Compare with this provider only, e.g. openvino; repeatable."
)
@click.option("--quick", is_flag=True, help="A few cases, small batches.")
@click.option("--batch", type=int, default=None, help="Replace every case's batch size.")
@_rounds
@_where
@click.option("--compile", "compiled", is_flag=True, help="Also the reference with SDPA, under torch.compile.")
@_base
@_files
def bench_model(**options: Any) -> None:
    """Time the model against reference PyTorch: forward, captioning, a training step.

    What fails parity gets no time, and exit code 1 unless it is a peer. With --peers the public BEiT-3, torch.compile,
    OpenVINO, ONNX Runtime and zentorch take part; one that is not installed is listed with the reason.
    """
    from beit3_fast.bench import command

    _exit(command.run(command.model, **options))


@bench.command("ops")
@click.option("--case", "cases", multiple=True, help="Run this case only, e.g. ffn-ragged-float32-forward; repeatable.")
@click.option("--op", "ops", multiple=True, help="Cases of this op only, e.g. attention; repeatable.")
@click.option(
    "--provider", "providers", multiple=True, help="Compare with this peer only, e.g. sdpa-padded; repeatable."
)
@click.option("--quick", is_flag=True, help="Small shapes, nothing that compiles.")
@_rounds
@_where
@_base
@_files
def bench_ops(**options: Any) -> None:
    """Time every op, forward and backward, against reference PyTorch and peers; exit code 1 when ours fails parity.

    A peer that fails parity gets no time, and one that is not installed is listed with the reason.
    """
    from beit3_fast.bench import command

    _exit(command.run(command.ops, **options))


@bench.command("scaling")
@click.option("--curve", "curves", multiple=True, help="image, batch or text; repeatable. [default: all]")
@click.option("--provider", "providers", multiple=True, help="Also this provider, e.g. openvino; repeatable.")
@click.option("--quick", is_flag=True, help="Two small points a curve; under a minute on two CPU cores.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", help="Of weights and images.")
@_rounds
@_where
@_files
def bench_scaling(**options: Any) -> None:
    """Time a forward as the batch, the text and the image grow; it must grow as the FLOPs do.

    Parity comes first at every point. One that does not fit in memory is skipped with the figure.
    """
    from beit3_fast.bench import command

    _exit(command.run(command.scaling, **options))


@bench.command("breakdown")
@click.option("--case", "cases", multiple=True, help="This case of bench model only, e.g. base-text; repeatable.")
@click.option("--quick", is_flag=True, help="One case, batch 2.")
@_where
@_files
def bench_breakdown(**options: Any) -> None:
    """Show where the time of a forward goes: reference PyTorch, the public code and ours, by kind of op.

    What fails parity gets no times.
    """
    from beit3_fast.bench import command

    _exit(command.run(command.breakdown, **options))


@bench.command("all")
@click.option("--quick", is_flag=True, help="A few small cases; under 3 minutes on two CPU cores.")
@_where
@_files
def bench_all(**options: Any) -> None:
    """Run model, ops, scaling, breakdown and memory, one after the other.

    A kind that cannot run is listed with the reason. Files are written after every case: an interrupted run keeps what
    it had.
    """
    from beit3_fast.bench import command

    _exit(command.run(command.everything, **options))


@bench.command("compare")
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--tolerance", type=float, default=3.0, help="Percent that is no difference.")
def bench_compare(**options: Any) -> None:
    """Compare two runs by their JSON files; exit code 1 when something became slower or wrong.

    Compared is how much faster ours is than the reference of the same run, since the times of two runs also differ by
    what the machine did.
    """
    from beit3_fast.bench.command import compare

    _exit(compare(**options))


@bench.command("gpu")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the files, at most 8.")
@click.option("--budget", type=float, default=430, help="Seconds for all of it.")
@click.option("--section", "sections", multiple=True, help="This section only, e.g. parity; repeatable.")
@click.option("--dry-run", "dry", is_flag=True, help="All of it on a CPU with tiny shapes, in about two minutes.")
def bench_gpu(**options: Any) -> None:
    """Ask this machine's GPU everything: tests, parity, the same bits, and times beside the best alternatives.

    What matters most comes first. Every figure is a line of results.jsonl once it is known; a section that crashes
    or hangs costs the others nothing. Exit code 1 when something failed or was wrong.
    """
    from beit3_fast.bench.gpu.command import report

    _exit(report(**options))


@bench.command("gpu-table")
@click.argument("results", required=False, type=click.Path(path_type=Path))
def bench_gpu_table(**options: Any) -> None:
    """Make README's GPU table and its plots from a result of bench gpu that was kept in bench/results.

    RESULTS is the newest one by default. Without a result there is no table.
    """
    from beit3_fast.bench.gpu.page import update

    update(**options)


@bench.command("memory")
@_files
def bench_memory(**options: Any) -> None:
    """Count what a layer allocates in a training step, ours against the public code; no GPU, nothing is computed."""
    from beit3_fast.bench import command

    command.run(command.memory, **options)


@bench.command("static")
@click.option("--arch", "architectures", multiple=True, type=int, help="80 for 8.0; repeatable. [default: all]")
@click.option("--all", "everything", is_flag=True, help="Every valid config and kind of number; takes hours.")
@_json
@click.option("--update", is_flag=True, help="Write the budget anew from what is found.")
def bench_static(**options: Any) -> None:
    """Compile every Triton kernel for every GPU architecture, without a GPU; exit code 1 when a budget is broken."""
    from beit3_fast.bench.compiled import static

    _exit(static(**options))


@bench.command("simulate")
@click.option("--batch", "batches", multiple=True, type=int, help="Samples of 197 + 13 tokens. [default: 2 and 8]")
@click.option("--arch", "architectures", multiple=True, type=int, help="80 or 90; repeatable. [default: both]")
@click.option("--chip", default=None, help="Also lower bounds on this chip: a100 or h100. [default: none]")
@_json
def bench_simulate(**options: Any) -> None:
    """Run the compiled Triton kernels in a PTX simulator and count what they do; no GPU, no times."""
    from beit3_fast.bench.compiled import simulate

    simulate(**options)


@main.command()
@click.option("--width", type=int, default=None, help="Of the model. [default: those of base and large]")
@click.option("--hidden", type=int, default=None, help="Of its feed-forward block. [default: 4 x width]")
@click.option(
    "--rows", type=int, multiple=True, help="Tokens in a batch, rounded up to three binary digits; repeatable."
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of rows and weights; repeatable. [default: bfloat16]",
)
@click.option("--op", "ops", multiple=True, help="Tune this op only, e.g. multiway_ffn_backward; repeatable.")
@click.option("--experts", type=int, default=2, help="Weights per layer: 2 in BEiT-3, vision and text.")
@click.option("--all", "exhaustive", is_flag=True, help="Time every valid config, not the promising ones; takes hours.")
@click.option("--list", "show", is_flag=True, help="Print what is stored, and tune nothing.")
@click.option("--clear", "remove", is_flag=True, help="Remove this GPU's entries, and tune nothing.")
def tune(**options: Any) -> None:
    """Find the fastest kernel configs on this GPU and keep them; takes minutes.

    Every config must pass parity before it is timed, and where PyTorch is faster, PyTorch is used. Later calls look the
    winners up; nothing is tuned while a model runs.
    """
    from beit3_fast.tuning import command

    _exit(command(**options))


@main.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
def convert(source: Path, destination: Path) -> None:
    """Convert a checkpoint between .pth and .safetensors; released keys both ways."""
    from beit3_fast.checkpoint import convert as convert_checkpoint

    found = convert_checkpoint(source, destination)
    config = found.config
    click.echo(
        f"wrote {destination}: {found.head}, {config.encoder_layers} layers of width {config.encoder_embed_dim}, "
        f"images of {config.img_size} pixels"
    )


if __name__ == "__main__":
    main()
