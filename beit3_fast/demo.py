"""``beit3-fast demo``: photos matched with captions by the drop-in model and by reference PyTorch, on the same weights.

Prints the image-text scores, the parity of the two and both times, and saves a picture of it all.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from beit3_fast.bench import parity, reference
from beit3_fast.bench.files import check_writable, replacing, write_json
from beit3_fast.bench.machine import default_device, machine, use_threads
from beit3_fast.bench.report import console, header, interval, milliseconds
from beit3_fast.bench.timing import Estimate, Timing, check_rounds, interleave, stopwatch_for

DEFAULT_MODEL = "beit3_base_patch16_224_retrieval"
DEFAULT_ROUNDS = 6
TOLERANCE = 2e-5
"""How far ours may be from reference PyTorch in float32, in units of the output's largest magnitude."""

if TYPE_CHECKING:
    from beit3_fast.models import BEiT3ForRetrieval

OURS, REFERENCE = "beit3_fast", "reference"
PARTS = ("image tower", "text tower", "both")
SCHEMA = 1


@dataclass(frozen=True)
class Pairing:
    """The images and texts of a run. ``captioned``: text i describes image i."""

    images: list[Image.Image]
    names: list[str]
    texts: list[str]
    captioned: bool


@dataclass(frozen=True)
class Parity:
    """``error`` is ours against reference PyTorch's output (float32) or both against its float32 output (bfloat16)."""

    error: dict[str, parity.Error]
    ok: bool
    summary: str


@dataclass(frozen=True)
class Result:
    """What a run found.

    ``timing`` is None when parity failed: a wrong result has no speed. ``cosine`` and ``probability`` are (texts,
    images); a column of ``probability`` sums to 1: the softmax over texts of the cosines times the model's learned
    scale.
    """

    pairing: Pairing
    model: str
    parameters: int
    weights: str
    trained: bool
    dtype: str
    valid_tokens: float
    padded_tokens: int
    cosine: Tensor
    probability: Tensor
    parity: Parity
    timing: Timing | None
    machine: dict[str, Any]
    settings: dict[str, Any]

    def time(self, provider: str, part: str) -> Estimate:
        return self._timed().time(f"{provider}, {part}")

    def speedup(self, part: str) -> Estimate:
        return self._timed().speedup(f"{OURS}, {part}", over=f"{REFERENCE}, {part}")

    def _timed(self) -> Timing:
        if self.timing is None:
            raise ValueError("there are no times: parity failed")
        return self.timing


