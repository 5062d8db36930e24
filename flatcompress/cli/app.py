"""The commands. Argument passing only: what a command does is in the module it calls, loaded when it is called.

Results go to stdout (``--json`` for machines), progress to stderr. Exit codes: 0 done, 2 the input is wrong,
3 the run failed or a certificate does not hold, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from flatcompress import __version__
from flatcompress.cli import building, sweeping
from flatcompress.cli.results import Json, show
from flatcompress.errors import Interrupted, RunError, UserError, unknown

app = typer.Typer(
    name="flatcompress",
    help="Train flat, cut, quantize, ship: one recipe from a PyTorch model to a verified low-bit sparse ONNX file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[Path, typer.Argument(help="the recipe, a YAML file", show_default=False)]
Setting = Annotated[list[str] | None, typer.Option("--set", help="override a key: stages.1.prune.ratio=0.7")]


@app.command()
def run(
    recipe: RecipePath,
    settings: Setting = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="the run folder itself")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="start over and remove the earlier results")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress on stderr")] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe; the same command again resumes where it stopped."""
    from flatcompress.cli import printing
    from flatcompress.cli.commands import run_recipe

    with printing.display(quiet=quiet) as shown:
        result = run_recipe(recipe, settings or [], output, restart, shown)
    if int(os.environ.get("RANK", "0")) != 0:
        return  # one process of several speaks
    if as_json:
        show(result.summary(), True, "")
    else:
        printing.print_result(result.summary())
    if result.certificate is not None and not result.certificate["holds"]:
        raise typer.Exit(3)


@app.command()
def validate(
    recipe: RecipePath,
    settings: Setting = None,
    syntax_only: Annotated[bool, typer.Option("--syntax-only", help="do not touch data, weights or models")] = False,
    as_json: Json = False,
) -> None:
    """Check a recipe without running it: keys, data, model, and whether every stage can do its surgery."""
    from flatcompress.cli.commands import check_recipe

    summary = check_recipe(recipe, settings or [], syntax_only)
    show(summary, as_json, f"{recipe}: valid. {summary['text']}")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="where to write the recipe")] = Path("recipe.yaml"),
    template: Annotated[str | None, typer.Option("--template", help="quickstart | domains | folder | cifar10")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of images: the recipe is fitted to what is in it")] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite an existing file")] = False,
) -> None:
    """Write a starter recipe, every key with a comment (default: quickstart)."""
    from flatcompress.cli.commands import write_starter
    from flatcompress.environment import command

    said = write_starter(path, template, data, force)
    if said:
        typer.echo(said)
    typer.echo(f"wrote {path}. Next: {command()} run {path}")


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(help="methods, models, data ... (default: all)")] = None,
    as_json: Json = False,
) -> None:
    """List what can be named in a recipe: methods, models, data sets, importances, quantizers, profiles."""
    from flatcompress.cli import printing
    from flatcompress.cli.commands import catalogue

    tables = catalogue()
    if kind is not None and kind not in tables:
        raise unknown("list", kind, tables)
    chosen = tables if kind is None else {kind: tables[kind]}
    if as_json:
        show(chosen, True, "")
    else:
        printing.print_catalogue(chosen)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from flatcompress.recipe import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


@app.command()
def verify(
    target: Annotated[Path, typer.Argument(help="a run folder, or an ONNX file beside its certificate")],
    key: Annotated[Path | None, typer.Option(help="PEM file with the signer's public key: check model.sig too")] = None,
    as_json: Json = False,
) -> None:
    """Repeat a certificate's proof on this machine; exit code 3 when it does not hold."""
    from flatcompress.cli import printing
    from flatcompress.cli.commands import verify_target

    outcome = verify_target(target, key)
    if as_json:
        show(outcome, True, "")
    else:
        printing.print_verification(outcome)
    if not outcome["holds"]:
        raise typer.Exit(3)


@app.command()
def sign(
    target: Annotated[Path, typer.Argument(help="a run folder, or an ONNX file beside its certificate")],
    key: Annotated[Path, typer.Option(help="PEM file with an elliptic-curve private key")],
    as_json: Json = False,
) -> None:
    """Sign a file, its certificate, its evidence and its bill of materials: model.sig, for `verify --key`.

    The password of an encrypted key is read from FLATCOMPRESS_KEY_PASSWORD.
    """
    from flatcompress.cli.commands import sign_target

    written = str(sign_target(target, key, os.environ.get("FLATCOMPRESS_KEY_PASSWORD")))
    again = f"flatcompress verify {target} --key PUBLIC.pem"
    show({"signature": written}, as_json, f"wrote {written}; check it with: {again}")


