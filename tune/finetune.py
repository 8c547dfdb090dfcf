"""Tune a real model on the tiers: `python -m metaalign_edge_tune.finetune MODEL --data rows.jsonl --out my-adapter`.

Supervised training on the responses (TRL's SFTTrainer), then DPO against the rejected ones (DPOTrainer), by LoRA or,
with --full, of all weights. A prompt is rendered by the template that the toolkit renders with, and the text of each
tier is tokenised by itself: what is trained is what will be run, and no text can become a marker. Only the last
response and the token that closes it are learnt.

The folder that is written goes through `metaalign-edge convert` as it is. An adapter is the default, for it needs
nothing beside it but MODEL, unchanged: it brings the tokenizer with the tiers' tokens, their trained rows and, where
MODEL has no spare rows for them, the enlarged embedding. --merge writes a whole checkpoint. Stopped and started again
with the same options and --resume, training goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import metaalign_edge as edge
from metaalign_edge_convert import open_adapter, open_checkpoint
from metaalign_edge_convert.tokens import looks_special
from metaalign_edge_runtime.errors import UsageError
from metaalign_edge_runtime.stores import files, hub
from metaalign_edge_templates.sandbox import Template

from . import dataset
from .ending import finish, require, say

__all__ = ["Encoded", "Settings", "encode", "encode_prompt", "encode_row", "finetune", "main", "read_tokenizer"]

END = "<|end|>"
MARKERS = ("<|system_info|>", "<|user_info|>", "<|user|>", "<|assistant|>", END)
UNLEARNT = -100  # the label that a loss passes over
RESULTS = ("adapter_config.json", "config.json")  # one of them is in a folder that is finished

Encoded = dict[str, list[int]]  # a row as DPOTrainer takes it: prompt_ids, chosen_ids, rejected_ids


def option(default: Any, help: str) -> Any:
    """Declare a setting that is an option of the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """Everything that decides the weights, and where they go."""

    model: str  # a folder or a hub id
    data: Path
    out: Path
    method: str = option("both", "sft, dpo, or both: sft, then dpo on the rows that have a rejected response")
    merge: bool = option(False, "write a whole checkpoint, not an adapter")
    full: bool = option(False, "train all weights, not LoRA's; writes a whole checkpoint")
    epochs: float = option(1.0, "passes over the rows, for each method")
    steps: int = option(0, "steps instead, for each method")
    batch: int = option(8, "dialogs, or pairs of them, at a time")
    accumulate: int = option(1, "batches per step")
    learning_rate: float = option(0.0, "of sft, where dpo takes a twentieth, as in TRL (2e-4, with --full 2e-5)")
    beta: float = option(0.1, "of dpo: the higher, the closer the model stays to where it began")
    rank: int = option(16, "of LoRA; its alpha is twice that")
    max_length: int = option(2048, "tokens of a dialog; longer ones are left out, never cut")
    seed: int = option(1, "of everything that is drawn")

    def __post_init__(self) -> None:
        """Refuse numbers without sense. Raises UsageError."""
        for name in ("epochs", "batch", "accumulate", "beta", "rank", "max_length"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name.replace('_', '-')} is {getattr(self, name)}, not above zero")

    @property
    def checkpoints(self) -> Path:
        """Where the trainers' checkpoints lie until the result is written."""
        return self.out / "checkpoints"


# --- token ids --------------------------------------------------------------------------------------------------------


@cache
def native_template() -> Template:
    """Return the native three-tier template."""
    return Template(files.read_text(edge.shipped_templates()["metaalign"], "the template"), "metaalign")


def read_tokenizer(folder: Path) -> tuple[Any, list[int]]:
    """Read a checkpoint's tokenizer and make it the tiers'. Return it, and the ids of the tokens that it lacked."""
    from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json as it is: AutoTokenizer may put it together anew, with another normalizer and fewer tokens
    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    tokenizer = kind.from_pretrained(folder)
    known = tokenizer.get_vocab()
    # in GGUF a token that looks like <|fim_middle|> is a control token, whether it is marked as one here or not
    special = dict.fromkeys([*filter(looks_special, tokenizer.get_added_vocab()), *MARKERS])
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special], special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.eos_token = END
    tokenizer.chat_template = native_template().source
    return tokenizer, sorted(i for text, i in tokenizer.get_vocab().items() if text not in known)


