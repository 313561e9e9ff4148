"""Every setting of a run, declared once: its name, default, limits, help and command-line flag.

The YAML file, `--set a.b=value`, the flags of `softprompt tune` and docs/recipe.md all derive from the fields below.
No torch here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, TypeAlias, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from softprompt.errors import RecipeError
from softprompt.tune.recipe_text import Written, describe_value, read_mapping, read_value

Auto: TypeAlias = Literal["auto"]
Count: TypeAlias = Annotated[int, Field(ge=1)]
Positive: TypeAlias = Annotated[float, Field(gt=0)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0)]
Rows: TypeAlias = Annotated[int, Field(ge=0)]
Share: TypeAlias = Annotated[float, Field(gt=0, lt=1)]


def setting(default: Any, help: str, *, flag: str | None = None, **limits: Any) -> Any:
    """Declare one setting; `flag` is its name on the command line, where it has a short one."""
    return Field(default, description=help, json_schema_extra={"flag": flag}, **limits)


class Section(BaseModel):
    """Settings that are refused when unknown or of another kind, rather than bent into shape."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True
    )


class Data(Section):
    """What is learned from."""

    source: str = setting(
        ...,
        "A file (csv, tsv, json, jsonl, parquet), a folder, a data set's id on the hub, or `builtin:NAME`.",
        flag="--data",
    )
    revision: str | None = setting(None, "The hub data set's commit, branch or tag.")
    config: str | None = setting(None, "The hub data set's configuration.")
    split: str = setting("train", "The split to learn from.")
    column: str | None = setting(
        None, "The text column: the loss counts all of its tokens. `{text}` in the template.", flag="--column"
    )
    fields: dict[str, str] = setting({}, "Names in the template, and the column that each stands for.")
    messages: str | None = setting(
        None, "The column of chat messages: the base's chat template, and the loss on the assistant's turns."
    )
    target: str | None = setting(
        None, "The template's field that is to be learned; without it the loss counts the whole text."
    )
    template: str | None = setting(
        None,
        "How a row becomes text, such as `{soft:20} {text}` or `Tweet: {text} Complaint? {label}`; without it, "
        "the soft prompt stands right before the text.",
    )
    limit: Count | None = setting(None, "Learn from the first N rows alone.", flag="--limit")
    validation: Share | Rows | str | None = setting(
        None,
        "Held out to choose the best step: a share (0.1), a number of rows (50; 0 for none), a split's name or a "
        "file. Without it, the source's own validation split if it has one.",
    )
    test: Share | Rows | str | None = setting(
        None,
        "Held out to the end: given like `validation`. Without it, the source's own test split if it has one.",
    )
    seed: int = setting(
        0, "Which rows are held out; apart from `tune.seed`, so that runs are judged on the same rows.", ge=0
    )
    max_length: Count | None = setting(
        None,
        "Longest text in tokens, soft prompt included; without it, the base's context.",
        flag="--max-length",
    )
    on_overflow: Literal["error", "truncate", "drop"] = setting(
        "error", "What becomes of a text that is longer: refuse the data, cut the text, or leave the row out."
    )
    end: Literal["auto", "always", "never"] = setting(
        "auto",
        "Whether the end-of-text token is appended and learned: auto means after a target or an assistant's turn.",
    )
    encoding: str | None = setting(
        None, "The file's text encoding; without it, it is detected, and a guess is said."
    )
    streaming: bool = setting(
        False, "Read only the first `limit` rows of a hub data set, rather than downloading all of it."
    )


class Prompt(Section):
    """What is learned."""

    kind: Literal["soft", "deep"] = setting(
        "soft", "soft: vectors in front of the first layer. deep: keys and values for every layer."
    )
    length: Count | None = setting(
        None,
        "How many virtual tokens; without it as many as `init_text` or `init_from` has, else 20.",
        flag="--length",
    )
    init: Literal[
        "auto", "random", "vocabulary", "text", "labels", "zero", "prompt", "mean", "concatenation"
    ] = setting(
        "auto",
        "Where it starts: random at the embedding table's scale, rows of the most frequent vocabulary, the "
        "embeddings of `init_text`, or those of the class labels; or the first prompt of `init_from`, the mean or "
        "the concatenation of them all. A deep prompt starts from what the base holds after reading those, or from "
        "zero. auto means text where `init_text` is given, prompt where `init_from` is, else vocabulary.",
        flag="--init",
    )
    init_text: str | None = setting(None, "The text whose embeddings `init: text` starts from.")
    init_from: list[str] = setting([], "Folders of prompts of the same base to start from.")
    form: Literal["direct", "residual", "mlp", "lstm", "low_rank", "superposition", "multitask"] = setting(
        "direct",
        "The form that is trained, and folded into a plain prompt on saving: direct is the vectors themselves; "
        "residual, mlp and lstm put a small network behind them; low_rank, superposition and multitask train fewer "
        "numbers.",
    )
    form_width: Count | None = setting(
        None,
        "Size of the form: hidden width of a network, rank, or how many embeddings are superposed; without it, the "
        "form's own.",
    )


