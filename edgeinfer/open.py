"""From what a user typed to what a worker is to load: MODEL, files, settings, backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer.backend import LoadAs, MemoryItem, RuntimeSettings
from edgeinfer.backend_choice import AUTO, choose_backend
from edgeinfer.engine.disk_cache import prompts_folder
from edgeinfer.engine.draft_source import DraftSource
from edgeinfer.engine.process import LoadCommand
from edgeinfer.engine.speculation import Speculate
from edgeinfer.engine.window import DEFAULT_SINKS, Eviction
from edgeinfer.errors import ModelError, ModelNotFound, UsageError
from edgeinfer.machine.cost_store import costs_folder
from edgeinfer.machine.ledger import Automatic
from edgeinfer.machine.probe import default_threads
from edgeinfer.opened_form import Converting, in_its_form, predicted_form
from edgeinfer.registry import get_backend
from edgeinfer_models.chat_template import FALLBACKS, TemplateSource
from edgeinfer_models.exit_file import SHIPPED_EXITS, fingerprint, read_exit_file
from edgeinfer_models.exit_file import SUFFIX as EXIT_SUFFIX
from edgeinfer_models.ggml_types import KV_TYPES
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.resolve import ResolvedModel, resolve_model
from edgeinfer_models.store import data_folder

if TYPE_CHECKING:
    from edgeinfer_models.config import ModelConfig
    from edgeinfer_models.gguf_header import GgufHeader

DEFAULT_CONTEXT = 4096
MIN_CONTEXT = 32
MAX_CONTEXT = 2**24
MAX_SEQUENCES = 64
DEFAULT_CACHE_BYTES = 2**30

# Rows of logits of one step. Each takes 1 MiB with Gemma's vocabulary, so: one for each sequence, and no
# fewer than measuring step costs asks for (engine/step_measure.py).
LOGIT_ROWS = 16


@dataclass(frozen=True)
class OpenOptions:
    """How to open a model. None and 0 mean: choose for me."""

    model: str | None = None
    backend: str = "auto"
    context: int | None = None
    threads: int | None = None
    threads_batch: int | None = None
    kv_type_k: str = AUTO  # beside a type that was asked for: f16
    kv_type_v: str = AUTO
    flash_attention: bool = True
    gpu_layers: int | None = None
    sequences: int = 1
    window: int | None = None  # tokens that the model sees at once; None: the whole context
    sinks: int = DEFAULT_SINKS  # of them, the first ones, which stay when old ones leave
    eviction: Eviction = "streaming"  # what leaves
    speculate: Speculate = "auto"  # who guesses tokens that the model then checks
    draft: str | None = None  # the model that does, or the file of an exit
    measures_drafts: bool = False  # load it even where it is not worth its steps
    load_as: LoadAs = "auto"  # in what weights are held, where a backend can choose
    compiled: bool = False  # compile a step, where a backend can
    cache_bytes: int = DEFAULT_CACHE_BYTES
    cache_disk_bytes: int = 0  # of the prompt cache that survives the process; 0: none
    cache_dir: str | None = None  # None: the user's folder for caches
    mmap: bool = True
    remember: bool = False  # make it the model that is opened when none is named

    def __post_init__(self) -> None:
        """Raises UsageError naming the option."""
        _between("--ctx", self.context, MIN_CONTEXT, MAX_CONTEXT)
        _between("--threads", self.threads, 0, 1024)
        _between("--threads", self.threads_batch, 0, 1024)
        _between("--gpu-layers", self.gpu_layers, 0, 10_000)
        _between("--parallel", self.sequences, 1, MAX_SEQUENCES)
        _between("--cache-ram", self.cache_bytes, 0, 2**50)
        _between("--cache-disk", self.cache_disk_bytes, 0, 2**50)
        _between("--window", self.window, MIN_CONTEXT, MAX_CONTEXT)
        _between("--sinks", self.sinks, 0, MAX_CONTEXT)
        if self.window and self.context and self.window > self.context:
            raise UsageError(
                f"--window {self.window} is more than --ctx {self.context}, the tokens that the KV cache"
                " has room for; lower the one or raise the other"
            )
        for option, size in (("--window", self.window), ("--ctx", self.context)):
            if size is not None and size <= self.sinks:
                raise UsageError(
                    f"{option} {size} is not larger than --sinks {self.sinks}: no token but those would"
                    " ever be seen"
                )


@dataclass(frozen=True)
class OpenPlan:
    """What to load and how, decided before anything is loaded."""

    name: str
    spec: str  # what to remember as the model used last; "": nothing
    command: LoadCommand
    template: TemplateSource
    warnings: tuple[str, ...]


def plan_open(
    options: OpenOptions,
    pull_missing: Callable[[str], None] | None = None,
    converting: Converting | None = None,
) -> OpenPlan:
    """Resolve and check a model, converted if its backend opens another form. Whether it fits is seen
    where it is loaded.

    pull_missing(name): fetch a catalogue or hub model that is not here; without it, it is ModelNotFound.
    converting: told how far a conversion is, and may raise to end it; without it, what would have to be
    converted is ConversionFailed. What was converted before is found either way.
    Raises ModelError, BackendUnavailable, UsageError.
    """
    if options.backend == "scripted":
        return _plan_scripted(options)
    resolved = resolve_model(options.model, pull_missing=pull_missing)
    backend = choose_backend(options.backend, resolved.files.format, resolved.config)
    kinds = (options.kv_type_k, options.kv_type_v)
    check_choices(backend.backend, kinds, options.load_as, options.eviction, compiled=options.compiled)
    warnings = list(resolved.notes)
    if backend.convert_to is not None:
        resolved, told = in_its_form(resolved, backend, backend.convert_to, converting)
        warnings += told
    config = resolved.config
    context = options.context or options.window or default_context(config)
    if config.context_trained and context > config.context_trained:
        option = "--ctx" if options.context else "--window"
        warnings.append(
            f"{option} {context} is more than the {config.context_trained} tokens"
            f" {resolved.files.name} was trained on; answers may degrade past that"
        )
    if resolved.template.origin == "fallback":
        warnings.append(
            f"{resolved.files.name} has no chat template; the '{resolved.template.name}' form is used,"
            " which it may not have been trained on"
        )
    warnings += _sinks_warnings(options)
    command = LoadCommand(
        backend.backend,
        resolved.files,
        _settings(options, context),
        options.sequences,
        options.cache_bytes,
        config=config,
        automatic=Automatic(
            context=options.context is None and options.window is None,
            gpu_layers=options.gpu_layers is None,
            kv_type=options.kv_type_k == options.kv_type_v == AUTO,
        ),
        cache_disk_bytes=options.cache_disk_bytes,
        cache_folder=str(prompts_folder(options.cache_dir)),
        window=options.window,
        sinks=options.sinks,
        eviction=options.eviction,
        speculate=options.speculate,
        draft=_draft_source(options, resolved, warnings, pull_missing),
        drafts_folder=str(costs_folder().parent / "drafts"),
        costs_folder=str(costs_folder()),
        tunes_threads=not (options.threads or options.threads_batch),
    )
    return OpenPlan(resolved.files.name, resolved.spec, command, resolved.template, tuple(warnings))


def _plan_scripted(options: OpenOptions) -> OpenPlan:
    """MODEL is a script (JSON) or left out: for tests, ours and other people's."""
    kinds = (options.kv_type_k, options.kv_type_v)
    check_choices("scripted", kinds, options.load_as, options.eviction, compiled=options.compiled)
    paths = () if options.model is None else (Path(options.model),)
    files = ModelFiles(paths[0].stem if paths else "scripted", paths, "scripted")
    settings = RuntimeSettings(
        context=options.context or options.window or DEFAULT_CONTEXT,
        sequences=options.sequences,
        kv_type_k=_kv_type(options.kv_type_k),
        kv_type_v=_kv_type(options.kv_type_v),
    )
    command = LoadCommand(
        "scripted",
        files,
        settings,
        options.sequences,
        options.cache_bytes,
        cache_disk_bytes=options.cache_disk_bytes,
        cache_folder=str(prompts_folder(options.cache_dir)),
        window=options.window,
        sinks=options.sinks,
        speculate=options.speculate,
    )
    template = TemplateSource(FALLBACKS["chatml"], "fallback", bos="", eos="<|im_end|>", name="chatml")
    return OpenPlan(files.name, "", command, template, tuple(_sinks_warnings(options)))