def encode(tokenizer: Any, text: str, plain: bool = True) -> list[int]:
    """Return the ids of a text by itself. plain: a marker in it is characters."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=plain).input_ids)


def encode_prompt(tokenizer: Any, dialog: edge.Dialog) -> list[int]:
    """Return the ids that the toolkit feeds a model for a dialog, up to where the response starts."""
    prompt = native_template().render(messages=next(edge.native_messages(dialog)), add_generation_prompt=True)
    ids = [i for i in tokenizer("").input_ids[:1] if i == tokenizer.bos_token_id]  # where the vocabulary wants it
    for text, tier in prompt.pieces():
        ids += encode(tokenizer, text, plain=tier is not None)
    return ids


def encode_row(tokenizer: Any, row: dict[str, Any]) -> Encoded:
    """Return the ids of a row of the dataset; without a rejected response, ``rejected_ids`` are empty."""
    turns = [edge.Turn(turn["query"], turn["response"]) for turn in row["turns"]]
    dialog = edge.Dialog(row["system_info"], row["user_info"], (*turns, edge.Turn(row["query"])))
    chosen, rejected = ([*encode(tokenizer, row[key]), tokenizer.eos_token_id] for key in ("response", "rejected"))
    prompt = encode_prompt(tokenizer, dialog)
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected if row["rejected"] else []}


def labelled(row: Encoded) -> dict[str, list[int]]:
    """Return an encoded row as SFTTrainer takes it: all ids, and which of them are learnt."""
    prompt, response = row["prompt_ids"], row["chosen_ids"]
    return {"input_ids": prompt + response, "labels": [UNLEARNT] * len(prompt) + response}


def plan(rows: Sequence[Encoded], settings: Settings) -> dict[str, list[Encoded]]:
    """Return what each method trains on, in order. Raises UsageError if nothing is left."""
    sizes = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    short = [row for row, size in zip(rows, sizes, strict=True) if size <= settings.max_length]
    if len(short) < len(rows):
        say(
            "finetune",
            f"{len(rows) - len(short)} of {len(rows)} rows exceed {settings.max_length} tokens and are left out",
        )
    pairs = [row for row in short if row["rejected_ids"]]
    if settings.method == "both" and short and not pairs:
        say("finetune", "no row has a rejected response, so there will be no DPO")
    found = {"sft": short, "dpo": pairs}
    found = {method: left for method, left in found.items() if left and settings.method in (method, "both")}
    if not found:
        raise UsageError(f"{settings.data}: no row in it for {settings.method}")
    return found


# --- the model --------------------------------------------------------------------------------------------------------


def on_gpu() -> bool:
    """Say whether there is a GPU that computes in bfloat16."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def read_model(folder: Path, tokenizer: Any, new: Sequence[int], settings: Settings) -> Any:
    """Read a checkpoint, make room for the tiers' tokens, and wrap it in LoRA unless all weights are to be trained."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    # weights that are trained are kept in float32: bfloat16 would swallow small steps
    dtype = torch.bfloat16 if on_gpu() and not settings.full else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    set_seed(settings.seed)
    add_rows(model, new, max(tokenizer.get_vocab().values()) + 1)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model if settings.full else add_lora(model, tokenizer.convert_tokens_to_ids(list(MARKERS)), settings.rank)


def add_rows(model: Any, new: Sequence[int], size: int) -> None:
    """Give the embedding and the head at least ``size`` rows; new ones start near the mean of the old."""
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    if size > rows:
        model.resize_token_embeddings(size, pad_to_multiple_of=64, mean_resizing=False)
    matrices = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for weight in {id(weight): weight.data for weight in matrices}.values():  # tied, they are one
        starting = [*new, *range(max(rows, size), weight.shape[0])]
        if starting:
            old = weight[: min(starting)]
            noise = 0.1 * old.std(0).float() * torch.randn(len(starting), old.shape[1])
            weight[starting] = (old.mean(0, dtype=torch.float32) + noise).to(weight)


def add_lora(model: Any, tokens: list[int], rank: int) -> Any:
    """Wrap a model in LoRA on every matrix of its layers; of the embedding and the head, train the tokens' rows."""
    from peft import LoraConfig, get_peft_model

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    rows: Any = tokens  # of the embedding, and of a head that is tied to it
    if embedding.weight is not head.weight:
        rows = {names[id(module)]: tokens for module in (embedding, head)}
    lora = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "trainable_token_indices": rows}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    wrapped.get_output_embeddings().bias = None  # TRL reads it off the head, and PEFT's wrapper has none
    return wrapped