class Tune(Section):
    """How it is learned."""

    learning_rate: Positive | Literal["auto", "find"] = setting(
        "auto",
        "The highest step size. auto derives it from the embeddings' scale; find tries five rates around that in "
        "short runs first.",
        flag="--learning-rate",
    )
    epochs: Count = setting(5, "How often every row is seen.", flag="--epochs")
    max_steps: Count | None = setting(None, "Stop after this many steps, whatever `epochs` says.")
    batch_size: Count | Auto = setting(
        "auto",
        "Rows a step; auto is 8. Where memory runs out, it is halved and two are added up for a step.",
        flag="--batch-size",
    )
    optimizer: Literal["muon", "adamw", "adafactor"] = setting(
        "muon", "The rule that moves the prompt; arms of `compare` that train weights take adamw for muon."
    )
    schedule: Literal["linear", "cosine", "constant"] = setting(
        "linear", "How the learning rate goes down after the warm-up."
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] | Auto = setting(
        "auto", "The share of all steps over which it rises; auto is none with muon, else 0.06."
    )
    weight_decay: NotNegative = setting(0.0, "Pull towards zero; a prompt rarely gains by it.")
    context_cache_gigabytes: NotNegative = setting(
        1.0,
        "Memory for text that stands before the first soft token: it is read once and its keys and values are used "
        "again in every epoch. 0 for none.",
    )
    int8: bool = setting(
        False,
        "Take the learning steps with the base's weights in int8, which CPUs with VNNI multiply several times faster. "
        "Held-out losses stay those of the base as it is. A small approximation; other machines take no notice.",
    )
    clip: Positive | None = setting(1.0, "Largest norm of the gradient; null for no limit.")
    gradient_checkpointing: bool = setting(
        False,
        "Compute each layer a second time rather than keep what it computed: long texts on little memory.",
    )
    seed: int = setting(0, "Seed of the start and of the rows' order.", flag="--seed", ge=0)
    valid_every_steps: Count | None = setting(
        None, "How often the held-out loss is measured; without it, after every epoch."
    )
    select: Literal["nll", "token_accuracy", "exact_match"] = setting(
        "nll",
        "What the best step is chosen by, on the held-out rows: loss; the share of trained tokens that are the most "
        "likely ones; or of rows of which all are, which greedy decoding would say exactly.",
    )
    patience: Count | None = setting(
        None, "Stop after this many measurements without a better one; without it, run to the end."
    )
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = setting(
        [], "Where the figures go besides metrics.jsonl: tensorboard, trackio, wandb, if installed."
    )
    checkpoint_steps: Count | None = setting(
        None, "Write a checkpoint every so many steps, for `--resume`; without it, by time alone."
    )
    checkpoint_seconds: Positive = setting(60.0, "Write a checkpoint after so many seconds without one.")

    @property
    def warmup_share(self) -> float:
        """`warmup`, with auto settled."""
        if self.warmup == "auto":
            return 0.0 if self.optimizer == "muon" else 0.06
        return self.warmup


