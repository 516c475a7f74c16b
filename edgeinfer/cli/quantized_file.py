"""`edgeinfer quantize` to a GGUF file of fewer bits: chosen, made, measured, told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import QualityTooLow, UsageError

if TYPE_CHECKING:
    from edgeinfer.measure.loss_report import LossReport
    from edgeinfer.quantize.prepared import Ready, Request

BUDGET_TYPE = "q4_k_m"  # what embeddings and head get with --budget
MOST_MINUTES = 7 * 24 * 60.0
MOST_TOKENS = 2**22
OF_FOLDERS = ("--method", "--calibration", "--calibration-tokens")  # and of files


@dataclass(frozen=True)
class FileOptions:
    """As they were given; None: not."""

    method: str
    calibration: str | None
    calibration_tokens: int | None
    imatrix: str | None
    save_imatrix: str | None
    budget: str | None
    minutes: float | None
    max_kl: float | None
    report: str | None
    report_tokens: int | None
    measures: bool
    refreshes: bool
    force: bool
    quiet: bool
    as_json: bool

    def fitting(self, typed: Collection[str], type_name: str | None) -> FileOptions:
        """Without what was not typed (a variable, a line of the config file) and has no place beside the
        rest."""
        found, is_automatic = self, type_name is None and self.budget is None

        def drop(option: str, is_out_of_place: bool, **values: Any) -> None:
            nonlocal found
            if is_out_of_place and option not in typed:
                found = replace(found, **values)

        is_weighed = found.imatrix is not None and "--imatrix" in typed
        drop("--method", is_weighed and found.method != "imatrix", method="auto")
        drop("--method", "--calibration" in typed and found.method == "rtn", method="auto")
        drop("--no-report", bool({"--report", "--max-kl"} & set(typed)), measures=True)
        drop("--budget", "--type" in typed, budget=None)
        drop("--imatrix", "--calibration" in typed, imatrix=None)
        drop("--minutes", found.method != "qat", minutes=None)
        drop("--refresh", not is_automatic, refreshes=False)
        drop("--imatrix", found.method not in ("auto", "imatrix"), imatrix=None)
        looks = found.method != "rtn" or found.budget is not None
        drop("--calibration", not looks, calibration=None)
        keeps = found.method == "imatrix" and found.imatrix is None
        drop("--save-imatrix", not keeps, save_imatrix=None)
        drop("--report", not found.measures, report=None)
        drop("--max-kl", not found.measures and not is_automatic, max_kl=None)
        return found

    def fitting_folder(self, typed: Collection[str], type_name: str | None) -> FileOptions:
        """As `fitting`, of what folders have."""
        found = self
        is_fitted = type_name in (None, "mlx-4bit", "int4")
        if "--method" not in typed and (found.method in ("qat", "imatrix") or not is_fitted):
            found = replace(found, method="auto")
        if "--minutes" not in typed:
            found = replace(found, minutes=None)
        if "--calibration" not in typed and found.method == "auto" and not is_fitted:
            found = replace(found, calibration=None)
        return found

    def given(self, *, folder: bool) -> list[str]:
        """Those that only a file of fewer bits has; folder: those that folders have are left out."""
        found = {
            "--method": self.method != "auto",
            "--calibration": self.calibration is not None,
            "--calibration-tokens": self.calibration_tokens is not None,
            "--imatrix": self.imatrix is not None,
            "--save-imatrix": self.save_imatrix is not None,
            "--budget": self.budget is not None,
            "--minutes": self.minutes is not None,
            "--max-kl": self.max_kl is not None,
            "--report": self.report is not None,
            "--report-tokens": self.report_tokens is not None,
            "--refresh": self.refreshes,
        }
        shared = OF_FOLDERS if folder else ()
        return [name for name, is_given in found.items() if is_given and name not in shared]

    def check(self, type_name: str | None) -> None:
        """Raises UsageError, ExtraMissing."""
        from edgeinfer.measure.loss_report import check_report
        from edgeinfer.quantize.calibration import read_text
        from edgeinfer.quantize.prepared import METHODS

        if self.method not in METHODS:
            raise UsageError(f"--method {self.method[:40]!r} is not one of {', '.join(METHODS)}")
        if self.max_kl is not None and not 0.0 <= self.max_kl <= 100.0:
            raise UsageError(f"--max-kl {self.max_kl:g} is outside [0, 100]; 0.05 is a good file")
        if self.minutes is not None and self.method != "qat":
            raise UsageError("--minutes is for --method qat")
        if self.minutes is not None and not 0.0 < self.minutes <= MOST_MINUTES:
            raise UsageError(f"--minutes {self.minutes:g} is outside (0, {MOST_MINUTES:g}]")
        tokens = self.calibration_tokens
        if tokens is not None and not 2048 <= tokens <= MOST_TOKENS:
            raise UsageError(f"--calibration-tokens {tokens} is outside [2048, {MOST_TOKENS}]")
        tokens = self.report_tokens
        if tokens is not None and not 256 <= tokens <= MOST_TOKENS:
            raise UsageError(f"--report-tokens {tokens} is outside [256, {MOST_TOKENS}]")
        if self.save_imatrix is not None and (self.method != "imatrix" or self.imatrix is not None):
            raise UsageError("--save-imatrix keeps what --method imatrix finds in --calibration")
        is_automatic = type_name is None and self.budget is None
        if self.refreshes and not is_automatic:
            raise UsageError("--refresh is for --type auto, which measures how fast types are")
        if not self.measures and (self.report is not None or (self.max_kl and not is_automatic)):
            option = "--max-kl" if self.report is None else "--report"
            raise UsageError(f"{option} needs what --no-report leaves out")
        if self.report is not None:
            check_report(_path(self.report))
        if self.calibration is not None:
            read_text(_path(self.calibration))  # now, and not when the model is open


def write_file(
    path: Path, beside: Path, output: str | None, type_name: str | None, wanted: FileOptions
) -> None:
    """path: a folder of safetensors or a GGUF file. beside: where the result lies if `output` does not
    say. type_name: of TYPES; None: auto."""
    from edgeinfer.cli.long_work import Clock, long_work
    from edgeinfer.cli.output import StatusLine
    from edgeinfer.quantize.prepared import forget_finished, prepare, write
    from edgeinfer.quantize.quantization import opened, quantized_already

    wanted.check(type_name)
    already = quantized_already(opened(path))
    if already and not wanted.quiet:
        sys.stderr.write(f"edgeinfer: {already}\n")  # before the work
    chosen: Mapping[str, Any] = {}
    if type_name is None and wanted.budget is None:
        from edgeinfer.cli.automatic_type import choose, json_fields

        found = choose(
            path,
            output,
            wanted.max_kl,
            wanted.imatrix,
            force=wanted.force,
            refresh=wanted.refreshes,
            quiet=wanted.quiet,
            json_output=wanted.as_json,
        )
        type_name, chosen = found.chosen.type_name, json_fields(found)
        if type_name in ("f16", "bf16", "f32"):
            _as_it_is(path, beside, output, type_name, wanted, chosen)
            return
    request = _request(path, beside, output, type_name or BUDGET_TYPE, wanted)
    status = StatusLine(enabled=not wanted.quiet)
    show = Clock(status).show

    def say(line: str) -> None:
        if not wanted.quiet:
            status.clear()
            sys.stderr.write(f"edgeinfer: {line}\n")

    assert request.out is not None  # noqa: S101 (`_request` always says where)
    with (
        long_work(request.out, status, quiet=wanted.quiet),
        prepare(path, request, show, say) as ready,
    ):
        status.clear()
        for note in () if wanted.quiet else ready.notes:
            if note == already:
                continue
            sys.stderr.write(f"edgeinfer: {note}\n")
        report = None
        if wanted.measures:
            if not sys.stderr.isatty():
                say("measuring what it lost, which takes some minutes; --no-report leaves it out")
            report = _measured(path, ready, wanted, show)
        else:
            write(ready, show)
        forget_finished(ready)
    _say_what_is_left(request.out, say)
    _tell(ready, type_name or BUDGET_TYPE, report, chosen, wanted)


def _say_what_is_left(out: Path, say: Callable[[str], None]) -> None:
    """Of a run that was interrupted and had other options."""
    from edgeinfer.quantize.calibrated import work_folder
    from edgeinfer.quantize.finished_tensors import is_at_work

    folder = work_folder(out)
    if folder.is_dir() and not is_at_work(folder):
        say(f"{folder} is of a run that was interrupted and is not used any more; it may be deleted")


def _request(
    path: Path, beside: Path, output: str | None, type_name: str, wanted: FileOptions
) -> Request:
    from edgeinfer.quantize.calibration import DEFAULT_TOKENS
    from edgeinfer.quantize.prepared import DEFAULT_MINUTES, Request
    from edgeinfer_models.conversion.new_file import belongs_to, require_place

    out = None if output is None else _path(output)
    budget = None
    if wanted.budget is not None:
        budget = _budget(path, wanted.budget)
        if out is None:
            name = "".join(
                letter for letter in wanted.budget.lower() if letter.isalnum() or letter == "."
            )
            out = beside.parent / f"{beside.name.removesuffix('.gguf')}-{name}.gguf"
    target = out or beside.parent / f"{beside.name.removesuffix('.gguf')}-{type_name}.gguf"
    for each in (target, None if wanted.save_imatrix is None else _path(wanted.save_imatrix)):
        if each is not None:
            require_place(each, path, force=wanted.force)  # now, and not when all was worked out
    if wanted.save_imatrix is not None and _path(wanted.save_imatrix) == target:
        raise UsageError(f"--save-imatrix {target}: is where the result goes; give another name")
    if wanted.report is not None and belongs_to(_path(wanted.report), path):
        raise UsageError(f"--report {wanted.report}: is of the model that is read; give another name")
    return Request(
        type_name,
        wanted.method,
        target,
        wanted.force,
        None if wanted.imatrix is None else _path(wanted.imatrix),
        None if wanted.save_imatrix is None else _path(wanted.save_imatrix),
        None if wanted.calibration is None else _path(wanted.calibration),
        wanted.calibration_tokens or DEFAULT_TOKENS,
        budget,
        wanted.minutes or DEFAULT_MINUTES,
    )


def _budget(path: Path, text: str) -> int:
    """In bytes of tensors."""
    from edgeinfer.cli.options import parse_size
    from edgeinfer.quantize.budget import bits_per_weight_of
    from edgeinfer.quantize.quantization import head_bytes, num_weights, opened

    bits = bits_per_weight_of(text)
    if bits is not None:
        return int(bits * num_weights(opened(path)) / 8)
    try:
        size = parse_size("--budget", text)
    except UsageError:
        raise UsageError(
            f"--budget {text[:40]!r} is no size; write for example 4.5bpw, 512M or 2G"
        ) from None
    return max(0, size - head_bytes(opened(path)))


def _measured(path: Path, ready: Ready, wanted: FileOptions, show: Any) -> LossReport:
    """Written under another name, measured, and given its own if it is good enough."""
    from edgeinfer.measure.evaluation import DEFAULT_TOKENS
    from edgeinfer.measure.quantize_loss import measure_loss
    from edgeinfer.measure.texts import measured_text
    from edgeinfer.quantize.prepared import forget_finished, write
    from edgeinfer.quantize.quantization import REPORT_KEY
    from edgeinfer.quantize.rounding_errors import RoundingErrors
    from edgeinfer_models.conversion.new_file import exists
    from edgeinfer_models.gguf_patch import patch_metadata

    out = ready.plan.out
    staged = out.with_name(f".{out.name}.part")
    try:
        rounded = RoundingErrors()
        write(ready, show, staged, rounded)
        report = measure_loss(
            path,
            staged,
            measured_text(None),
            wanted.report_tokens or DEFAULT_TOKENS["reference"],
            progress=show,
            name=out.name,
            errors=ready.errors or rounded.found(ready.plan.types),
            notes=ready.notes,
        )
        patch_metadata(staged, REPORT_KEY, report.essentials_text())
        lost = report.loss.divergence.mean
        if wanted.report is not None:
            report.save(_path(wanted.report))
        if wanted.max_kl is not None and lost > wanted.max_kl:
            forget_finished(ready)
            raise QualityTooLow(
                f"{out}: not written: it lost {lost:.4f} nats a token, more than --max-kl"
                f" {wanted.max_kl:g}; take a larger type, or --method gptq"
            )
        if out.exists() and not wanted.force:
            raise exists(out)
        staged.replace(out)
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
    return report


def _as_it_is(
    path: Path,
    beside: Path,
    output: str | None,
    type_name: str,
    wanted: FileOptions,
    chosen: Mapping[str, Any],
) -> None:
    """What auto chose is not quantized: nothing is lost that would have to be measured."""
    from edgeinfer.cli.output import emit_json
    from edgeinfer.quantize.conversion import convert, plan_conversion
    from edgeinfer_models.conversion.model import source_of_folder, source_of_gguf

    source = source_of_folder(path) if path.is_dir() else source_of_gguf(path)
    out = None if output is None else _path(output)
    plan = plan_conversion(source, beside, "gguf", type_name, out, force=wanted.force)
    convert(plan, lambda _: None)
    if wanted.as_json:
        emit_json({"output": str(plan.out), "type": type_name, "bytes": plan.num_bytes, **chosen})
        return
    sys.stdout.write(f"{plan.out}: in {type_name}\n")


def _tell(
    ready: Ready,
    type_name: str,
    report: LossReport | None,
    chosen: Mapping[str, Any],
    wanted: FileOptions,
) -> None:
    from edgeinfer.cli.output import emit, emit_json
    from edgeinfer.machine.ledger import shown_bytes

    plan = ready.plan
    shares = plan.bytes_by_type()
    if wanted.as_json:
        emit_json(
            {
                "output": str(plan.out),
                "type": type_name,
                "method": ready.method,
                "bytes": plan.num_bytes,
                "bits_per_weight": plan.bits_per_weight,
                "bytes_by_type": shares,
                "notes": list(ready.notes),
                "report": None if report is None else report.as_json(),
                **chosen,
            }
        )
        return
    told = ", ".join(
        f"{shown_bytes(size)} in {name}" for name, size in shares.items() if 100 * size >= plan.num_bytes
    )
    emit(
        f"{plan.out}: {shown_bytes(plan.num_bytes)} of weights, {plan.bits_per_weight:.2f} bits each"
        f" ({told}), {ready.method}\n"
    )
    for line in report.lines() if report is not None else ():
        emit(f"{line}\n")


def _path(text: str) -> Path:
    return Path(text).expanduser()
