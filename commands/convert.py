"""Convert a tuned Hugging Face checkpoint to GGUF, without torch."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

import metaalign_edge as edge
from metaalign_edge import Settings
from metaalign_edge_runtime.errors import UsageError
from metaalign_edge_runtime.llama import memory
from metaalign_edge_runtime.llama.gguf import is_gguf
from metaalign_edge_runtime.llama.interrupt import stopping_at
from metaalign_edge_runtime.stores import hub

from .measure import trial
from .options import command
from .options.groups import ForceOption, JsonOption, OfflineOption, Verbosity, option
from .terminal.progress import progress_bar
from .terminal.screen import Screen

if TYPE_CHECKING:  # imported when the command runs: numpy and gguf take their time
    from metaalign_edge_convert import Checkpoint, Conversion, ConversionPlan, PeftAdapter, QuantizeOptions

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A Hugging Face checkpoint folder, user/repo on the hub, or a GGUF file to quantise anew.",
        show_default=False,
    ),
]
OutputOption = Annotated[
    Path | None, option("-o", "--output", help="The GGUF to write. Default: NAME-OUTTYPE.gguf here.")
]
OuttypeOption = Annotated[
    str | None,
    option(
        "--outtype",
        help="f32, f16, bf16, q8_0, or any type of llama.cpp's: Q4_K_M, Q6_K, IQ4_XS, … "
        "Default: q8_0; of an adapter, f32.",
    ),
]
LoraOption = Annotated[
    list[str] | None, option("--lora", help="A LoRA adapter of PEFT's to merge, DIR or DIR:SCALE; repeatable.")
]
LoraOnlyOption = Annotated[bool, option("--lora-only", help="Write the adapter as a GGUF of its own instead.")]
CarriedTemplateOption = Annotated[
    str, option("--template", help="A name or a file to carry as chat template; keep: the checkpoint's own.")
]
PreOption = Annotated[
    str | None, option("--pre", help="llama.cpp's name of the pre-tokenizer, where it cannot be found.")
]
DryRunOption = Annotated[bool, option("--dry-run", help="Show the plan, and write nothing.")]
CheckOption = Annotated[bool, option("--check/--no-check", help="Load the result and decode a token.")]
QUANTISATION = "Quantisation, in llama-quantize's words"
ImatrixOption = Annotated[
    Path | None, option("--imatrix", help="An importance matrix, as llama-imatrix writes it.", panel=QUANTISATION)
]
LeaveOutputOption = Annotated[
    bool, option("--leave-output-tensor", help="Keep output.weight as it is stored.", panel=QUANTISATION)
]
OutputTypeOption = Annotated[
    str | None, option("--output-tensor-type", help="A type for output.weight.", panel=QUANTISATION)
]
EmbeddingTypeOption = Annotated[
    str | None, option("--token-embedding-type", help="A type for token_embd.weight.", panel=QUANTISATION)
]
TensorTypeOption = Annotated[
    list[str] | None,
    option("--tensor-type", help="PATTERN=TYPE for the tensors so named. Repeat to add.", panel=QUANTISATION),
]
PureOption = Annotated[bool, option("--pure", help="One type for all matrices, no mixture.", panel=QUANTISATION)]


class Wanted(NamedTuple):
    """What the file shall hold, and where it goes."""

    output: OutputOption = None
    outtype: OuttypeOption = None
    lora: LoraOption = None
    lora_only: LoraOnlyOption = False
    template: CarriedTemplateOption = "auto"
    pre: PreOption = None

    def target(self, name: str, outtype: str) -> Path:
        """Return the path to write: the one that the user gives, else NAME-OUTTYPE.gguf in the working folder."""
        return self.output or Path(f"{name}-{outtype}.gguf")


class Writing(NamedTuple):
    """How the file is written."""

    dry_run: DryRunOption = False
    check: CheckOption = True
    force: ForceOption = False


class Quantisation(NamedTuple):
    """How weights are quantised beyond the type of the file."""

    imatrix: ImatrixOption = None
    leave_output: LeaveOutputOption = False
    output_type: OutputTypeOption = None
    embedding_type: EmbeddingTypeOption = None
    tensor_type: TensorTypeOption = None
    pure: PureOption = False

    def options(self) -> QuantizeOptions:
        """Return them as the converter takes them; they count as false where none is given."""
        import metaalign_edge_convert as converter

        types = (self.output_type, self.embedding_type, tuple(self.tensor_type or ()))
        return converter.QuantizeOptions(self.imatrix, self.leave_output, *types, self.pure)


@command
def convert(
    source: SourceArgument,
    *,
    wanted: Wanted,
    quantisation: Quantisation,
    writing: Writing,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    talk: Verbosity,
) -> None:
    """Convert a tuned Hugging Face checkpoint to GGUF, without torch.

    A checkpoint whose tokenizer has the tier tokens gets the native three-tier template.

    Examples:

        metaalign-edge convert my-tuned-model -o my-model.gguf

        metaalign-edge convert my-tuned-model --outtype Q4_K_M --template keep

        metaalign-edge convert base-model --lora my-adapter -o my-model.gguf

        metaalign-edge convert my-model-f16.gguf --outtype Q6_K --dry-run
    """
    import metaalign_edge_convert as converter

    screen, options = talk.screen(), quantisation.options()
    outtype = converter.canonical_outtype(wanted.outtype or ("f32" if wanted.lora_only else "q8_0"))
    if wanted.lora_only and (len(wanted.lora or []) != 1 or writing.dry_run or options):
        raise UsageError("--lora-only writes one adapter: name it with one --lora, without --dry-run or quantisation")
    if is_gguf(Path(source).expanduser()):
        plan, target = plan_from_gguf(source, wanted, outtype, options, writing)
    else:
        checkpoint = converter.open_checkpoint(hub.find_checkpoint(source, screen.detail, offline))
        adapters = [open_lora(name, checkpoint, offline, screen) for name in wanted.lora or []]
        if wanted.lora_only:
            target = wanted.target(adapters[0].name, outtype)
            result = converter.write_adapter(checkpoint, adapters[0], target, outtype=outtype, force=writing.force)
            report_conversion(result, as_json, screen)
            return
        plan, target = plan_from_checkpoint(checkpoint, adapters, wanted, outtype, options, writing)
    if writing.dry_run:
        show_plan(plan, target, as_json, screen)
        return
    verify = functools.partial(trial.verify_conversion, settings=Settings(verbose=talk.llama_log))
    with progress_bar(screen) as bar, stopping_at(bar) as progress:
        result = converter.write_plan(
            plan, target, force=writing.force, progress=progress, verify=verify if writing.check else None
        )
    report_conversion(result, as_json, screen)


def plan_from_gguf(
    source: str, wanted: Wanted, outtype: str, options: QuantizeOptions, writing: Writing
) -> tuple[ConversionPlan, Path]:
    """Plan to quantise a GGUF file anew; return the plan and the path to write.

    Raises:
        UsageError: an option is for checkpoints only, or the output exists. EdgeError: it cannot be read or quantised.
    """
    import metaalign_edge_convert as converter

    if wanted.pre is not None or wanted.lora or wanted.template not in ("auto", "keep"):
        raise UsageError(
            f"--pre, --lora and --template are for checkpoints: {source} is a GGUF file and keeps what it has"
        )
    target = wanted.target(stem_of(source), outtype)
    converter.check_output(target, writing.force)
    return converter.plan_gguf(Path(source).expanduser(), outtype, options=options), target


def plan_from_checkpoint(
    checkpoint: Checkpoint,
    adapters: Sequence[PeftAdapter],
    wanted: Wanted,
    outtype: str,
    options: QuantizeOptions,
    writing: Writing,
) -> tuple[ConversionPlan, Path]:
    """Plan to convert a checkpoint with some adapters merged in; return the plan and the path to write.

    Raises:
        UsageError: the output exists, or there is no such template. EdgeError: it cannot be converted like that.
    """
    import metaalign_edge_convert as converter

    target = wanted.target(Path(checkpoint.name).name, outtype)
    converter.check_output(target, writing.force)
    checkpoint = converter.merge(checkpoint, adapters) if adapters else checkpoint
    name, text = edge.conversion_template(wanted.template, checkpoint)
    plan = converter.plan_checkpoint(
        checkpoint,
        outtype,
        chat_template=text,
        template_name=name,
        pre=wanted.pre,
        check=writing.check,
        options=options,
    )
    return plan, target


def open_lora(name: str, checkpoint: Checkpoint, offline: bool, screen: Screen) -> PeftAdapter:
    """Open the LoRA adapter that DIR or DIR:SCALE names, DIR being a folder or a hub id."""
    import metaalign_edge_convert as converter

    folder, scale = edge.split_scale(name)
    return converter.open_adapter(hub.find_checkpoint(folder, screen.detail, offline), checkpoint, scale)


def stem_of(source: str) -> str:
    """Return the name of a GGUF file without its suffix and without the type at its end: `tiny` of tiny-Q8_0.gguf."""
    import metaalign_edge_convert as converter

    name = Path(source).stem
    stem, _, kind = name.rpartition("-")
    try:
        converter.canonical_outtype(kind)
    except UsageError:
        return name
    return stem or name


def show_plan(plan: ConversionPlan, target: Path, as_json: bool, screen: Screen) -> None:
    """Print what `convert` would write, and the disk space and memory that it would need."""
    free = shutil.disk_usage(target.parent).free
    megabytes = memory.peak_mb() + plan.memory / 1e6
    tensors = {kind: {"count": count, "bytes": size} for kind, (count, size) in plan.by_type().items()}
    document = {
        "output": str(target),
        "architecture": plan.architecture,
        "parameters": plan.parameters,
        "outtype": plan.outtype,
        "bytes": plan.bytes,
        "template": plan.template,
        "tensors": tensors,
        "free_bytes": free,
        "memory_mb": round(megabytes),
        "checks": list(plan.checks),
    }
    if as_json:
        screen.json(document)
        return
    template = plan.template or "none"
    rows = [f"{target}: {plan.architecture}, {plan.parameters:,} parameters, {plan.outtype}, template {template}"]
    rows += [f"  {kind:<8}{row['count']:>6} tensors{row['bytes'] / 1e6:>12,.1f} MB" for kind, row in tensors.items()]
    rows += [
        f"  disk    {plan.bytes / 1e6:,.1f} MB needed, {free / 1e6:,.0f} MB free",
        f"  memory  about {megabytes:,.0f} MB, and more for the checks, unless --no-check",
        *(f"  note    {line}" for line in plan.checks),
    ]
    screen.lines(rows)


def report_conversion(result: Conversion, as_json: bool, screen: Screen) -> None:
    """Print the outcome of `convert` and of its checks: warnings always, the other checks with -v."""
    for line in result.checks:
        if line.startswith("warning: "):
            screen.note(f"metaalign-edge: {line}")
        else:
            screen.detail(f"checked: {line}")
    if as_json:
        screen.json({**asdict(result), "output": str(result.output), "checks": list(result.checks)})
        return
    screen.note(
        f"{result.output}: {result.architecture}, {result.parameters:,} parameters, {result.outtype}, "
        f"{result.bytes / 1e6:.1f} MB, template {result.template or 'none'}, {result.seconds:.1f} s"
    )