@app.command()
def sbom(
    folder: Annotated[Path, typer.Argument(help="a run folder")],
    as_json: Json = False,
) -> None:
    """Write a run's bill of materials, sbom.cdx.json (CycloneDX): file, model, data, packages, with hashes."""
    from flatcompress.cli.commands import write_sbom

    written = str(write_sbom(folder))
    show({"sbom": written}, as_json, f"wrote {written}")


@app.command()
def bench(
    file: Annotated[Path, typer.Argument(help="an ONNX file")],
    threads: Annotated[int, typer.Option(min=1, max=256, help="onnxruntime threads")] = 1,
    runs: Annotated[int, typer.Option(min=3, max=100_000, help="timed runs")] = 50,
    as_json: Json = False,
) -> None:
    """Measure latency, load time and size of an ONNX file on this machine."""
    from flatcompress.cli import printing
    from flatcompress.cli.commands import bench_file

    outcome = bench_file(file, threads, runs)
    if as_json:
        show(outcome, True, "")
    else:
        printing.print_bench(outcome)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="a run folder")],
    as_json: Json = False,
) -> None:
    """Rebuild report.html from a run folder's files."""
    from flatcompress.cli.commands import rebuild_report

    path = rebuild_report(folder)
    show({"report": str(path)}, as_json, f"wrote {path}")


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="two to six run folders")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the page to write")] = Path("compare.html"),
    as_json: Json = False,
) -> None:
    """Put runs side by side: figures, curves, bits and channels of every layer, what differs in the recipes."""
    from flatcompress.cli import printing
    from flatcompress.report import compare as side_by_side

    found = side_by_side.compare(folders)
    path = side_by_side.build(folders, output)
    if as_json:
        show({**found, "page": str(path)}, True, "")
    else:
        printing.print_comparison(found)
        typer.echo(f"page: {path}")


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="a run folder with an exported file")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder to write (default RUN/demo)")] = None,
    web: Annotated[Path | None, typer.Option(help="folder of the npm package onnxruntime-web")] = None,
    backend: Annotated[str, typer.Option(help="wasm")] = "wasm",
    as_json: Json = False,
) -> None:
    """Write a static page that runs the exported file in the browser: test images, own ones, camera."""
    from flatcompress.cli.demoing import demo as write_demo

    made = write_demo(folder, output, web, backend)
    how = f"Next: python -m http.server -d {made['folder']} --bind 127.0.0.1 8000, then open http://127.0.0.1:8000"
    show(made, as_json, f"wrote {made['folder']}. {how}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="a run folder with a finished stage")],
    profile: Annotated[
        str | None, typer.Option(help="file format, see `flatcompress list profiles` (default: packed)")
    ] = None,
    target: Annotated[str | None, typer.Option(help="what it is for, see `flatcompress list targets`")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="the ONNX file to write")] = None,
    opset: Annotated[int | None, typer.Option(min=13, max=28, help="ONNX opset")] = None,
    stage: Annotated[str | None, typer.Option(help="which checkpoint, like 0-train (default: the latest)")] = None,
    pack_activations: Annotated[
        bool | None, typer.Option("--pack-activations", help="profile c: activations of up to 4 bits, two to a byte")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a finished checkpoint as ONNX in another profile, with its own certificate."""
    from flatcompress.cli import printing
    from flatcompress.cli.commands import export_checkpoint

    outcome = export_checkpoint(folder, profile, output, opset, stage, target, pack_activations)
    if as_json:
        show(outcome, True, "")
    else:
        printing.print_verification(outcome)
    if not outcome["holds"]:
        raise typer.Exit(3)


@app.command()
def sharpness(
    folder: Annotated[Path, typer.Argument(help="a run folder with a finished stage")],
    stage: Annotated[str | None, typer.Option(help="which checkpoint, like 0-train (default: the latest)")] = None,
    samples: Annotated[int, typer.Option(min=1, help="training samples to measure on")] = 512,
    as_json: Json = False,
) -> None:
    """Measure how flat a finished checkpoint's minimum is."""
    from flatcompress.cli import printing
    from flatcompress.cli.commands import measure_sharpness

    outcome = measure_sharpness(folder, stage, samples)
    if as_json:
        show(outcome, True, "")
    else:
        printing.print_mapping(outcome)


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="built-in, timm:NAME, package.module:factory, FILE.onnx ...")],
    data: Annotated[Path | None, typer.Option(help="folder of images, .npz, .npy; default: drawn")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the run folder (default runs/MODEL)")] = None,
    bits: Annotated[str, typer.Option(help="8 | 6 | w4a8 | 4 | auto")] = "8",
    keep: Annotated[float | None, typer.Option(help="share of the channels that stays (with --epochs)")] = None,
    max_drop: Annotated[float | None, typer.Option(help="points of accuracy: layers get bits back")] = None,
    epochs: Annotated[int, typer.Option(min=0, help="0: no training; more: flat QAT")] = 0,
    budget: Annotated[str | None, typer.Option(help="500kB of weights, or with --epochs 3ms")] = None,
    weights: Annotated[str | None, typer.Option(help="a safetensors or state-dict file")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="timm's or torchvision's weights, fetched")] = False,
    classes: Annotated[int | None, typer.Option(min=1, help="classes, where neither data nor model say")] = None,
    input_shape: Annotated[str | None, typer.Option(help="C,H,W where the model does not say")] = None,
    mean: Annotated[str | None, typer.Option(help="of images, per channel on 0..1: 0.5,0.5,0.5")] = None,
    std: Annotated[str | None, typer.Option(help="of images, per channel on 0..1")] = None,
    target: Annotated[str | None, typer.Option(help="what the file is for: `flatcompress list targets`")] = None,
    task: Annotated[str | None, typer.Option(help="where it is no classification: `flatcompress list tasks`")] = None,
    seed: Annotated[int, typer.Option(help="of drawn inputs and splits")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress on stderr")] = False,
    as_json: Json = False,
) -> None:
    """From a trained model to a smaller verified file and its recipe; exit code 3 when the certificate fails."""
    from flatcompress.cli import printing
    from flatcompress.cli.inputs import numbers_of, shape_of
    from flatcompress.compressing import compress as run_compress

    shape = shape_of(input_shape)
    with printing.display(quiet=quiet) as shown:
        made = run_compress(model, data, out, bits=bits, keep=keep, max_drop=max_drop, epochs=epochs, budget=budget,
                            weights=weights, pretrained=pretrained, classes=classes, input_shape=shape,
                            mean=numbers_of("--mean", mean), std=numbers_of("--std", std), seed=seed, target=target,
                            task=task, display=shown)  # fmt: skip
    if as_json:
        show(made.to_dict(), True, "")
    else:
        printing.print_compressed(made.to_dict(), made.certificate)
    if not made.certificate["holds"]:
        raise typer.Exit(3)