class Recipe(Section):
    """One run of prompt tuning, complete."""

    base: str = setting(
        "builtin", "The frozen model: `builtin`, a local folder, or a model's id on the hub.", flag="--base"
    )
    base_revision: str | None = setting(None, "The hub model's commit, branch or tag.")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"] = setting(
        "auto",
        "The base's number format; auto takes what the machine is fastest at; int8 and int4 pack its weights "
        "(bitsandbytes).",
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps.")
    trust_remote_code: bool = setting(
        False, "Run code that comes with the base. No base named here needs it."
    )
    out: str = setting("runs/prompt", "The folder that the prompt is written to.", flag="--out")
    data: Data = Field(description="What is learned from.")
    prompt: Prompt = Field(default_factory=Prompt, description="What is learned.")
    tune: Tune = Field(default_factory=Tune, description="How it is learned.")

    def __init__(
        self, /, *, _places: Mapping[str, str] | None = None, _origin: str = "recipe", **values: Any
    ) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RecipeError(_explain(error, _places or {}, _origin)) from None

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, then apply `a.b=value` overrides in order. RecipeError names the file and the line."""
        return cls.from_flags({}, overrides, path=path)

    @classmethod
    def from_flags(
        cls,
        flags: Mapping[str, str | None],
        overrides: Sequence[str] = (),
        *,
        path: str | Path | None = None,
    ) -> Self:
        """Settle a recipe from a file, if any, then `--set` overrides, then flags by name ("--learning-rate")."""
        tree: dict[str, Any] = {}
        places: dict[str, str] = {}
        if path is not None:
            _merge(cls, tree, places, read_mapping(_read_file(path), str(path)))
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise RecipeError(f"--set {override}: found no '=', wanted KEY=VALUE such as tune.epochs=3.")
            _put(cls, tree, places, key.strip(), text, f"--set {key.strip()}")
        named = {one.flag: one for one in settings(cls) if one.flag}
        for flag, value in flags.items():
            if value is not None:
                _put(cls, tree, places, named[flag].path, value, flag)
        for section in _sections(cls):
            tree.setdefault(section, {})
        return cls(_places=places, _origin=str(path) if path is not None else "recipe", **tree)

    def changed(self, overrides: Sequence[str]) -> Self:
        """The same recipe with `a.b=value` overrides applied in order."""
        tree = self.model_dump()
        places: dict[str, str] = {}
        for override in overrides:
            key, _, text = override.partition("=")
            _put(type(self), tree, places, key.strip(), text, key.strip())
        return type(self)(_places=places, **tree)

    def to_yaml(self) -> str:
        """Every setting, defaults included, as a file that `load` reads back to the same recipe."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True, width=100)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.prompt.init == "text" and not self.prompt.init_text:
            raise ValueError(
                "prompt.init is text, but prompt.init_text is empty. Give the text to start from."
            )
        if self.prompt.init == "zero" and self.prompt.kind != "deep":
            raise ValueError(
                "prompt.init is zero, which only keys and values can start from: vectors would all be the same. Set "
                "prompt.kind to deep, or prompt.init to random or vocabulary."
            )
        if self.prompt.init in ("prompt", "mean", "concatenation") and not self.prompt.init_from:
            raise ValueError(
                f"prompt.init is {self.prompt.init}, but prompt.init_from is empty. Name folders of learned prompts."
            )
        if self.prompt.init == "labels" and self.data.target is None:
            raise ValueError(
                "prompt.init is labels, but data.target is not set. Name the field of the label."
            )
        if self.data.column is not None and self.data.messages is not None:
            raise ValueError("data.column and data.messages are both set. Keep the one that holds the text.")
        if self.data.target is not None and self.data.template is None:
            raise ValueError(
                "data.target is set, but data.template is not. Write where the target stands in the text."
            )
        return self


@dataclass(frozen=True)
class Setting:
    """One setting as the command line, the docs and the error messages see it."""

    path: str
    default: Any
    required: bool
    help: str
    flag: str | None
    wanted: str


def settings(model: type[Section] = Recipe, prefix: str = "") -> Iterator[Setting]:
    """All settings, sections opened, in the order of their declaration."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from settings(field.annotation, f"{prefix}{name}.")
            continue
        extra = field.json_schema_extra
        flag = extra.get("flag") if isinstance(extra, dict) else None
        required = field.default is PydanticUndefined
        yield Setting(
            path=f"{prefix}{name}",
            default=None if required else field.default,
            required=required,
            help=field.description or "",
            flag=str(flag) if flag else None,
            wanted=_wanted(field.annotation, field.metadata),
        )


def _sections(model: type[Section]) -> dict[str, type[Section]]:
    return {
        name: field.annotation
        for name, field in model.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def _read_file(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe file. Check the path.") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: found a folder, wanted a recipe file.") from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: byte {error.start} is not UTF-8, as a recipe must be. Save it as UTF-8."
        ) from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}.") from None


def _merge(
    model: type[Section],
    tree: dict[str, Any],
    places: dict[str, str],
    written: dict[str, Written],
    prefix: str = "",
) -> None:
    sections = _sections(model)
    for key, item in written.items():
        places[prefix + key] = item.where
        if key in sections and isinstance(item.value, dict):
            _merge(sections[key], tree.setdefault(key, {}), places, item.value, f"{prefix}{key}.")
        elif key in sections and item.value is None:
            tree[key] = {}  # a heading with nothing under it
        else:
            field = model.model_fields.get(key)
            tree[key] = _plain(item, field.annotation if field is not None else Any)


def _put(
    model: type[Section], tree: dict[str, Any], places: dict[str, str], path: str, text: str, where: str
) -> None:
    """Set one setting by its dotted path from a flag's text."""
    *outer, last = path.split(".")
    for name in outer:
        sections = _sections(model)
        if name not in sections:
            if name in model.model_fields and get_origin(model.model_fields[name].annotation) is dict:
                tree = tree.setdefault(name, {})  # data.fields.text=body
                tree[last] = text
                return
            raise RecipeError(f"{where}: unknown setting.{_did_you_mean(path)}")
        model, tree = sections[name], tree.setdefault(name, {})
    places[path] = where
    if last in _sections(model):
        raise RecipeError(
            f"{where}: {path} is a section, wanted one of its settings such as {_first_in(path)}."
        )
    field = model.model_fields.get(last)
    if field is None:
        raise RecipeError(f"{where}: unknown setting.{_did_you_mean(path)}")
    wants_text = _members(field.annotation) <= {str, NoneType}
    # Text is taken to the letter: a template's braces and a text's last blank are no YAML.
    tree[last] = text if wants_text else _plain(read_value(text, where), field.annotation)