def _draft_source(
    options: OpenOptions,
    resolved: ResolvedModel,
    warnings: list[str],
    pull_missing: Callable[[str], None] | None,
) -> DraftSource | None:
    """Who drafts beside lookups. What is wrong with an exit is a warning: answers come without it.
    Raises UsageError, ModelError for a model that is not there."""
    if options.speculate in ("off", "lookup"):
        if options.draft is not None:
            warnings.append(f"--draft is not used: --speculate {options.speculate} has no need of it")
        return None
    if options.speculate == "draft" and options.draft is None:
        raise UsageError("--speculate draft: name the model that drafts with --draft MODEL")
    is_exit = options.draft is None or options.draft.endswith(EXIT_SUFFIX)
    if options.speculate == "draft" and is_exit:
        raise UsageError(
            "--speculate draft takes a model, and --draft names an exit; take --speculate exit"
        )
    if options.speculate == "exit" and not is_exit:
        raise UsageError(
            "--speculate exit takes an exit (NAME.exit.gguf), and --draft names a model; take"
            " --speculate draft"
        )
    if is_exit:
        path = Path(options.draft).expanduser() if options.draft else find_exit(resolved)
        if path is None:
            return None
        try:
            read_exit_file(path)
        except ModelNotFound:
            raise
        except ModelError as error:
            warnings.append(f"drafts are without the exit: {error}")
            return None
        return DraftSource(exit_path=path, is_wanted=options.measures_drafts)
    try:
        found = resolve_model(options.draft, pull_missing=pull_missing)
    except ModelNotFound as error:
        raise ModelNotFound(f"--draft: {error}") from None
    except ModelError as error:
        warnings.append(f"drafts are without it: --draft: {error}")
        return None
    if found.files.format != resolved.files.format:
        warnings.append(
            f"drafts are without {found.files.name}: it is in another form ({found.files.format}) than"
            f" {resolved.files.name} ({resolved.files.format})"
        )
        return None
    return DraftSource(files=found.files, config=found.config)