@app.command()
def debug(
    target: Annotated[Path, typer.Argument(help="a run folder, or the ONNX file in it")],
    samples: Annotated[int, typer.Option(min=1, help="training samples to compare on")] = 128,
    as_json: Json = False,
) -> None:
    """Say where accuracy goes: each layer's own error, what adds up, the first bad place and what to pin."""
    from flatcompress.cli import printing
    from flatcompress.cli.debugging import debug_run

    found = debug_run(target, samples)
    if as_json:
        show(found, True, "")
    else:
        printing.print_diagnosis(found)


app.add_typer(building.app, name="data")
app.command()(sweeping.sweep)
app.command()(sweeping.search)


@app.callback(invoke_without_command=True)
def _begin(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"flatcompress {__version__}")
        raise typer.Exit
    from flatcompress import environment  # not at the top: `--help` answers without it

    environment.keep_freed_memory()


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: run a command and exit with its code; a user's mistake is one message, never a traceback."""
    sys.exit(_guarded(arguments))


def _guarded(arguments: list[str] | None) -> int:
    try:
        code = app(args=arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (UserError, RunError, Interrupted) as error:
        typer.echo(f"flatcompress: {error}", err=True)
        return error.exit_code
    except KeyboardInterrupt:
        typer.echo(
            "flatcompress: stopped at once; what was saved before is kept. The same command resumes the run.", err=True
        )
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        if _is_usage(error):
            error.show()  # type: ignore[attr-defined]
            return 2
        raise
    finally:
        _leave_processes()


def _leave_processes() -> None:
    """Several processes part; one that ended without could be aborted on its way out by a thread that still listens."""
    dist = sys.modules.get("torch.distributed")  # not imported for this: most commands need no torch
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _is_usage(error: Exception) -> bool:
    """Typer vendors or imports click depending on its version, so usage errors are told by their shape."""
    return hasattr(error, "show") and hasattr(error, "exit_code")


if __name__ == "__main__":
    main()