# --- training ---------------------------------------------------------------------------------------------------------


def progress(method: str) -> Any:
    """Return a callback that prints a line now and then."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):  # type: ignore[misc]
        begun = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" in logs:
                done, spent = f"{state.global_step:5d}/{state.max_steps}", time.monotonic() - self.begun
                print(f"{method}  step {done}  loss {float(logs['loss']):.4f}  {spent:5.0f} s", flush=True)

    return Progress()


def make_trainer(method: str, model: Any, tokenizer: Any, rows: Sequence[Encoded], settings: Settings) -> Any:
    """Return TRL's trainer for a method, its rows ready."""
    import trl
    from datasets import Dataset
    from transformers import PrinterCallback

    gpu, rate = on_gpu(), settings.learning_rate or (2e-5 if settings.full else 2e-4)
    arguments: dict[str, Any] = {
        "output_dir": str(settings.checkpoints / method),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.steps or -1,
        "per_device_train_batch_size": settings.batch,
        "gradient_accumulation_steps": settings.accumulate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # a share of all steps, like the next two
        "logging_steps": 0.05,
        "save_steps": 0.1,
        "save_total_limit": 1,
        "seed": settings.seed,
        "bf16": gpu,
        "gradient_checkpointing": gpu,  # slower, with less memory
        "dataloader_pin_memory": gpu,
        "max_length": None,  # what is too long is gone already
        "report_to": "none",
        "disable_tqdm": True,
    }
    shared = {"model": model, "processing_class": tokenizer, "callbacks": [progress(method)]}
    if method == "sft":
        data = Dataset.from_list([labelled(row) for row in rows])
        trainer = trl.SFTTrainer(args=trl.SFTConfig(learning_rate=rate, **arguments), train_dataset=data, **shared)
    else:
        # rows of token ids need no preparation, but DPOTrainer has no switch for that
        kind = type("DPOTrainer", (trl.DPOTrainer,), {"_prepare_dataset": lambda self, data, *_: data})
        config = trl.DPOConfig(learning_rate=rate / 20, beta=settings.beta, **arguments)
        reference = copy.deepcopy(model) if settings.full else None  # with LoRA a second adapter, copied from the first
        trainer = kind(args=config, train_dataset=Dataset.from_list(list(rows)), ref_model=reference, **shared)
        for name, trained in list(model.named_parameters()):  # which TRL forgets to copy
            if name.endswith("trainable_tokens_delta.default"):
                model.get_parameter(name.removesuffix("default") + "ref").data.copy_(trained.data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(method: str, model: Any, tokenizer: Any, rows: Sequence[Encoded], settings: Settings) -> None:
    """Train a model by one method, sft or dpo, from the method's last checkpoint if there is one."""
    trainer = make_trainer(method, model, tokenizer, rows, settings)
    found = Path(trainer.args.output_dir).glob("checkpoint-*/trainer_state.json")  # what is written last
    states = {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in found}
    last = max(states, key=lambda folder: int(states[folder]["global_step"]), default=None)
    if last and states[last]["global_step"] >= states[last]["max_steps"]:
        trainer._load_from_checkpoint(str(last))  # resuming what is finished would take a step more
    else:
        trainer.train(resume_from_checkpoint=last and str(last))
    if method == "dpo" and not settings.full:
        model.delete_adapter("ref")


# --- the recipe -------------------------------------------------------------------------------------------------------


def begin(settings: Settings, resume: bool) -> bool:
    """Make the output's folder, or see that it is the one to go on in; False if it is finished. Raises UsageError."""
    written, said = settings.checkpoints / "settings.json", json.dumps(asdict(settings), default=str, indent=2)
    if not resume and settings.out.exists() and (not settings.out.is_dir() or any(settings.out.iterdir())):
        raise UsageError(f"{settings.out}: exists already; name another, or go on with --resume")
    if written.exists() and written.read_text(encoding="utf-8") != said:
        raise UsageError(f"{written}: begun with other options; give the same, or name another output")
    if not written.exists() and any((settings.out / name).exists() for name in RESULTS):
        return False
    settings.checkpoints.mkdir(parents=True, exist_ok=True)
    written.write_text(said, encoding="utf-8")
    return True


def save(model: Any, tokenizer: Any, settings: Settings, folder: Path) -> None:
    """Write the adapter, or the whole model with the data type that its files in ``folder`` have."""
    from transformers import AutoConfig

    base = AutoConfig.from_pretrained(folder)
    if settings.full or settings.merge:
        model = model if settings.full else model.merge_and_unload()
        model.config.use_cache = True  # training turned it off
        model.to(base.dtype or model.dtype).save_pretrained(settings.out)
    else:
        model.peft_config["default"].base_model_name_or_path = settings.model  # not where the hub's cache has it
        model.save_pretrained(settings.out, save_embedding_layers=model.config.vocab_size != base.vocab_size)
    tokenizer.save_pretrained(settings.out)
    path = settings.out / "tokenizer_config.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    said["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name by which transformers 4 knows it too
    path.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def finetune(settings: Settings, resume: bool = False) -> None:
    """Train as the settings say and write the result. resume: go on where an earlier start stopped."""
    require("torch", "transformers", "peft", "trl", "datasets")
    folder = hub.find_checkpoint(settings.model, lambda _: None)
    base = open_checkpoint(folder)  # what cannot be converted need not be trained
    rows = list(dataset.read_rows(settings.data))
    if not begin(settings, resume):
        print(f"{settings.out}: finished already", flush=True)
        return
    tokenizer, new = read_tokenizer(folder)
    stages = plan([encode_row(tokenizer, row) for row in rows], settings)
    model = read_model(folder, tokenizer, new, settings)
    for method, left in stages.items():
        train(method, model, tokenizer, left, settings)
    save(model, tokenizer, settings, folder)
    whole = settings.full or settings.merge
    _ = open_checkpoint(settings.out) if whole else open_adapter(settings.out, base)  # as `convert` will
    shutil.rmtree(settings.checkpoints)
    source = settings.out if whole else f"{settings.model} --lora {settings.out}"
    print(f"wrote {settings.out}: metaalign-edge convert {source}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe from the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m metaalign_edge_tune.finetune", description=__doc__)
    parser.add_argument("model", help="the checkpoint to begin with, a folder or a hub id")
    parser.add_argument("--data", type=Path, required=True, help="rows, as metaalign_edge_tune.dataset writes them")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    for one in fields(Settings)[3:]:
        name, text = "--" + one.name.replace("_", "-"), one.metadata["help"]
        if one.default is False:
            parser.add_argument(name, action="store_true", help=text)
        else:
            shown = f"{text} (default: {one.default})" if one.default else text
            choices = ("sft", "dpo", "both") if one.name == "method" else None
            parser.add_argument(name, type=type(one.default), default=one.default, choices=choices, help=shown)
    parser.add_argument("--resume", action="store_true", help="go on where the same command stopped")
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume")
    # before any of these libraries is imported, for that is when it looks
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # TRL refuses to share one process among several
    if Path(given["model"]).exists():
        os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")  # what libraries say about each other
    return finish("finetune", given["out"], "go on with --resume", lambda: finetune(Settings(**given), resume))


if __name__ == "__main__":
    sys.exit(main())