def run(
    *,
    images: Sequence[Path] = (),
    texts: Sequence[str] = (),
    checkpoint: Path | None = None,
    tokenizer: Path | None = None,
    model: str | None = None,
    output: Path = Path("demo.png"),
    json_file: Path | None = None,
    rounds: int | None = None,
    threads: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> bool:
    """Runs the demo; the command line's options under their names. True if parity holds.

    Raises:
        ValueError, FileNotFoundError: an option that cannot be used, before any work.
        ModuleNotFoundError: matplotlib, which draws the picture, is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "the demo draws its picture with matplotlib, which is not installed: pip install 'beit3_fast[bench]'",
            name="matplotlib",
        )
    from beit3_fast.bench.picture import check_format, draw

    target = check_writable(check_format(output, "--output"), "--output")
    json_target = None if json_file is None else check_writable(json_file, "--json")
    rounds = DEFAULT_ROUNDS if rounds is None else rounds
    check_rounds(rounds)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, got {dtype!r}")
    if checkpoint is not None and tokenizer is None:
        raise ValueError("--checkpoint needs --tokenizer: the released beit3.spm, which its token ids come from")
    if checkpoint is not None and model is not None:
        raise ValueError("--model cannot be combined with --checkpoint: the file itself tells which model it is")
    for option, path in (("--checkpoint", checkpoint), ("--tokenizer", tokenizer)):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{option}: the file {str(path)!r} does not exist")
    pairing = gather(images, texts)

    shown = console()
    with use_threads(threads), shown.status("building both models") as status:
        result = measure(
            pairing,
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            model=model or DEFAULT_MODEL,
            dtype=getattr(torch, dtype),
            seed=seed,
            rounds=rounds,
            progress=status.update,
        )
        status.update("drawing")
        with replacing(target) as temporary:
            draw(result, temporary)
        if json_target is not None:
            write_json(json_target, document(result))
    show(result, shown)
    shown.print(f"picture: {target}" + (f"\nresults: {json_target}" if json_target else ""), highlight=False)
    return result.parity.ok


def gather(paths: Sequence[Path], texts: Sequence[str]) -> Pairing:
    """The user's images and texts; the photos and captions that come with the package stand in for what is not given.

    Raises:
        FileNotFoundError: an image file that does not exist.
        ValueError: a file that is no image, or an empty text.
    """
    from beit3_fast.processing import demo_pairs

    for text in texts:
        if not text.strip():
            raise ValueError("--text must not be empty")
    demo = demo_pairs()
    if not paths:
        paths = [Path(path) for path, _ in demo]
        captioned = not texts
    else:
        captioned = False
    return Pairing(
        images=[_open(path) for path in paths],
        names=[Path(path).stem for path in paths],
        texts=list(texts) or [caption for _, caption in demo],
        captioned=captioned,
    )


def _open(path: Path) -> Image.Image:
    if not Path(path).is_file():
        raise FileNotFoundError(f"--image: the file {str(path)!r} does not exist")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise whatever they stumble over
        raise ValueError(f"--image: {str(path)!r} is not an image that can be read: {error}") from error


def measure(
    pairing: Pairing,
    *,
    checkpoint: Path | None,
    tokenizer: Path | None,
    model: str,
    dtype: torch.dtype,
    seed: int,
    rounds: int,
    progress: Callable[[str], None] = lambda message: None,
) -> Result:
    """Builds both models on equal weights, compares what they return, then times them."""
    from beit3_fast.processing import Processor, Tokenizer, demo_tokenizer_path

    device = default_device()
    ours = build(checkpoint, model, seed).to(device, dtype)
    weights = ours.state_dict()
    config = ours.beit3.config

    def public(precision: torch.dtype) -> nn.Module:
        return reference.with_weights(
            lambda: reference.BEiT3ForRetrieval(config), weights, device=device, dtype=precision
        )

    theirs = public(dtype)
    processor = Processor(Tokenizer(tokenizer or demo_tokenizer_path()), image_size=config.img_size)
    batch = processor(images=pairing.images, texts=pairing.texts).to(device, dtype)
    image, ids, padding, lengths = batch.image, batch.text_ids, batch.padding_mask, batch.text_lengths
    assert image is not None
    assert ids is not None
    assert lengths is not None

    calls = {
        f"{REFERENCE}, image tower": lambda: theirs(image=image, only_infer=True)[0],
        f"{OURS}, image tower": lambda: ours(image=image, only_infer=True)[0],
        f"{REFERENCE}, text tower": lambda: theirs(text_description=ids, padding_mask=padding, only_infer=True)[1],
        f"{OURS}, text tower": lambda: ours(
            text_description=ids, padding_mask=padding, text_lengths=lengths, only_infer=True
        )[1],
    }
    with torch.inference_mode():
        progress("parity")
        outputs = {name: call() for name, call in calls.items()}
        truth = None
        if dtype != torch.float32:
            exact = public(torch.float32)
            vision, language = exact(image.float(), ids, padding, only_infer=True)
            truth = {"image tower": vision, "text tower": language}
            del exact
        compared = compare(outputs, dtype, truth)

        # the reference's vectors when ours are wrong would hide it: the table shows ours
        vision, language = outputs[f"{OURS}, image tower"].float(), outputs[f"{OURS}, text tower"].float()
        cosine = language @ vision.T
        probability = (ours.logit_scale.float().exp() * cosine).softmax(dim=0)
        timing = None
        if compared.ok:
            timing = interleave(
                calls,
                rounds=rounds,
                warmup=0,  # the comparison was one
                stopwatch=stopwatch_for(device),
                after_round=lambda done: progress(f"timing: round {done} of {rounds}"),
            )
    return Result(
        pairing=pairing,
        model=model if checkpoint is None else f"{checkpoint.name} ({config.img_size} x {config.img_size})",
        parameters=sum(p.numel() for p in ours.parameters()),
        weights=f"random, seed {seed}" if checkpoint is None else str(checkpoint.name),
        trained=checkpoint is not None,
        dtype=str(dtype).removeprefix("torch."),
        valid_tokens=sum(lengths) / len(lengths),
        padded_tokens=ids.shape[1],
        cosine=cosine.cpu(),
        probability=probability.cpu(),
        parity=compared,
        timing=_with_sums(timing) if timing else None,
        machine=machine(device),
        settings={"device": device.type, "rounds": rounds},
    )


def build(checkpoint: Path | None, model: str, seed: int) -> BEiT3ForRetrieval:
    """Our retrieval model: a checkpoint's, or one by name with seeded random weights.

    Raises:
        ValueError: the checkpoint or the name is of another kind of model.
        FileNotFoundError: there is no such checkpoint.
    """
    from beit3_fast.checkpoint import load_model
    from beit3_fast.models import BEiT3ForRetrieval, create_model

    if checkpoint is not None:
        built = load_model(checkpoint)
        source = f"--checkpoint {str(checkpoint)!r}"
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built = create_model(model)
        source = f"--model {model!r}"
    if not isinstance(built, BEiT3ForRetrieval):
        raise ValueError(f"{source} must be a retrieval model, got {type(built).__name__}")
    return built.eval()


def compare(outputs: dict[str, Tensor], dtype: torch.dtype, truth: dict[str, Tensor] | None) -> Parity:
    """Applies the parity rule to both towers.

    In float32 ours must be within ``TOLERANCE`` of reference PyTorch. In bfloat16 two right answers differ by rounding,
    so both are held against ``truth``, reference PyTorch in float32, by :func:`beit3_fast.bench.parity.judge`.
    """
    errors, broken = {}, []
    for part in PARTS[:2]:
        ours, theirs = outputs[f"{OURS}, {part}"], outputs[f"{REFERENCE}, {part}"]
        if truth is None:
            errors[part] = parity.error(ours, theirs)
            if not errors[part].maximum <= TOLERANCE:
                broken.append(f"{part}: {errors[part].maximum:.1e} > {TOLERANCE:.0e}")
        else:
            errors[part] = parity.error(ours, truth[part])
            verdict = parity.judge(errors[part], dtype, parity.error(theirs, truth[part]))
            if not verdict.ok:
                broken.append(f"{part}: {verdict.reason}")
    if broken:
        return Parity(errors, False, "; ".join(broken))
    rule = (
        f"within {TOLERANCE:.0e} of the output's size"
        if truth is None
        else "no further from float32 than twice reference PyTorch in bfloat16"
    )
    return Parity(errors, True, rule)


def _with_sums(timing: Timing) -> Timing:
    """Adds what a call with both images and texts takes: the towers do not meet, so it is the sum within a round."""
    rounds = dict(timing.rounds)
    for provider in (OURS, REFERENCE):
        towers = zip(*(rounds[f"{provider}, {part}"] for part in PARTS[:2]), strict=True)
        rounds[f"{provider}, both"] = [sum(pair) for pair in towers]
    return Timing(rounds)


def show(result: Result, shown: Console) -> None:
    """Prints the result."""
    shown.print(header(result.machine, result.settings))
    if not result.trained:
        shown.print(
            Panel(Text(random_weights_notice(result), style="bold yellow"), border_style="yellow", expand=False)
        )
    shown.print(_scores(result))
    shown.print(_parity(result.parity))
    shown.print(_times(result) if result.timing else Text("No times: a wrong result has no speed.", style="bold red"))


def random_weights_notice(result: Result) -> str:
    """Said wherever scores of an untrained model are shown."""
    return (
        f"RANDOM WEIGHTS ({result.weights.removeprefix('random, ')}): the scores below mean nothing, "
        "and are nearly equal by nature of the initialisation.\n"
        "Parity and times do not depend on it. For real scores give --checkpoint and --tokenizer."
    )


def _scores(result: Result) -> RenderableType:
    table = Table(title=f"Cosine similarity, {result.model}", title_justify="left", title_style="bold")
    table.add_column("text", max_width=44)
    for name in result.pairing.names:
        table.add_column(name, justify="right", overflow="fold")
    best = result.cosine.argmax(dim=0).tolist()
    for row, text in enumerate(result.pairing.texts):
        cells = []
        for column in range(len(result.pairing.names)):
            cell = f"{result.cosine[row, column]:.4f}"
            if result.trained:
                cell += f" ({result.probability[row, column]:.0%})"
            cells.append(Text(cell, style="bold green" if result.trained and best[column] == row else ""))
        table.add_row(Text(text), *cells)
    if result.trained:
        table.caption = "in brackets: softmax over the texts; green: the best text of each image"
        table.caption_justify = "left"
    return table


def _parity(found: Parity) -> RenderableType:
    verdict = Text("passed", style="bold green") if found.ok else Text("FAILED", style="bold red")
    lines = Text.assemble("Parity with reference PyTorch: ", verdict, f", {found.summary}\n")
    for part, error in found.error.items():
        lines.append(f"  {part}: max error {error.absolute:.1e}, {error.maximum:.1e} of the output's size\n")
    return lines


def _times(result: Result) -> RenderableType:
    table = Table(title="Time of one forward", title_justify="left", title_style="bold")
    table.add_column("")
    for name in (REFERENCE, OURS, "speed-up"):
        table.add_column(name, justify="right")
    for part in PARTS:
        table.add_row(
            part,
            f"{milliseconds(result.time(REFERENCE, part).median)} ms",
            f"{milliseconds(result.time(OURS, part).median)} ms",
            interval(result.speedup(part)),
        )
    return table


def document(result: Result) -> dict[str, Any]:
    """The JSON of a run. Times are in milliseconds; ``cosine`` and ``probability`` have a row per text."""

    def scaled(estimate: Estimate) -> dict[str, float]:
        return {name: value / 1e6 for name, value in asdict(estimate).items()}

    return {
        "schema": SCHEMA,
        "kind": "demo",
        "machine": result.machine,
        "settings": result.settings | {"dtype": result.dtype},
        "model": result.model,
        "weights": result.weights,
        "images": result.pairing.names,
        "texts": result.pairing.texts,
        "cosine": result.cosine.tolist(),
        "probability": result.probability.tolist(),
        "parity": {
            "passed": result.parity.ok,
            "summary": result.parity.summary,
            "error": {part: asdict(error) for part, error in result.parity.error.items()},
        },
        "times_ms": {
            part: {
                OURS: scaled(result.time(OURS, part)),
                REFERENCE: scaled(result.time(REFERENCE, part)),
                "speedup": asdict(result.speedup(part)),
            }
            for part in PARTS
        }
        if result.timing
        else None,
    }
