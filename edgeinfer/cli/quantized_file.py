"""`edgeinfer quantize` to a GGUF file of fewer bits: chosen, made, measured, told."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import QualityTooLow, UsageError

if TYPE_CHECKING:
    from edgeinfer.measure.loss_report import LossReport
    from edgeinfer.quantize.prepared import Ready, Request

BUDGET_TYPE = "q4_k_m"  # what embeddings and head get with --budget
MOST_MINUTES = 7 * 24 * 60.0
MOST_TOKENS = 2**22
_OF_FOLDERS = ("--method", "--calibration", "--calibration-tokens")


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
        shared = _OF_FOLDERS if folder else ()
        return [name for name, is_given in found.items() if is_given and name not in shared]

    def check(self, type_name: str | None) -> None:
        """Raises UsageError, ExtraMissing."""
        from edgeinfer.measure.loss_report import check_report
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


def write_file(path: Path, output: str | None, type_name: str | None, wanted: FileOptions) -> None:
    """path: a folder of safetensors or a GGUF file. type_name: of TYPES; None: auto."""
    from edgeinfer.cli.long_work import Clock, long_work
    from edgeinfer.cli.output import StatusLine
    from edgeinfer.quantize.prepared import forget_finished, prepare, write

    wanted.check(type_name)
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
            _as_it_is(path, output, type_name, wanted, chosen)
            return
    request = _request(path, output, type_name or BUDGET_TYPE, wanted)
    status = StatusLine(enabled=not wanted.quiet)
    show = Clock(status).show
    assert request.out is not None  # noqa: S101 (`_request` always says where)
    with (
        long_work(request.out, status, quiet=wanted.quiet),
        prepare(path, request, show) as ready,
    ):
        status.clear()
        for note in () if wanted.quiet else ready.notes:
            sys.stderr.write(f"edgeinfer: {note}\n")
        report = None
        if wanted.measures:
            report = _measured(path, ready, wanted, show)
        else:
            write(ready, show)
        forget_finished(ready)
    _tell(ready, type_name or BUDGET_TYPE, report, chosen, wanted)


def _request(path: Path, output: str | None, type_name: str, wanted: FileOptions) -> Request:
    from edgeinfer.quantize.calibration import DEFAULT_TOKENS
    from edgeinfer.quantize.prepared import DEFAULT_MINUTES, Request
    from edgeinfer_models.conversion.new_file import exists

    out = None if output is None else _path(output)
    budget = None
    if wanted.budget is not None:
        budget = _budget(path, wanted.budget)
        if out is None:
            name = "".join(
                letter for letter in wanted.budget.lower() if letter.isalnum() or letter == "."
            )
            out = path.parent / f"{path.name.removesuffix('.gguf')}-{name}.gguf"
    target = out or path.parent / f"{path.name.removesuffix('.gguf')}-{type_name}.gguf"
    for each in (target, None if wanted.save_imatrix is None else _path(wanted.save_imatrix)):
        if each is not None and each.exists() and not wanted.force:
            raise exists(each)  # now, and not when all was worked out
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
    size = parse_size("--budget", text)
    return size - head_bytes(opened(path))


def _measured(path: Path, ready: Ready, wanted: FileOptions, show: Any) -> LossReport:
    """Written under another name, measured, and given its own if it is good enough."""
    from edgeinfer.measure.evaluation import DEFAULT_TOKENS
    from edgeinfer.measure.quantize_loss import measure_loss
    from edgeinfer.measure.texts import measured_text
    from edgeinfer.quantize.prepared import forget_finished, write
    from edgeinfer.quantize.quantization import REPORT_KEY
    from edgeinfer_models.conversion.new_file import exists
    from edgeinfer_models.gguf_patch import patch_metadata

    out = ready.plan.out
    staged = out.with_name(f".{out.name}.part")
    try:
        write(ready, show, staged)
        report = measure_loss(
            path,
            staged,
            measured_text(None),
            wanted.report_tokens or DEFAULT_TOKENS["reference"],
            progress=show,
            name=out.name,
            errors=ready.errors,
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
    path: Path, output: str | None, type_name: str, wanted: FileOptions, chosen: Mapping[str, Any]
) -> None:
    """What auto chose is not quantized: nothing is lost that would have to be measured."""
    from edgeinfer.cli.output import emit_json
    from edgeinfer.quantize.conversion import convert, plan_conversion
    from edgeinfer_models.conversion.model import source_of_folder, source_of_gguf

    source = source_of_folder(path) if path.is_dir() else source_of_gguf(path)
    out = None if output is None else _path(output)
    plan = plan_conversion(source, path, "gguf", type_name, out, force=wanted.force)
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