def _plain(item: Written, annotation: Any) -> Any:
    """The value for a field: a setting that wants text takes `1e5` or `true` as the text it was written as."""
    if isinstance(item.value, dict):
        inner = get_args(annotation)[1] if get_origin(annotation) is dict else Any
        return {key: _plain(value, inner) for key, value in item.value.items()}
    if isinstance(item.value, list):
        return [_plain(value, Any) for value in item.value]
    if item.value is not None and _members(annotation) <= {str, NoneType}:
        return item.text
    return item.value


def _members(annotation: Any) -> set[Any]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*(_members(member) for member in get_args(annotation)))
    return {annotation}


def _wanted(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A field's kind in words: "a whole number of at least 1, or auto"."""
    if get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        spread = [part for note in notes for part in getattr(note, "metadata", [note])]
        return _wanted(inner, spread)
    if get_origin(annotation) in (Union, UnionType):
        parts = [_wanted(member, metadata) for member in get_args(annotation) if member is not NoneType]
        return ", or ".join(parts)
    if get_origin(annotation) is Literal:
        options = [str(option) for option in get_args(annotation)]
        return options[0] if len(options) == 1 else f"one of {', '.join(options)}"
    if get_origin(annotation) is dict:
        return "a mapping of names to texts"
    if get_origin(annotation) is list:
        inner = _wanted(get_args(annotation)[0])
        return "a list of texts" if inner == "text" else f"a list: {inner}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    words = {"ge": "of at least {}", "gt": "above {}", "le": "of at most {}", "lt": "below {}"}
    limits = [
        text.format(getattr(note, attribute))
        for note in metadata
        for attribute, text in words.items()
        if getattr(note, attribute, None) is not None
    ]
    return " ".join([names.get(annotation, "a mapping"), " and ".join(limits)]).strip()


def _explain(error: ValidationError, places: Mapping[str, str], origin: str) -> str:
    """One line for each setting that was refused: where, which, found, wanted."""
    known = {one.path: one for one in settings()}
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        names = [str(part) for part in problem["loc"]]
        # Unions append the member that failed; the setting is the longest known start of the path.
        path = next(
            (p for end in range(len(names), 0, -1) if (p := ".".join(names[:end])) in known), ".".join(names)
        )
        where = next((places[p] for p in (".".join(names), path) if p in places), origin)
        label = "" if where.endswith(path) else f" {path}:"
        if problem["type"] == "extra_forbidden":
            text = f"unknown setting.{_did_you_mean(path)}"
        elif problem["type"] == "missing":
            wanted = known[path].help if path in known else "a section of settings"
            text = f"nothing given, wanted: {wanted}"
            flag = known[path].flag if path in known else None
            text += f" Write it into the recipe, or pass {flag}." if flag else ""
        elif problem["type"] == "value_error":
            label, text = "", str(problem["ctx"]["error"])
        else:
            value: Any = problem["input"]
            wanted = known[path].wanted if path in known else f"settings such as {_first_in(path)}"
            text = f"found {describe_value(value)}, wanted {wanted}."
        lines.setdefault(path, f"{where}:{label} {text}")
    return "\n".join(lines.values())


def _first_in(section: str) -> str:
    return next((one.path for one in settings() if one.path.startswith(f"{section}.")), "base")


# What other tools call them.
_ELSEWHERE = {
    "lr": "tune.learning_rate",
    "model": "base",
    "dataset": "data.source",
    "num_virtual_tokens": "prompt.length",
    "num_train_epochs": "tune.epochs",
    "output_dir": "out",
}


def _did_you_mean(path: str) -> str:
    """The nearest known setting as a question, or where to look."""
    known = [one.path for one in sorted(settings(), key=lambda one: one.flag is None)]
    section, _, last = path.rpartition(".")
    same_name = [one for one in known if one.split(".")[-1] == last]
    siblings = {one.split(".")[-1]: one for one in known if one.rpartition(".")[0] == section}
    anywhere = {one.split(".")[-1]: one for one in reversed(known)}
    near = (
        same_name
        or ([_ELSEWHERE[last]] if last in _ELSEWHERE else [])
        or [siblings[name] for name in difflib.get_close_matches(last, siblings, 1, 0.6)]
        or [anywhere[name] for name in difflib.get_close_matches(last, anywhere, 1, 0.6)]
        or difflib.get_close_matches(path, known, 1, 0.75)
    )
    return f" Did you mean {' or '.join(near)}?" if near else " `softprompt recipe` lists them all."