def find_exit(resolved: ResolvedModel) -> Path | None:
    """Beside the model's file and named like it; or among the user's exits, or those that come with
    edgeinfer, and made for it."""
    model = resolved.files.paths[0]
    if resolved.files.format != "gguf" or resolved.header is None:
        return None
    beside = model.with_name(model.name.removesuffix(".gguf") + EXIT_SUFFIX)
    if beside.is_file():
        return beside
    for folder in (exits_folder(), SHIPPED_EXITS):
        for path in sorted(folder.glob(f"*{EXIT_SUFFIX}")):
            if _is_of(path, resolved.header):
                return path
    return None


def _is_of(path: Path, model: GgufHeader) -> bool:
    try:
        found = read_exit_file(path)
        if found.width != model.get_int("{arch}.embedding_length"):
            return False  # as is seen in less time
        return found.fingerprint == fingerprint(model)
    except (ModelError, OSError):
        return False


def exits_folder() -> Path:
    return data_folder() / "exits"


def check_choices(
    name: str,
    kv_types: Iterable[str],
    load_as: LoadAs = AUTO,
    eviction: Eviction = "streaming",
    *,
    compiled: bool = False,
) -> None:
    """What only some backends can do. Raises UsageError."""
    backend = get_backend(name)
    for kind in kv_types:
        if kind not in (AUTO, *KV_TYPES, *backend.own_kv_types):
            raise UsageError(f"the {name} backend has no KV cache of type {kind}; take q8_0")
    if load_as not in backend.loads_as:
        raise UsageError(
            f"--load-as {load_as}: the {name} backend computes with weights as they are stored;"
            " --backend torch can choose"
        )
    if compiled and not backend.compiles:
        raise UsageError(f"--compile: the {name} backend compiles nothing; --backend torch does")
    if eviction == "h2o" and not backend.counts_attention:
        raise UsageError(
            f"--eviction h2o: the {name} backend does not count attention; --backend torch does"
        )


def _sinks_warnings(options: OpenOptions) -> list[str]:
    if options.sinks:
        return []
    return [
        "--sinks 0: once old tokens leave a full context, the model soon writes nonsense; the first 4"
        " tokens are enough to prevent it"
    ]


def predict_open(resolved: ResolvedModel, options: OpenOptions) -> list[MemoryItem]:
    """What opening a model with these options would take in all, on the processor alone, whether or not
    its backend can be used here. Nothing is converted: of what would be, it is worked out."""
    backend, resolved = predicted_form(resolved)
    settings = _settings(options, options.context or options.window or default_context(resolved.config))
    return backend.predict_memory(resolved.files, resolved.config, settings)


def default_context(config: ModelConfig) -> int:
    """Tokens of context where none were asked for and memory does not say otherwise."""
    return min(DEFAULT_CONTEXT, config.context_trained or DEFAULT_CONTEXT)


def _settings(options: OpenOptions, context: int) -> RuntimeSettings:
    decode, prefill = default_threads()
    return RuntimeSettings(
        context=context,
        sequences=options.sequences,
        logit_rows=max(LOGIT_ROWS, options.sequences),
        kv_type_k=_kv_type(options.kv_type_k),
        kv_type_v=_kv_type(options.kv_type_v),
        load_as=options.load_as,
        compiled=options.compiled,
        heavy_hitters=options.eviction == "h2o",
        flash_attention=options.flash_attention,
        threads=options.threads or decode,
        threads_batch=options.threads_batch or options.threads or prefill,
        gpu_layers=-1 if options.gpu_layers is None else options.gpu_layers,
        mmap=options.mmap,
    )


def _kv_type(name: str) -> str:
    """Until it is chosen: the one that needs no choice."""
    return "f16" if name == AUTO else name


def _between(option: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise UsageError(f"{option} {value} is outside [{low}, {high}]")


__all__ = [
    "OpenOptions",
    "OpenPlan",
    "ResolvedModel",
    "default_context",
    "plan_open",
    "predict_open",
]
