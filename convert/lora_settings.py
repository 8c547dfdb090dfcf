"""adapter_config.json: every setting that changes what the adapter computes is obeyed or refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from metaalign_edge_runtime.errors import LoadError, some

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias", "lora_bias",
    "modules_to_save", "init_lora_weights", "alora_invocation_tokens", "trainable_token_indices",
    "base_model_name_or_path",
}  # fmt: skip
# Keys without effect on a trained adapter: they concern the training, or repeat what names and shapes of the tensors
# say. PEFT itself turns fan_in_fan_out off where weights are stored outputs first, as in all our architectures.
IDLE = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip
INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # ways to initialise that leave the base model unchanged
INSTEAD = "merge it with PEFT (merge_and_unload), save that, and convert the saved folder"
QUANTIZED = re.compile(r"bnb|4bit|8bit|gptq|awq|quantized", re.IGNORECASE)
PATTERN_LIMIT = 200  # characters
QUANTIFIERS = GROUPS = 4  # at most in a pattern: with more, or with repeated groups, matching may take exponential time

T = TypeVar("T")
Patterns = list[tuple["re.Pattern[str]", T]]


class PeftSettings:
    """The settings in adapter_config.json, every value checked."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Check the settings in `values`, the parsed file. Raises LoadError for anything beyond LoRA."""
        self._values = values
        kind = values.get("peft_type")
        if kind is None:
            raise LoadError(f"{SETTINGS}: no peft_type in it, so it is none of PEFT's; {INSTEAD}")
        if kind != "LORA":
            raise LoadError(f"{SETTINGS}: an adapter of type {kind!r}; only LORA is supported: {INSTEAD}")
        for key, value in values.items():
            if key not in READ and key not in IDLE and value:
                raise LoadError(f"{SETTINGS}: {key} changes what the adapter computes, unsupported here; {INSTEAD}")
        if (init := values.get("init_lora_weights")) not in INITS:
            raise LoadError(
                f"{SETTINGS}: init_lora_weights is {init!r}, and such a beginning may have changed the base "
                f"model's own weights; {INSTEAD}"
            )
        self.rank = self._rank("r", values.get("r"))
        self.alpha = self._alpha("lora_alpha", values.get("lora_alpha"))
        self.dora, self.rslora, self.lora_bias = (self._flag(key) for key in ("use_dora", "use_rslora", "lora_bias"))
        self._ranks: Patterns[int] = self._pattern("rank_pattern", self._rank)
        self._alphas: Patterns[float] = self._pattern("alpha_pattern", self._alpha)
        self.invocation = self._tokens("alora_invocation_tokens", values.get("alora_invocation_tokens"))

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's adapter."""
        return _match(self._ranks, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Return the alpha of a module's adapter."""
        return _match(self._alphas, module, self.alpha)

    def strength(self, alpha: float, rank: int) -> float:
        """Return the strength of a pair, whose change is `strength / rank * B @ A`; rsLoRA divides by sqrt(rank)."""
        return alpha * math.sqrt(rank) if self.rslora else alpha

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """Return the ids of the tokens whose rows were trained in `module`, which is the embedding or the head."""
        value = self._values.get("trainable_token_indices")
        if isinstance(value, dict):  # by module; a plain list applies to the embedding and to a tied head
            value = next((item for name, item in value.items() if f".{module}".endswith(f".{name}")), None)
        return self._tokens("trainable_token_indices", value)

    def check_contents(
        self, pairs: Collection[str], rows: Collection[str], whole: Collection[str], biases: Iterable[str]
    ) -> None:
        """Make sure that the file holds all that was trained. All arguments are tensor names. Raises LoadError."""
        saved = self._values.get("modules_to_save") or []
        if not isinstance(saved, list) or not all(isinstance(module, str) for module in saved):
            raise LoadError(f"{SETTINGS}: modules_to_save is {saved!r}, not a list of names")
        inside = [f".{name.rpartition('.')[0]}." for name in whole]
        missing = [module for module in saved if not any(f".{module}." in name for name in inside)]
        trained = self._values.get("bias", "none")
        if trained not in ("none", "all", "lora_only"):
            raise LoadError(f"{SETTINGS}: bias is {trained!r}, not none, all or lora_only")
        if trained != "none":
            wanted = [name for name in biases if trained == "all" or name.replace(".bias", ".weight") in pairs]
            missing += [name for name in wanted if name not in whole]
        if self._values.get("trainable_token_indices") and not rows:
            missing.append("trainable_tokens_delta")
        if missing:
            raise LoadError(f"{WEIGHTS} lacks {some(missing)}, which {SETTINGS} says was trained; save it again")

    def notes(self, name: str) -> tuple[str, ...]:
        """Return remarks about the adapter `name` for the user."""
        base = str(self._values.get("base_model_name_or_path") or "").rstrip("/").rpartition("/")[2]
        if not QUANTIZED.search(base):
            return ()
        return (f"{name} was trained on the quantized {base}; on the weights themselves, answers may differ a little",)

    def _rank(self, key: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value < 2**16:
            raise LoadError(f"{SETTINGS}: {key} is {value!r}, not a whole number from 1 to 65,535")
        return value

    def _alpha(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
            raise LoadError(f"{SETTINGS}: {key} is {value!r}, not a number")
        return float(value)

    def _flag(self, key: str) -> bool:
        value = self._values.get(key)
        if value not in (None, True, False) or type(value) is int:
            raise LoadError(f"{SETTINGS}: {key} is {value!r}, not true or false")
        return bool(value)

    def _tokens(self, key: str, value: Any) -> tuple[int, ...]:
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 2**31 for token in value):
            raise LoadError(f"{SETTINGS}: {key} is {value!r}, not a list of token ids")
        return tuple(value)

    def _pattern(self, key: str, check: Callable[[str, Any], T]) -> Patterns[T]:
        """Read a mapping from patterns of module names to values; its order is kept, as the first match counts."""
        value = self._values.get(key) or {}
        if not isinstance(value, dict):
            raise LoadError(f"{SETTINGS}: {key} is {value!r}, not an object")
        found = []
        for pattern, item in value.items():
            costly = len(pattern) > PATTERN_LIMIT or pattern.count("(") > GROUPS or re.search(r"\)[*+?{]", pattern)
            if costly or sum(map(pattern.count, "*+?{")) > QUANTIFIERS:
                raise LoadError(f"{SETTINGS}: {key} has the pattern {pattern!r}, too involved; name the modules")
            try:
                compiled = re.compile(rf"(.*\.)?({pattern})$")
            except re.error as error:
                raise LoadError(f"{SETTINGS}: {key} has the pattern {pattern!r}, which is none ({error})") from None
            found.append((compiled, check(f"{key} of {pattern}", item)))
        return found


def _match(patterns: Patterns[T], module: str, default: T) -> T:
    return next((value for pattern, value in patterns if pattern.match(module)), default)
