"""Convert a tuned Hugging Face checkpoint to GGUF, without torch."""

from __future__ import annotations

import functools
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import metaalign_edge as edge
from metaalign_edge import Settings
from metaalign_edge_runtime.errors import UsageError
from metaalign_edge_runtime.llama import memory
from metaalign_edge_runtime.llama.gguf import is_gguf
from metaalign_edge_runtime.llama.interrupt import stopping_at
from metaalign_edge_runtime.stores import hub

from .measure import trial
from .options.groups import ForceOption, JsonOption, OfflineOption, QuietOption, VerboseOption, option
from .terminal.progress import progress_bar
from .terminal.screen import Screen

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


def convert(
    source: SourceArgument,
    output: OutputOption = None,
    outtype: OuttypeOption = None,
    lora: LoraOption = None,
    lora_only: LoraOnlyOption = False,
    template: CarriedTemplateOption = "auto",
    pre: PreOption = None,
    imatrix: ImatrixOption = None,
    leave_output: LeaveOutputOption = False,
    output_type: OutputTypeOption = None,
    embedding_type: EmbeddingTypeOption = None,
    tensor_type: TensorTypeOption = None,
    pure: PureOption = False,
    dry_run: DryRunOption = False,
    check: CheckOption = True,
    force: ForceOption = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Convert a tuned Hugging Face checkpoint to GGUF, without torch.

    A checkpoint whose tokenizer has the tier tokens gets the native three-tier template.

    Examples:

        metaalign-edge convert my-tuned-model -o my-model.gguf

        metaalign-edge convert my-tuned-model --outtype Q4_K_M --template keep

        metaalign-edge convert base-model --lora my-adapter -o my-model.gguf

        metaalign-edge convert my-model-f16.gguf --outtype Q6_K --dry-run
    """
    screen = Screen(quiet, verbose)
    import metaalign_edge_convert as converter

    outtype = converter.canonical_outtype(outtype or ("f32" if lora_only else "q8_0"))
    types = (output_type, embedding_type, tuple(tensor_type or ()))
    options = converter.QuantizeOptions(imatrix, leave_output, *types, pure)
    if lora_only and (len(lora or []) != 1 or dry_run or options):
        raise UsageError("--lora-only writes one adapter: name it with one --lora, without --dry-run or quantisation")
    if is_gguf(Path(source).expanduser()):
        if pre is not None or lora or template not in ("auto", "keep"):
            raise UsageError(
                f"--pre, --lora and --template are for checkpoints: {source} is a GGUF file and keeps what it has"
            )
        target = output or Path(f"{stem_of(source)}-{outtype}.gguf")
        converter.check_output(target, force)
        plan = converter.plan_gguf(Path(source).expanduser(), outtype, options=options)
    else:
        checkpoint = converter.open_checkpoint(hub.find_checkpoint(source, screen.detail, offline))
        adapters = [open_lora(name, checkpoint, offline, screen) for name in lora or []]
        if lora_only:
            target = output or Path(f"{adapters[0].name}-{outtype}.gguf")
            result = converter.write_adapter(checkpoint, adapters[0], target, outtype=outtype, force=force)
            report_conversion(result, as_json, screen)
            return
        target = output or Path(f"{Path(checkpoint.name).name}-{outtype}.gguf")
        converter.check_output(target, force)
        checkpoint = converter.merge(checkpoint, adapters) if adapters else checkpoint
        name, text = edge.conversion_template(template, checkpoint)
        plan = converter.plan_checkpoint(
            checkpoint, outtype, chat_template=text, template_name=name, pre=pre, check=check, options=options
        )
    if dry_run:
        show_plan(plan, target, as_json, screen)
        return
    verify = functools.partial(trial.verify_conversion, settings=Settings(verbose=verbose)) if check else None
    with progress_bar(screen) as bar, stopping_at(bar) as progress:
        result = converter.write_plan(plan, target, force=force, progress=progress, verify=verify)
    report_conversion(result, as_json, screen)


def open_lora(name: str, checkpoint: Any, offline: bool, screen: Screen) -> Any:
    """Open the LoRA adapter `name`, a folder or a hub id, with `:SCALE` behind it or without."""
    folder, scale = edge.split_scale(name)
    import metaalign_edge_convert as converter

    return converter.open_adapter(hub.find_checkpoint(folder, screen.detail, offline), checkpoint, scale)


def stem_of(source: str) -> str:
    """Return a GGUF file's name without the type that stands at its end."""
    import metaalign_edge_convert as converter

    name = Path(source).stem
    stem, _, kind = name.rpartition("-")
    try:
        converter.canonical_outtype(kind)
    except UsageError:
        return name
    return stem or name


def show_plan(plan: Any, target: Path, as_json: bool, screen: Screen) -> None:
    """Print what `convert` would write, and what it would need."""
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


def report_conversion(result: Any, as_json: bool, screen: Screen) -> None:
    """Say what `convert` did, and what was checked; warnings even without -v."""
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
